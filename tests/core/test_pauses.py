"""What changes of size cost, learned from what was reported around them."""

from __future__ import annotations

import json

from pydantic import TypeAdapter

from jobsched.core.job import Job
from jobsched.core.policies.goodput import Pause, SpeedModel
from jobsched.core.policies.pauses import ASKED, FAMILIES_KEPT, KEPT, Pauses, PausesNote
from jobsched.core.resources import JobId
from tests.world import a_spec


def a_job(name: str, program: str = "x") -> Job:
    spec = a_spec(roles={"worker": {"command": program, "gpu": "any:1"}})
    return Job(id=JobId(name), name=name, owner="me", spec=spec, submitted_at_ms=0)


def told(*reports: tuple[int, int, int, int]) -> list[Pause]:
    """What a model tells after reports of (attempt, replicas, step, instant)."""
    model = SpeedModel()
    return [p for attempt, count, step, at in reports if (p := model.passed(attempt, (count, 0), step, -1, at))]


def test_a_restart_cost_the_time_between_reports_less_the_steps_in_between() -> None:
    """10 steps a second before; the first report afterwards comes 4 steps on, at 20 a second: 200 ms of work."""
    assert told((1, 2, 10, 1_000), (1, 2, 20, 2_000), (2, 4, 24, 32_200), (2, 4, 44, 33_200)) == [
        Pause(in_place=False, since_ms=2_000, took_ms=30_000)
    ]


def test_it_is_told_once_and_not_before_the_new_pace_is_known() -> None:
    first = (1, 2, 0, 0), (1, 2, 10, 1_000)
    assert told(*first, (2, 4, 10, 6_000)) == []
    assert told(*first, (2, 4, 10, 6_000), (2, 4, 10, 7_000)) == []
    again = told(*first, (2, 4, 10, 6_000), (2, 4, 20, 7_000), (2, 4, 30, 8_000))
    assert [pause.took_ms for pause in again] == [5_000]


def test_steps_done_again_are_no_cost_of_the_change_and_rare_reports_give_no_negative_one() -> None:
    assert told((1, 2, 0, 0), (1, 2, 100, 10_000), (2, 4, 90, 13_000), (2, 4, 100, 14_000))[0].took_ms == 3_000
    assert told((1, 2, 0, 0), (1, 2, 1, 60_000), (2, 4, 9, 120_000), (2, 4, 10, 180_000))[0].took_ms == 0


def test_in_place_the_slower_pace_accounts_for_what_it_can() -> None:
    """Half a minute at 1 step a second, then 2 s without one, then 4 a second; reports are a minute apart or close."""
    assert told((1, 1, 0, 0), (1, 1, 30, 30_000), (1, 4, 34, 33_000), (1, 4, 74, 43_000)) == [
        Pause(in_place=True, since_ms=30_000, took_ms=0)
    ]
    assert told((1, 1, 0, 0), (1, 1, 30, 30_000), (1, 4, 31, 50_000), (1, 4, 71, 60_000))[0].took_ms == 19_000


def test_what_is_no_change_of_size_or_was_not_seen_whole_tells_nothing() -> None:
    assert told((1, 2, 0, 0), (1, 2, 10, 1_000), (3, 2, 10, 9_000), (3, 2, 20, 10_000)) == []  # attempt 2 said nothing
    assert told((1, 2, 9, 0), (1, 2, 19, 1_000), (1, 2, 5, 9_000), (1, 2, 15, 10_000)) == []  # back to a checkpoint
    assert told((1, 2, 0, 0), (1, 2, 10, 1_000)) == []


def test_nothing_seen_the_setting_holds_and_a_single_slow_start_is_not_believed_yet() -> None:
    pauses, job = Pauses(), a_job("a")
    assert pauses.expected_ms(job, False, 30_000) == 30_000
    pauses.note(job, False, 200_000)
    assert pauses.expected_ms(job, False, 30_000) == 30_000
    pauses.note(job, False, 180_000)
    assert pauses.expected_ms(job, False, 30_000) == 180_000
    assert pauses.expected_ms(job, True, 5_000) == 5_000, "in place is something else"


def test_a_quick_restart_is_believed_at_once_and_holds_for_the_family() -> None:
    pauses = Pauses()
    pauses.note(a_job("a"), False, 2_000)
    assert pauses.expected_ms(a_job("b"), False, 30_000) == 2_000
    assert pauses.expected_ms(a_job("c", "another"), False, 30_000) == 30_000


def test_a_job_goes_by_its_own_before_those_of_its_family() -> None:
    pauses, mine, other = Pauses(), a_job("mine"), a_job("other")
    for _ in range(ASKED):
        pauses.note(mine, False, 90_000)
    for _ in range(KEPT - ASKED):
        pauses.note(other, False, 2_000)
    assert pauses.expected_ms(mine, False, 30_000) == 90_000
    assert pauses.expected_ms(a_job("new"), False, 30_000) == 2_000


def test_memory_is_bounded_and_the_latest_stay() -> None:
    pauses = Pauses()
    for n in range(FAMILIES_KEPT + 5):
        pauses.note(a_job("j", f"program-{n}"), False, n)
    for n in range(2 * KEPT):
        pauses.note(a_job("j", "again"), True, n)
    noted = pauses.noted()
    assert len(noted) == FAMILIES_KEPT
    assert [ms for _, ms in noted[-1][2]] == list(range(KEPT, 2 * KEPT))
    assert pauses.expected_ms(a_job("j", "program-0"), False, 77) == 77


def test_what_is_noted_comes_back_as_it_was() -> None:
    pauses, wire = Pauses(), TypeAdapter(PausesNote)
    pauses.note(a_job("a"), False, 2_000)
    pauses.note(a_job("a"), True, 500)
    again = Pauses.of(wire.validate_python(json.loads(wire.dump_json(pauses.noted()))))
    assert again == pauses
