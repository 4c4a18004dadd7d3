"""Defragmentation: who moves, what is spared, and that nobody ever moves unless the gang's start follows."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobsched.core import events as ev
from jobsched.core.job import Phase, Reason
from jobsched.core.observation import Progress
from jobsched.core.passes import Policy
from jobsched.core.policies.defragmentation import Defragmentation
from jobsched.core.resources import JobId
from jobsched.spec.job import JobSpec
from tests.world import World, a_spec

HOW = Defragmentation(every_ms=1_000, rest_ms=1_000, restart_ms=1_000)


def a_world(nodes: int = 2, gpus: int = 4, how: Defragmentation = HOW) -> World:
    world = World(nodes=nodes, gpus=gpus)
    world.boot(Policy(defragmentation=how))
    return world


def gang(gpus: int, replicas: object = 1, scope: str = "job", **fields: object) -> JobSpec:
    worker = {"command": "x", "gpu": f"any:{gpus}", "cpu": "100m", "replicas": replicas, "restart": {"scope": scope}}
    return a_spec(roles={"worker": worker}, heartbeat_timeout=0, checkpoint={"grace": 1}, **fields)


def saves(world: World, *jobs: JobId) -> None:
    for job_id in jobs:
        job = world.job(job_id)
        if job.phase is Phase.RUNNING:
            step = world.clock.now_ms() // 1_000 % 1_000_000
            key = world.key(job_id, "worker", min(r.index for r in job.replicas.values() if r.binding is not None))
            world.engine.tell(key, Progress(step, saved_step=step, saved_path="x"))


def node_of(world: World, job_id: JobId) -> set[str]:
    return {str(r.binding.node) for r in world.job(job_id).replicas.values() if r.binding is not None}


def holes(world: World) -> tuple[JobId, JobId]:
    """Two nodes of four GPUs with one job of two GPUs on each; a gang of four fits nowhere."""
    first = [world.submit(gang(2)) for _ in range(4)]
    world.tick(3)
    for job_id in (first[0], first[2]):
        world.wish(ev.JobCancelRequested(world.clock.now_ms(), job_id, "me"))
    world.tick(4, step_ms=500)
    left = first[1], first[3]
    assert node_of(world, left[0]) != node_of(world, left[1])
    return left


def moved(world: World) -> list[JobId]:
    found = []
    for stored in world.store.read(0):
        event = stored.event
        if isinstance(event, ev.AttemptStopping) and event.outcome.reason is Reason.MOVED:
            assert event.outcome.for_job
            found.append(event.job_id)
        if isinstance(event, ev.ReplicasReleased) and event.reason is Reason.MOVED:
            assert event.for_job
            found.append(event.job_id)
    return found


def test_a_job_that_just_saved_moves_and_the_gang_starts() -> None:
    world = a_world()
    one, two = holes(world)
    saves(world, two)
    world.tick(2)
    big = world.submit(gang(4))
    world.tick(12, step_ms=250)
    assert moved(world) == [two]
    assert {world.job(j).phase for j in (one, two, big)} == {Phase.RUNNING}
    assert node_of(world, one) == node_of(world, two)
    assert world.job(two).failures == 0


def test_without_a_fresh_checkpoint_nobody_moves() -> None:
    world = a_world()
    holes(world)
    big = world.submit(gang(4))
    world.tick(12, step_ms=250)
    assert moved(world) == []
    assert world.job(big).phase is Phase.QUEUED


def test_an_elastic_job_moves_only_the_replicas_that_are_in_the_way() -> None:
    world = a_world(nodes=3)
    spread = world.submit(gang(1, {"min": 1, "max": 6, "prefer": 6}, scope="replica"))
    world.tick(3)
    other, filler = world.submit(gang(2)), world.submit(gang(2))
    world.tick(3)
    assert len(node_of(world, spread)) == 2
    assert node_of(world, other) < node_of(world, spread)
    world.wish(ev.JobCancelRequested(world.clock.now_ms(), other, "me"))
    world.tick(8, step_ms=500)
    big = world.submit(gang(4))
    world.tick(12, step_ms=250)
    assert moved(world) == [spread]
    assert {world.job(j).phase for j in (spread, filler, big)} == {Phase.RUNNING}
    assert world.job(spread).attempt == 1
    assert sum(r.binding is not None for r in world.job(spread).replicas.values()) == 6
    assert node_of(world, spread).isdisjoint(node_of(world, big))


def test_a_move_that_costs_more_than_the_gang_is_worth_is_not_made() -> None:
    world = a_world(how=Defragmentation(every_ms=1_000, rest_ms=1_000, restart_ms=60_000, pays_ms=20_000))
    _, two = holes(world)
    saves(world, two)
    world.tick(2)
    world.submit(gang(4))
    world.tick(12, step_ms=250)
    assert moved(world) == []


def test_higher_priority_does_not_give_way() -> None:
    world = a_world()
    jobs = [world.submit(gang(2, priority=5)) for _ in range(4)]
    world.tick(3)
    for job_id in (jobs[0], jobs[2]):
        world.wish(ev.JobCancelRequested(world.clock.now_ms(), job_id, "me"))
    world.tick(4, step_ms=500)
    saves(world, jobs[1], jobs[3])
    world.tick(2)
    world.submit(gang(4))
    world.tick(12, step_ms=250)
    assert moved(world) == []


sizes = st.sampled_from([(1, 1, "job"), (2, 1, "job"), (1, 3, "job"), (4, 1, "job"), (1, 4, "replica")])


@pytest.mark.timeout(600)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(sizes, min_size=4, max_size=12), st.lists(st.integers(0, 11), max_size=6), st.integers(2, 4))
def test_nobody_moves_unless_the_gang_starts(
    small: list[tuple[int, int, str]], ends: list[int], nodes: int
) -> None:
    world = a_world(nodes=nodes)
    jobs = [
        world.submit(gang(gpus, {"min": 1, "max": 4, "prefer": n} if scope == "replica" else n, scope=scope))
        for gpus, n, scope in small
    ]
    world.tick(3)
    for job_id in dict.fromkeys(jobs[i] for i in ends if i < len(jobs)):
        world.wish(ev.JobCancelRequested(world.clock.now_ms(), job_id, "me"))
    world.tick(4, step_ms=500)
    saves(world, *jobs)
    world.tick(1)
    bigs = [world.submit(gang(4)), world.submit(gang(2, 3))]
    world.tick(24, step_ms=250)
    for job_id in moved(world):
        whom = {
            e.outcome.for_job if isinstance(e, ev.AttemptStopping) else e.for_job
            for e in world.events(job_id)
            if (isinstance(e, ev.AttemptStopping) and e.outcome.reason is Reason.MOVED)
            or (isinstance(e, ev.ReplicasReleased) and e.reason is Reason.MOVED)
        }
        for gang_id in whom:
            assert world.events(gang_id, ev.AttemptPlaced), f"{job_id} moved for {gang_id}, which did not start"
        assert world.job(job_id).phase is Phase.RUNNING, "who moves finds a place"
    assert len(bigs) == 2
