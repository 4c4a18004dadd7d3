"""Which kind of GPU each job gets: by what it gains there, and by who waits behind it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random

import pytest

from jobsched.core.events import AttemptPlaced, AttemptStopping
from jobsched.core.job import Reason
from jobsched.core.policies.kinds import Choice, choose_kinds, fill
from jobsched.core.policies.placement import Score
from jobsched.core.resources import WHOLE_GPU, JobId, NodeName
from jobsched.sim.run import POLICIES, Result, Simulation
from jobsched.sim.throughput import Seats, Steady
from jobsched.sim.workload import Arrival, Rules, Workload, gang_spec, make_nodes
from jobsched.spec.server import PolicyConfig
from jobsched.wiring import _policy

HOUR_MS = 3_600_000


def a_choice(number: int, gpus: int = 1, here: str = "", priority: int = 0, **hours: float) -> Choice:
    times = {kind: time * HOUR_MS for kind, time in hours.items()}
    return Choice((-priority, number, f"{number:03}"), gpus * WHOLE_GPU, times, here)


def chosen(*choices: Choice, **gpus: int) -> list[str]:
    capacity = {kind: count * WHOLE_GPU for kind, count in gpus.items()}
    found = choose_kinds(choices, capacity)
    fill(choices, found, capacity)
    return [found[choice.key[2]] for choice in choices]


def test_while_there_is_room_everybody_gets_its_fastest_kind() -> None:
    assert chosen(a_choice(0, fast=1, slow=4), a_choice(1, fast=4, slow=3), fast=2, slow=2) == ["fast", "slow"]


def test_the_fast_gpu_goes_to_who_gains_most_from_it_when_both_are_alike_else() -> None:
    little, much = a_choice(0, fast=2, slow=2.5), a_choice(1, fast=2, slow=20)
    assert chosen(little, much, fast=1, slow=1) == ["slow", "fast"]
    assert chosen(much, little, fast=1, slow=1) == ["fast", "slow"]


def test_a_kind_that_a_job_cannot_use_is_never_chosen() -> None:
    assert chosen(*(a_choice(n, fast=1) for n in range(3)), fast=1, slow=8) == ["fast"] * 3


def test_a_running_job_stays_for_little_and_moves_for_much() -> None:
    assert chosen(a_choice(0, here="slow", fast=1, slow=1.05), fast=1, slow=1) == ["slow"]
    assert chosen(a_choice(0, here="slow", fast=1, slow=3), fast=1, slow=1) == ["fast"]


def test_newcomers_go_where_most_is_left_when_all_kinds_are_the_same_to_them() -> None:
    newcomers = [a_choice(n, few=9, many=9) for n in range(1, 5)]
    assert chosen(a_choice(0, here="few", few=8, many=8), *newcomers, few=2, many=8)[0] == "few"


def test_higher_priority_has_the_choice() -> None:
    low, high = a_choice(0, fast=1, slow=8), a_choice(1, priority=1, fast=4, slow=5)
    assert chosen(low, high, fast=1, slow=1) == ["slow", "fast"]


def test_near_the_least_sum_of_completion_times() -> None:
    """Single GPUs, one of each kind, all jobs there from the start: against every assignment there is."""
    random = Random(7)
    worst = 0.0
    for _ in range(200):
        choices = [
            a_choice(n, a=random.uniform(1, 10), b=random.uniform(1, 10)) for n in range(random.randint(2, 7))
        ]
        kinds = [choose_kinds(choices, {"a": WHOLE_GPU, "b": WHOLE_GPU})[c.key[2]] for c in choices]
        least = min(total_ms(choices, kinds) for kinds in product("ab", repeat=len(choices)))
        worst = max(worst, total_ms(choices, kinds) / least)
    assert worst < 1.35


def total_ms(choices: list[Choice], kinds: tuple[str, ...] | list[str]) -> float:
    total = 0.0
    for kind in "ab":
        at_ms = 0.0
        for time in sorted(c.times[kind] for c, on in zip(choices, kinds, strict=True) if on == kind):
            at_ms += time
            total += at_ms
    return total


# ---- through the real loop ----


def speeds(**by_kind: float) -> object:
    def speed(seats: Seats) -> float:
        return min(by_kind.get(kind, 1.0) for kind, _ in seats)

    return speed


def a_job(number: int, at_s: float, hours: float, gpus: int = 1, **by_kind: float) -> Arrival:
    kinds = "|".join(sorted(by_kind))
    work = Steady(hours * HOUR_MS, 0, speeds(**by_kind))  # type: ignore[arg-type]
    return Arrival(round(at_s * 1_000), JobId(f"{number:03}"), gang_spec(gpus, 4, kinds=kinds, single=True), work)


def run(policy: str, *arrivals: Arrival, nodes: str = "1x1:fast+1x1:slow") -> Result:
    return Simulation(Workload("test", arrivals, make_nodes(nodes)), POLICIES[policy], policy).run()


def test_a_job_that_gains_little_moves_away_for_one_that_gains_much_and_both_end_sooner() -> None:
    jobs = (a_job(0, 0, 2, fast=1, slow=0.9), a_job(1, 60, 4, fast=1, slow=0.1))
    informed = run("kinds", *jobs)
    moved = [e.event for e in informed.store.read(0, 1 << 30) if isinstance(e.event, AttemptStopping)]
    assert [e.job_id for e in moved if e.outcome.reason is Reason.MOVED] == ["000"]
    assert informed.accounts.jobs[JobId("001")].jct_ms == pytest.approx(4 * HOUR_MS, rel=0.01)


def a_mix(jobs: int, every_s: float) -> tuple[Arrival, ...]:
    """Job types of three sorts, as Gavel's are, that report their steps."""
    random = Random(3)
    sorts = ((1.0, 0.75, 0.15), (1.0, 0.8, 0.5), (0.6, 1.0, 0.5))
    arrivals, at_s = [], 0.0
    for number in range(jobs):
        at_s += random.expovariate(1 / every_s)
        sort = random.randrange(3)
        hours, gpus = min(20.0, random.lognormvariate(0.3, 1.2)), random.choice((1, 1, 1, 2, 4))
        arrival = a_job(number, at_s, hours, gpus, **dict(zip("abc", sorts[sort], strict=True)))
        spec = gang_spec(gpus, 4, kinds="a|b|c", single=True, program=f"sort{sort}")
        work = replace(arrival.work, steps=max(1, round(hours * 3_600)))  # type: ignore[type-var]
        arrivals.append(replace(arrival, spec=spec, work=work))
    return tuple(arrivals)


def test_who_knows_the_kinds_is_much_better_than_who_does_not() -> None:
    """Must-show row 6 in small, on as many GPUs of three kinds."""
    arrivals = a_mix(150, 2_000)
    informed, blind = (run(policy, *arrivals, nodes="1x4:a+1x4:b+1x4:c") for policy in ("kinds", "blind"))
    assert blind.summary.avg_jct_s > 1.5 * informed.summary.avg_jct_s


def test_who_learns_the_kinds_from_reported_steps_is_better_than_who_looks_at_run_times_alone() -> None:
    """The policy of a server, `ordering: kinds`, which is told nothing; the other at least prefers what is fastest for
    most, as the specs say."""
    workload = Workload("test", a_mix(150, 2_000), make_nodes("1x4:a+1x4:b+1x4:c"))

    def average_jct_s(ordering: str, name: str) -> float:
        config = {"ordering": ordering, "preemption": {"lost_percent": 100}}  # stopping loses nothing here
        policy = _policy(PolicyConfig.model_validate(config), ())
        return Simulation(workload, lambda sim: policy, name).run().summary.avg_jct_s

    # without hearing reports it would be 1.14 times
    assert average_jct_s("learned", "learned") > 1.2 * average_jct_s("kinds", "kinds-learned")


def test_a_gang_gathers_on_one_node_once_there_is_room() -> None:
    """Two GPUs on two nodes, until the jobs beside it end."""
    arrivals = (a_job(0, 0, 0.3, fast=1), a_job(1, 0, 0.3, fast=1), a_job(2, 1, 5, gpus=2, fast=1))
    nodes = "2x2:fast"
    packed = run("kinds", *arrivals, nodes=nodes)
    placed = [e.event for e in packed.store.read(0, 1 << 30) if isinstance(e.event, AttemptPlaced)]
    assert {b.node for b in [e for e in placed if e.job_id == "002"][-1].bindings} == {"n0001"}


def test_like_jobs_do_not_chase_each_other() -> None:
    arrivals = tuple(a_job(n, n, 3, gpus=2, fast=1, slow=0.3) for n in range(6))
    result = run("kinds", *arrivals, nodes="1x4:fast+1x4:slow")
    assert result.summary.ended == 6
    assert result.summary.preemptions <= 6


def test_what_fits_no_kind_by_itself_runs_on_several() -> None:
    wide = replace(a_job(0, 0, 1, gpus=4, fast=1, slow=0.5))
    result = run("kinds", wide, nodes="1x2:fast+1x2:slow")
    assert result.accounts.jobs[JobId("000")].jct_ms == pytest.approx(2 * HOUR_MS, rel=0.01)


@pytest.mark.parametrize("score", [Score.PACK, Score.SPREAD])
def test_a_spread_gang_changes_places_with_what_is_smaller(score: Score) -> None:
    """Each of two nodes has one GPU free; the gang of two comes together, the job beside it goes where it was."""
    arrivals = (
        a_job(0, 0, 6, fast=1), a_job(1, 0, 0.2, fast=1), a_job(2, 1, 8, fast=1), a_job(3, 1_000, 5, gpus=2, fast=1)
    )
    workload = Workload("test", arrivals, make_nodes("2x2:fast"), rules=Rules(score=score))
    result = Simulation(workload, POLICIES["kinds"], "kinds").run()
    seats: dict[JobId, list[set[NodeName]]] = {}
    for stored in result.store.read(0, 1 << 30):
        if isinstance(stored.event, AttemptPlaced):
            seats.setdefault(stored.event.job_id, []).append({b.node for b in stored.event.bindings})
    first, *_, last = seats[JobId("003")]
    assert (len(first), len(last)) == (2, 1)
    assert seats[JobId("000")][-1] == seats[JobId("002")][-1] != last
    assert result.summary.preemptions == 2
