from __future__ import annotations

from dataclasses import replace

from jobsched.core import events as ev
from jobsched.core import explain
from jobsched.core.job import Phase, Reason
from jobsched.core.passes import Policy
from jobsched.core.policies.ordering import Factors, expected_service, learned
from jobsched.core.policies.preemption import Replan
from jobsched.core.resources import GpuShare, NodeName
from jobsched.spec.queue import Budget, QueueSpec
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


def test_only_nodes_that_the_job_may_use_count() -> None:
    """GPUs behind a taint, or without the label that was asked for, are not free for it."""
    world = World(nodes=3, gpus=4)
    for number, (_, node) in enumerate(sorted(world.engine.nodes().items())):
        labels, taints = (("rack", f"r{min(number, 1)}"),), ("mig",) if number == 2 else ()
        world.engine.put_node(replace(node, labels=labels, taints=taints))
    for gpu in ("any:3", "any:2"):
        roles = {"worker": {"command": "x", "gpu": gpu}}
        waits = world.submit(a_spec(roles=roles, placement={"nodes": {"rack": "r0"}}))
        world.tick(3)
    assert reasons(world, waits)[Reason.RESOURCES] == (
        "role worker needs 1 × (2 any GPU, 1 CPU); 1 of 4 matching GPUs are free, at most 1 on one node "
        "(not on 2 nodes without label rack=r0)"
    )

    def never(gpu: str, replicas: int = 1, **placement: object) -> str:
        roles = {"worker": {"command": "x", "gpu": gpu, "replicas": replicas}}
        return explain.could_ever_fit(world.cluster, a_spec(roles=roles, placement=placement))

    assert never("any:4", 3) == (
        "the whole cluster, empty, holds 2 of 3 of role 'worker' at (4 any GPU, 1 CPU) each "
        "(not on 1 node with taint mig)"
    )
    assert never("any:4", 3, tolerate=["mig"]) == ""
    assert never("any:1", 5, within="node") == (
        "the whole cluster, empty, cannot hold 5 of role 'worker' at (1 any GPU, 1 CPU) each "
        "(not on 1 node with taint mig), all within one node"
    )
    assert "each on another node" in never("any:1", 4, spread="node", tolerate=["mig"])
    assert "not on 3 nodes without label rack=r7" in never("any:1", nodes={"rack": "r7"})


def test_cordoned_nodes_are_named_when_they_are_all_there_is() -> None:
    world = World(nodes=2, gpus=2)
    world.tick(2)
    world.store.append([ev.NodeCordoned(0, NodeName(name), "ops") for name in ("n1", "n2")])
    waits = world.submit()
    world.tick(2)
    (why,) = explain.verdict(world.cluster, world.job(waits), world.clock.now_ms()).reasons
    assert why.reason is Reason.NODE_CORDONED
    assert "0 of 4 matching GPUs are free, at most 0 on one node (2 nodes cordoned)" in why.message
    assert why.fix == "jobsched node uncordon n1"


def test_a_budget_of_nothing_is_never() -> None:
    world = World(nodes=1, gpus=2, queues=(QueueSpec(), QueueSpec(name="poor", budget=Budget(gpu_hours=0))))
    world.tick(2)
    never = explain.could_ever_fit(world.cluster, a_spec(queue="poor"))
    assert never == "the job needs 1 GPU, queue poor may hold 0 GPUs"


def test_jobs_ahead_are_counted_by_priority_and_age() -> None:
    world = World(nodes=1, gpus=1)
    world.submit()
    world.tick(2)
    ids = [world.submit(a_spec(priority=p)) for p in (0, 5, 0)]
    world.tick(2)
    places = [explain.verdict(world.cluster, world.job(i), world.clock.now_ms()).position for i in ids]
    assert places == [2, 1, 3]
    assert "2 waiting jobs of queue default before it" in reasons(world, ids[2])[Reason.PRIORITY]


def test_the_place_in_line_is_that_of_the_order_in_use() -> None:
    """By service, a job that is expected to be over sooner goes first although it came later; by weighted factors, a
    job that waits long enough goes before a higher priority; where all are weighed anew, there is no line."""
    world = World(nodes=1, gpus=1)
    by_service = Policy(rank=expected_service)
    by_age = Policy(factors=Factors(priority=1, age=1_000, age_full_ms=60_000))
    world.boot(by_service)
    world.submit()
    world.tick(2)
    long, short = (world.submit(a_spec(time_limit=limit)) for limit in ("2h", "5m"))
    world.tick(2)
    world.clock.advance_to(world.clock.now_ms() + 60_000)
    urgent = world.submit(a_spec(time_limit="2h", priority=5))
    world.tick(2)
    now_ms = world.clock.now_ms()

    def places(policy: Policy) -> list[int]:
        order = policy.order(world.cluster, now_ms)
        jobs = [world.job(job_id) for job_id in (long, short, urgent)]
        return [explain.verdict(world.cluster, job, now_ms, order).position for job in jobs]

    assert places(by_service) == [3, 2, 1]
    assert places(by_age) == [2, 1, 3]
    assert places(Policy(replan=Replan(learned))) == [0, 0, 0]


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
