from __future__ import annotations

from dataclasses import replace

from jobsched.core import explain
from jobsched.core.job import Phase, Reason
from jobsched.core.resources import GpuShare
from jobsched.spec.queue import QueueSpec
from tests.world import World, a_gpu_node, a_spec


def reasons(world: World, job_id: str) -> dict[Reason, str]:
    found = explain.verdict(world.cluster, world.job(job_id), world.clock.now_ms())  # type: ignore[arg-type]
    return {why.reason: why.message for why in found.reasons}


def test_a_gang_that_is_short_of_gpus_is_told_how_short() -> None:
    world = World(nodes=2, gpus=4)
    for _ in range(5):
        world.submit()
    gang = world.submit(a_spec(roles={"worker": {"command": "x", "gpu": "any:2", "replicas": 3}}))
    world.tick(3)
    found = explain.verdict(world.cluster, world.job(gang), world.clock.now_ms())
    assert found.position == 1
    assert (
        "needs 3 × (2 any GPU, 1 CPU); 3 of 8 matching GPUs are free, at most 3 on one node" in found.reasons[0].message
    )
    assert found.nearest_fit == "1 of 3 worker replicas fit now"


def test_every_reason_has_its_numbers() -> None:
    world = World(
        nodes=1, gpus=2, queues=(QueueSpec(), QueueSpec(name="small", max_gpus=1), QueueSpec(name="off", paused=True))
    )
    world.submit(a_spec(queue="small"))
    quota = world.submit(a_spec(queue="small"))
    paused = world.submit(a_spec(queue="off"))
    held = world.submit(held=True)
    never = world.submit(a_spec(roles={"worker": {"command": "x", "gpu": "any:4"}}))
    kind = world.submit(a_spec(roles={"worker": {"command": "x", "gpu": "h100:1"}}))
    world.tick(3)
    full = "needs 1 GPU; queue small holds 1 of its 1 and may take no more now"
    assert reasons(world, quota) == {Reason.QUOTA_QUEUE: full}
    assert reasons(world, paused) == {Reason.QUEUE_PAUSED: "queue off is paused"}
    assert Reason.HELD in reasons(world, held)
    assert reasons(world, never)[Reason.UNPLACEABLE] == (
        "no node can ever hold role 'worker': it needs 4 GPUs, the biggest node has 2"
    )
    assert "no node has a GPU of kind h100 for role" in reasons(world, kind)[Reason.UNPLACEABLE]


def test_jobs_ahead_are_counted_by_priority_and_age() -> None:
    world = World(nodes=1, gpus=1)
    world.submit()
    world.tick(2)
    ids = [world.submit(a_spec(priority=p)) for p in (0, 5, 0)]
    world.tick(2)
    places = [explain.verdict(world.cluster, world.job(i), world.clock.now_ms()).position for i in ids]
    assert places == [2, 1, 3]
    assert "2 waiting jobs of queue default before it" in reasons(world, ids[2])[Reason.PRIORITY]


def test_what_others_use_or_is_broken_now_does_not_mean_never() -> None:
    world = World(nodes=1, gpus=2)
    node = a_gpu_node("n1", 2)
    world.engine.put_node(replace(
        node, gpus=(replace(node.gpus[0], healthy=False), node.gpus[1]), foreign_gpus=(GpuShare(node.gpus[1].id),)
    ))  # fmt: skip
    waits = world.submit(a_spec(roles={"worker": {"command": "x", "gpu": "any:2"}}))
    world.tick(3)
    assert explain.could_ever_fit(world.cluster, world.job(waits).spec) == ""
    assert list(reasons(world, waits)) == [Reason.RESOURCES]


def test_an_elastic_job_that_does_with_fewer_waits_for_nobody() -> None:
    world = World(nodes=1, gpus=3)
    worker = {"command": "x", "gpu": "any:1", "replicas": {"min": 2, "max": 4}, "restart": {"scope": "replica"}}
    job = world.run_to_phase(world.submit(a_spec(roles={"worker": worker})), Phase.RUNNING)
    assert explain.headline(job) == "runs with 3 of 4 worker replicas"
