"""What would let a job start sooner, tried on the cluster as it is."""

from __future__ import annotations

from dataclasses import replace

from jobsched.core.alternatives import sooner
from jobsched.core.job import Phase
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec
from tests.world import World, a_gpu_node, a_spec


def a_worker(gpu: str, replicas: int = 1, **fields: object) -> JobSpec:
    return a_spec(roles={"worker": {"command": "x", "cpu": 1, "gpu": gpu, "replicas": replicas}}, **fields)


def ways(world: World, spec: JobSpec) -> tuple[str, ...]:
    job_id = world.submit(spec)
    world.tick(3)
    job = world.job(job_id)
    assert job.phase is Phase.QUEUED
    found = sooner(world.cluster, job, world.clock.now_ms())
    world.tick()
    assert world.job(job_id) == job
    return found


def test_a_smaller_gang_and_smaller_replicas() -> None:
    world = World(nodes=2, gpus=4)
    world.submit(a_worker("any:2"))
    world.submit(a_worker("any:1"))
    world.tick(2)
    assert ways(world, a_worker("any:1", 8)) == ("5 instead of 8 worker replicas (5 GPUs): now",)
    world = World(nodes=2, gpus=4)
    for _ in range(2):
        world.submit(a_worker("any:3"))
    world.tick(2)
    assert ways(world, a_worker("any:2")) == ("1 instead of 2 GPUs: now", "2 × 1 GPU instead of 1 × 2: now")


def test_another_kind_of_gpu() -> None:
    world = World(nodes=1, gpus=2)
    world.engine.put_node(a_gpu_node("h", 1, kind="h100-80gb"))
    world.submit(a_worker("h100:1"))
    world.tick(2)
    assert ways(world, a_worker("h100:1")) == ("sim-gpu instead of h100: now",)


def test_another_queue() -> None:
    world = World(nodes=1, gpus=4, queues=(QueueSpec(), QueueSpec(name="small", max_gpus=1)))
    world.submit(a_worker("any:1", queue="small"))
    world.tick(2)
    assert ways(world, a_worker("any:1", queue="small")) == ("queue default instead of small: now",)


def test_not_in_one_domain() -> None:
    world = World(nodes=2, gpus=4)
    for rack, (_, node) in enumerate(sorted(world.engine.nodes().items())):
        world.engine.put_node(replace(node, labels=(("rack", f"r{rack}"),)))
    for _ in range(2):
        world.submit(a_worker("any:3"))
    world.tick(2)
    assert ways(world, a_worker("any:1", 2, placement={"within": "rack"})) == (
        "not all within one rack: now", "1 instead of 2 worker replicas (1 GPU): now",
    )  # fmt: skip


def test_nothing_helps_when_everything_is_taken() -> None:
    world = World(nodes=1, gpus=1)
    world.submit(a_worker("any:1"))
    world.tick(2)
    assert ways(world, a_worker("any:1")) == ()
