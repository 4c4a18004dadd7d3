"""Expected starts: bands around what then happens, honest where nobody can tell; the live cluster stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobsched.core.alternatives import later
from jobsched.core.explain import starting
from jobsched.core.forecast import AHEAD, expected, picture_for, sooner_with
from jobsched.core.job import Phase
from jobsched.core.passes import Policy
from jobsched.core.plan import Forecast
from jobsched.core.policies.backfill import Backfill
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.victims import Preemption
from jobsched.core.resources import JobId
from jobsched.sim.backend import Script
from jobsched.sim.run import POLICIES, START_MS, Simulation
from jobsched.sim.workload import Workload, make_nodes
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import Budget, QueueSpec
from tests.core.test_backfill import an_arrival
from tests.core.test_rehearsal import fingerprint
from tests.world import World, a_gpu_node, a_spec

POLICY = Policy(fair=FairShare(), preemption=Preemption(), backfill=Backfill())


def a_worker(gpu: str = "any:4", replicas: int = 1, **fields: object) -> JobSpec:
    return a_spec(roles={"worker": {"command": "x", "cpu": 1, "gpu": gpu, "replicas": replicas}}, **fields)


def a_world(**fields: object) -> World:
    world = World(gpus=4, scripts=lambda _: Script(run_ms=3_000_000), **fields)  # type: ignore[arg-type]
    world.boot(POLICY)
    return world


def told(world: World, job_id: JobId) -> tuple[Forecast, str]:
    """The forecast and its words; asking changes nothing."""
    before, estimates = fingerprint(world.cluster), repr(world.cluster.estimates)
    now_ms = world.clock.now_ms()
    job = world.job(job_id)
    found = expected(picture_for(world.cluster, job, now_ms, POLICY), job, now_ms, POLICY)
    assert fingerprint(world.cluster) == before
    assert repr(world.cluster.estimates) == estimates
    return found, starting(found, now_ms)


def test_time_limits_say_by_when() -> None:
    jobs = [an_arrival(0, 0, 1_000, 4), an_arrival(1, 1, 500, 4), an_arrival(2, 2, 10, 4)]
    simulation = Simulation(Workload("line", tuple(jobs), make_nodes("1x4")), POLICIES["fifo"], "fifo")
    while simulation.clock.now_ms() < START_MS + 2_000:
        simulation.step()
    simulation.step()
    with simulation.controller.view() as (cluster, _):
        now = simulation.clock.now_ms()
        for number, start in ((1, 1_001), (2, 1_502)):
            job = cluster.jobs[JobId(f"{number:04}")]
            found = expected(picture_for(cluster, job, now, Policy()), job, now, Policy())
            assert found.after_ms == found.before_ms == pytest.approx(START_MS + start * 1_000, abs=10)
            assert found.by == ("limit",)
    assert " (in 8 min), if those before it use up their time limits" in starting(found, now)


def test_like_jobs_that_ended_give_a_band() -> None:
    world = a_world(nodes=1)
    for _ in range(3):  # each of them 50 minutes
        job_id = world.submit(a_worker(name="train-1"))
        world.run_to_phase(job_id, Phase.SUCCEEDED, limit_ms=10_000_000)
    world.submit(a_worker(name="train-2"))
    world.tick(3)
    late = world.submit(a_worker(name="train-3"))
    world.tick(2)
    found, words = told(world, late)
    start_ms = world.run_to_phase(late, Phase.RUNNING, limit_ms=10_000_000).attempt_started_at_ms
    assert found.by == ("like",)
    assert found.after_ms < found.before_ms
    assert found.after_ms - start_ms < 1_500_000, "the middle of 50 minutes' bucket"
    assert found.before_ms > start_ms
    assert words.startswith("between ")
    assert "(p50/p90; in " in words


def test_a_job_of_which_nothing_is_known_is_named() -> None:
    world = a_world(nodes=1)
    world.submit(a_worker(name="mystery"))
    world.tick(3)
    waits = world.submit(a_worker(name="waits", time_limit="1h"))
    world.tick(2)
    found, words = told(world, waits)
    assert (found.after_ms, found.before_ms) == (0, 0)
    assert words == "nobody can tell: mystery may run for ever: no time_limit, no total reported, and no job like it " \
                    "has ended yet"  # fmt: skip


def test_a_budget_elsewhere_does_not_hide_who_stays() -> None:
    """Windows turn for ever, but only the first turn can change anything."""
    queues = (QueueSpec(), QueueSpec(name="paid", budget=Budget(gpu_hours=100, window="1h")))
    world = a_world(nodes=1, queues=queues)
    world.submit(a_worker(name="mystery"))
    world.tick(3)
    waits = world.submit(a_worker(name="waits", time_limit="1h"))
    world.tick(2)
    assert "mystery may run for ever" in told(world, waits)[1]


def test_a_spent_budget_is_whole_again_with_its_next_window() -> None:
    queues = (QueueSpec(), QueueSpec(name="paid", budget=Budget(gpu_hours=1, window="2h")))
    world = a_world(nodes=1, queues=queues)
    spends = world.submit(a_worker(queue="paid"))  # 4 GPUs for 50 minutes
    world.run_to_phase(spends, Phase.SUCCEEDED, limit_ms=10_000_000)
    waits = world.submit(a_worker(queue="paid"))
    world.tick(3)
    found, _ = told(world, waits)
    now_ms = world.clock.now_ms()
    assert found.after_ms == found.before_ms == now_ms - now_ms % 7_200_000 + 7_200_000
    start_ms = world.run_to_phase(waits, Phase.RUNNING, limit_ms=10_000_000).attempt_started_at_ms
    assert start_ms == pytest.approx(found.before_ms, abs=2_000)


def test_quotas_count() -> None:
    """Free GPUs do not help a queue that has used its quota: it starts when its own job ends."""
    queues = (QueueSpec(), QueueSpec(name="small", max_gpus=4))
    world = a_world(nodes=2, queues=queues)
    world.submit(a_worker(queue="small", time_limit="1h"))
    world.tick(3)
    waits = world.submit(a_worker(queue="small", time_limit="1h"))
    world.tick(2)
    found, _ = told(world, waits)
    assert found.before_ms == pytest.approx(world.clock.now_ms() + 3_600_000, abs=1_000)


def test_a_later_start_with_something_changed() -> None:
    """h100 is taken for two hours, the other node for one: with its GPUs the job starts an hour sooner."""
    world = a_world(nodes=1)
    world.engine.put_node(a_gpu_node("h", 4, kind="h100-80gb"))
    world.submit(a_worker("h100:4", time_limit="2h"))
    world.submit(a_worker("sim-gpu:4", time_limit="1h"))
    world.tick(3)
    waits = world.submit(a_worker("h100:4", time_limit="1h"))
    world.tick(2)
    job, now_ms = world.job(waits), world.clock.now_ms()
    picture = picture_for(world.cluster, job, now_ms, POLICY)
    assert picture is not None
    than = expected(picture, job, now_ms, POLICY)
    ((text, at_ms),) = sooner_with(picture, job, later(world.cluster, job), now_ms, POLICY, than)
    assert text == "sim-gpu instead of h100"
    assert at_ms == pytest.approx(now_ms + 3_600_000, abs=1_000)
    assert than.before_ms == pytest.approx(now_ms + 7_200_000, abs=1_000)


def test_the_rest_of_a_long_line_goes_on_at_the_pace_of_the_first() -> None:
    world = a_world(nodes=1)
    ids = [world.submit(a_worker(time_limit="1h")) for _ in range(4 * AHEAD)]
    world.tick(3)
    found, words = told(world, ids[AHEAD])
    assert found.before_ms == pytest.approx(world.clock.now_ms() + AHEAD * 3_600_000, abs=1_000)
    assert "pace" not in found.by
    for place in (AHEAD + 2, 3 * AHEAD, 4 * AHEAD - 1):
        found, words = told(world, ids[place])
        assert found.before_ms == pytest.approx(world.clock.now_ms() + place * 3_600_000, rel=0.01)
        assert "pace" in found.by
    assert words.endswith("if those before it use up their time limits")
    short = world.submit(a_worker(time_limit="6m"))
    found, _ = told(world, short)
    assert found.before_ms == pytest.approx(world.clock.now_ms() + 4 * AHEAD * 3_600_000, rel=0.01)


def test_more_work_beyond_the_first_takes_longer() -> None:
    """Those that are played take two GPUs for one hour each, those beyond them four for three."""
    world = a_world(nodes=1)
    for _ in range(AHEAD):
        world.submit(a_worker(gpu="any:2", time_limit="1h"))
    for _ in range(AHEAD):
        world.submit(a_worker(time_limit="3h"))
    last = world.submit(a_worker(time_limit="1h"))
    world.tick(3)
    hours = AHEAD / 2 + 3 * AHEAD
    assert told(world, last)[0].before_ms == pytest.approx(world.clock.now_ms() + hours * 3_600_000, rel=0.03)


def test_one_beyond_the_first_of_which_nothing_is_known_is_named() -> None:
    world = a_world(nodes=1)
    for _ in range(AHEAD + 1):
        world.submit(a_worker(time_limit="1h"))
    world.submit(a_worker(name="endless"))
    last = world.submit(a_worker(time_limit="1h"))
    world.tick(3)
    assert told(world, last)[1].startswith("nobody can tell: endless goes first and may run for ever: no time_limit")


def test_without_a_pace_nothing_is_told_of_those_beyond_the_first() -> None:
    """A job that is only thought of would start at once, before all who need more; who else would is not played."""
    world = a_world(nodes=1)
    world.submit(a_worker(gpu="any:2", time_limit="1h"))
    for _ in range(AHEAD + 10):
        world.submit(a_worker(time_limit="1h"))
    world.tick(3)
    small = replace(world.job(JobId("j00002")), id=JobId("thought-of"), spec=a_worker(gpu="any:1", time_limit="1h"),
                    submitted_at_ms=world.clock.now_ms())
    picture = picture_for(world.cluster, small, world.clock.now_ms(), Policy())
    found = expected(picture, small, world.clock.now_ms(), Policy())
    assert (found.before_ms, found.unknown) == (0, "those before it do not get on")


def test_jobs_that_no_node_holds_beside_it_are_not_in_its_way() -> None:
    """Twice as many as are looked at wait in another queue for nodes of their own."""
    world = World(nodes=0, queues=(QueueSpec(name="a"), QueueSpec(name="b")),
                  scripts=lambda _: Script(run_ms=3_000_000))
    world.boot(Policy())
    for name in "ab":
        world.engine.put_node(a_gpu_node(name, 4, labels=(("vc", name),)))
    for _ in range(2 * AHEAD + 10):
        world.submit(a_worker(time_limit="1h", queue="b", placement={"nodes": {"vc": "b"}}))
    world.submit(a_worker(time_limit="1h", queue="a", placement={"nodes": {"vc": "a"}}))
    mine = world.submit(a_worker(time_limit="1h", queue="a", placement={"nodes": {"vc": "a"}}))
    world.tick(3)
    job, now_ms = world.job(mine), world.clock.now_ms()
    found = expected(picture_for(world.cluster, job, now_ms, Policy()), job, now_ms, Policy())
    assert found.before_ms == pytest.approx(now_ms + 3_600_000, abs=1_000)


def test_an_urgent_job_starts_when_others_have_made_room() -> None:
    world = a_world(nodes=1)
    world.submit(a_worker(name="low"))
    world.tick(3)
    world.clock.advance_to(world.clock.now_ms() + 5_000)
    urgent = world.submit(a_worker(name="urgent", priority=10))
    world.tick(1)
    found, _ = told(world, urgent)
    assert world.clock.now_ms() < found.after_ms <= world.clock.now_ms() + 60_000
    assert found.before_ms == found.after_ms + world.job(urgent).spec.checkpoint.grace  # low may take so long to save


def test_who_leaves_may_take_all_its_grace() -> None:
    """Saving takes 20 s here, and may take 45: a first and a second claimant are told so, and a third who stays."""
    world = World(gpus=4, nodes=1, scripts=lambda _: Script(run_ms=3_000_000, save_ms=20_000))
    world.boot(POLICY)
    low = world.submit(a_worker(name="low", checkpoint={"grace": "45s"}))
    world.tick(3)
    world.clock.advance_to(world.clock.now_ms() + 300_000)
    first = world.submit(a_worker(gpu="any:2", name="first", priority=10))
    begun_ms = world.clock.now_ms()
    world.tick(1)
    assert world.job(low).phase is Phase.STOPPING
    second = world.submit(a_worker(gpu="any:2", name="second", priority=10))
    third = world.submit(a_worker(gpu="any:2", name="third", priority=10))
    world.clock.advance_to(begun_ms + 5_000)
    world.tick(1)
    for claimant in (first, second):
        found, words = told(world, claimant)
        assert found.after_ms == world.clock.now_ms()
        assert found.before_ms == pytest.approx(begun_ms + 45_000, abs=100)
        assert words == "in at most 40 s, once those who leave have saved"
    assert told(world, third)[1].startswith("nobody can tell: first, second may run for ever")
    world.clock.advance_to(begun_ms + 20_000)
    world.tick(3)
    assert [world.job(each).phase.runs for each in (first, second, third)] == [True, True, False]


def test_one_that_is_held_is_not_promised_anything() -> None:
    world = a_world(nodes=1)
    held = world.submit(a_worker(), held=True)
    world.tick(2)
    assert told(world, held)[1] == "nobody can tell: it is held"
    job = replace(world.job(held), held=False)
    words = f"nobody can tell: more than {AHEAD} jobs of other queues go first"
    assert starting(expected(None, job, 0, POLICY), 0) == words


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Forecast(36_000_000, 36_000_500, ("like",)), "now"),
        (Forecast(36_000_000, 36_030_000, ("leaving",)), "in at most 30 s, once those who leave have saved"),
        (Forecast(36_900_000, 36_930_000, ("limit", "leaving")),
         "by 10:15 UTC (in 16 min), if those before it use up their time limits"),
        (Forecast(36_900_000, 36_900_000, ("progress",)), "about 10:15 UTC (in 15 min)"),
        (Forecast(36_300_000, 37_200_000, ("like", "pace")),
         "between 10:05 and 10:20 UTC (p50/p90; in 5 to 20 min), if all before it go on at the pace of the first"),
        (Forecast(36_300_000, 37_200_000, ("like",)), "between 10:05 and 10:20 UTC (p50/p90; in 5 to 20 min)"),
        (Forecast(36_000_000 + 2 * 86_400_000, 36_000_000 + 3 * 86_400_000, ("like",)),
         "between 10:00 UTC in 2 days and 10:00 UTC in 3 days (p50/p90; in 2 to 3 d)"),
    ],
)  # fmt: skip
def test_words(found: Forecast, words: str) -> None:
    assert starting(found, 36_000_000) == words
