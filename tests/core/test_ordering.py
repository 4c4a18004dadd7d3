"""Orders that re-plan everything, live: who makes room for whom, and how soon. Through the real loop."""

from __future__ import annotations

from itertools import accumulate
from random import Random

import pytest

from jobsched.core.job import Job, Phase
from jobsched.core.launch import parse_key
from jobsched.core.lines import Line, LineKey, Place
from jobsched.core.observation import Progress
from jobsched.core.policies.estimate import REPORT_AFTER_MS
from jobsched.core.policies.ordering import _add_alike, in_time, in_time_heads
from jobsched.core.resources import JobId
from jobsched.sim.backend import Script
from jobsched.spec.job import JobSpec
from jobsched.spec.server import PolicyConfig
from jobsched.wiring import _policy
from tests.world import World, a_spec

HOUR_MS = 3_600_000


def a_world(gpus: int = 1, **config: object) -> World:
    world = World(nodes=1, gpus=gpus, scripts=lambda launch: Script())
    world.boot(_policy(PolicyConfig.model_validate({"ordering": "learned", "defragmentation": False, **config}), ()))
    return world


def quiet(**fields: object) -> JobSpec:
    return a_spec(heartbeat_timeout=0, **fields)


def phases(world: World, *job_ids: JobId) -> list[Phase]:
    return [world.job(job_id).phase for job_id in job_ids]


@pytest.mark.parametrize("ordering", ["learned", "shortest"])
def test_a_shorter_job_takes_the_place_of_a_longer_one_but_not_at_once(ordering: str) -> None:
    world = a_world(ordering=ordering)
    long = world.submit(quiet(expected="10h"))
    world.tick(4)
    short = world.submit(quiet(expected="1m"))
    world.tick(8, step_ms=1_000)
    assert phases(world, long, short) == [Phase.RUNNING, Phase.QUEUED]  # it began a moment ago
    world.tick(70, step_ms=1_000)
    assert phases(world, long, short) == [Phase.QUEUED, Phase.RUNNING]


@pytest.mark.parametrize("ordering", ["learned", "shortest", "attained", "fairness"])
def test_nobody_stops_where_preemption_is_off_and_higher_priority_goes_first(ordering: str) -> None:
    world = a_world(ordering=ordering, preemption=None)
    long = world.submit(quiet(expected="10h"))
    world.tick(4)
    short, urgent = world.submit(quiet(expected="1m")), world.submit(quiet(expected="5h", priority=1))
    world.tick(200, step_ms=1_000)
    assert phases(world, long, short, urgent) == [Phase.RUNNING, Phase.QUEUED, Phase.QUEUED]
    world.engine.kill(world.key(long, "worker", 0))
    world.tick(4)
    assert phases(world, short, urgent) == [Phase.QUEUED, Phase.RUNNING]


@pytest.mark.parametrize("ordering", ["learned", "shortest", "attained", "fairness", "kinds", "in-time"])
def test_nobody_who_does_not_save_is_stopped_again_and_again(ordering: str) -> None:
    """Three alike for one GPU: each may lose what it did once, and little after that."""
    world = a_world(ordering=ordering, preemption={"min_runtime": "1m"})
    world.engine._scripts = lambda launch: Script(run_ms=3 * HOUR_MS)
    jobs = [world.submit(quiet()) for _ in range(3)]
    world.run_until(lambda: all(world.job(job_id).phase.terminal for job_id in jobs), limit_ms=15 * HOUR_MS)
    assert phases(world, *jobs) == [Phase.SUCCEEDED] * 3
    assert max(world.job(job_id).attempt for job_id in jobs) <= 4
    assert all(world.job(job_id).lost_ms > 0 for job_id in jobs if world.job(job_id).attempt > 1)
    assert max(world.job(job_id).lost_ms for job_id in jobs) < 1.5 * HOUR_MS


def test_who_had_much_makes_room_for_who_had_nothing() -> None:
    world = a_world(ordering="attained")
    first = world.submit(quiet())
    world.tick(40, step_ms=30_000)
    second = world.submit(quiet())
    world.tick(20, step_ms=30_000)
    assert phases(world, first, second) == [Phase.RUNNING, Phase.QUEUED]  # both had less than the first level
    world.tick(100, step_ms=30_000)
    assert phases(world, first, second) == [Phase.QUEUED, Phase.RUNNING]


def test_two_that_save_take_turns_by_how_far_they_are_behind_their_fair_finish() -> None:
    world = a_world(ordering="fairness")
    world.engine._scripts = lambda launch: Script(step_ms=1_000, save_ms=1_000)
    jobs = [world.submit(quiet(expected=expected)) for expected in ("10h", "1h")]
    world.tick(200, step_ms=60_000)
    assert all(world.job(job_id).attempt > 1 for job_id in jobs)
    assert max(world.job(job_id).attempt for job_id in jobs) <= 5  # each keeps its seats for 20 minutes


def test_two_like_jobs_change_places_only_when_one_outran_what_was_expected() -> None:
    world = a_world()
    jobs = [world.submit(quiet(expected="1h")) for _ in range(2)]
    world.tick(118, step_ms=30_000)
    assert [world.job(job_id).attempt for job_id in jobs] == [1, 0]
    world.tick(600, step_ms=60_000)
    assert sum(world.job(job_id).attempt for job_id in jobs) <= 5  # each time it has run twice as long


def test_who_reports_that_little_is_left_goes_before_who_reports_much() -> None:
    world = a_world()
    total = {}

    def tell(seconds: int) -> None:
        for key, launch in world.engine.alive().items():
            job_id = parse_key(launch.key).job_id
            world.engine.tell(key, Progress(seconds, total[job_id]))

    def go(ticks: int) -> None:
        for second in range(ticks):
            tell(second)
            world.tick(step_ms=1_000)

    slow = world.submit(quiet())
    total[slow] = 100_000
    go(100)
    assert phases(world, slow) == [Phase.RUNNING]
    quick = world.submit(quiet())
    total[quick] = 500
    go(200)  # jobs of its family report: it is let in to be heard, and has less left
    assert phases(world, slow, quick) == [Phase.QUEUED, Phase.RUNNING]
    estimates = world.cluster.estimates
    left = estimates.reported_left_ms(world.job(quick), world.clock.now_ms())
    assert left is not None
    assert left < 500_000 - REPORT_AFTER_MS
    assert estimates.reported_left_ms(world.job(slow), world.clock.now_ms()) > 10 * HOUR_MS


@pytest.mark.parametrize(("due_s", "first"), [(0, "short"), (150, "due"), (500, "short"), (90, "short")])
def test_deadlines_go_first_when_it_is_now_or_never(due_s: int, first: str) -> None:
    world = a_world()
    now = world.clock.now_ms()
    left = {"short": 50_000, "due": 100_000}
    names = {
        world.submit(quiet(name=name, deadline=f"{due_s}s" if name == "due" and due_s else 0)): name for name in left
    }
    jobs = [world.job(job_id) for job_id in names]
    cluster = world.cluster
    cluster.jobs.update({job.id: job for job in jobs})

    def told(job: Job) -> int:
        return left[names[job.id]]

    turns = in_time(told)(cluster, jobs, now)
    assert names[turns[0].job.id] == first
    places = [Place(told(job), job.submitted_at_ms, job.id) for job in jobs]
    lines = [Line(LineKey("default", 0, cluster.shape(jobs[0])), cluster.ledger.everywhere, places)]
    heads = in_time_heads(cluster, lines, 1, now)
    assert names[JobId(next(iter(heads)))] in (first, "due")


def test_live_a_deadline_that_comes_near_goes_before_what_is_shorter() -> None:
    """`ordering: in-time`, run times as expected by users; nothing happens at the moment when it becomes urgent."""
    world = a_world(ordering="in-time")
    short = world.submit(quiet(expected="10m"))
    world.tick(4)
    due = world.submit(quiet(expected="20m", deadline="45m"))
    world.tick(100, step_ms=1_000)
    assert phases(world, short, due) == [Phase.RUNNING, Phase.QUEUED]  # there is time
    world.tick(300, step_ms=1_000)
    assert phases(world, short, due) == [Phase.QUEUED, Phase.RUNNING]  # 20 of the 40 minutes left are its own


def test_what_the_knapsack_holds_is_the_best_of_all_numbers_of_each_size() -> None:
    random = Random(4)
    for _ in range(200):
        room = random.randint(0, 40)
        value = [0.0] * (room + 1)
        for size in random.sample((1, 2, 3, 4, 8, 16), 4):
            lefts = sorted(random.choice((1, 2, 2, 5, 30, 700)) for _ in range(random.randint(0, 12)))
            gains = [0.0, *accumulate(1 / left for left in lefts)][: room // size + 1]
            before, (value, counts) = value, _add_alike(value, gains, size)
            for held, count in enumerate(counts):
                tried = [before[held - n * size] + gains[n] for n in range(min(len(gains) - 1, held // size) + 1)]
                assert value[held] == tried[count] == pytest.approx(max(tried), rel=1e-12)
