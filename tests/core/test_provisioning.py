"""Nodes on demand: asked for whole, cheapest first, the next pool when one is late, let go when idle."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from jobsched.core import events as ev
from jobsched.core.explain import could_ever_fit, verdict
from jobsched.core.job import Phase, Reason
from jobsched.core.launch import Launch
from jobsched.core.passes import Policy
from jobsched.core.policies.health import Health
from jobsched.core.policies.provisioning import nodes_for
from jobsched.core.pools import BY, NodePool
from jobsched.core.resources import JobId
from jobsched.core.shape import shape_of
from jobsched.sim.backend import FOREVER_MS, Script
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec
from tests.world import GIB, World, a_spec

NEVER: Mapping[str, int] = {}


def a_pool(name: str = "a100", **fields: object) -> NodePool:
    given: dict[str, object] = {
        "cpu_milli": 32_000, "memory_bytes": 128 * GIB, "gpu_kind": "a100-40gb", "gpus": 4,
        "gpu_memory_bytes": 40 * GIB, "labels": (("pool", name),), "max": 4, "price": 1_000, "delay_ms": 60_000,
        "idle_ms": 120_000, **fields,
    }  # fmt: skip
    return NodePool(name, **given)  # type: ignore[arg-type]


def a_gang(workers: int = 8, kind: str = "a100", **fields: object) -> JobSpec:
    worker = {"command": "x", "cpu": 1, "replicas": workers, "gpu": f"{kind}:1"}
    return a_spec(roles={"worker": worker}, **fields)


def a_world(
    *pools: NodePool, nodes: int = 0, run_ms: int = 10_000, takes_ms: Mapping[str, int] = NEVER,
    queues: tuple[QueueSpec, ...] = (QueueSpec(),),
) -> World:  # fmt: skip
    def script(launch: Launch) -> Script:
        return Script(run_ms=run_ms)

    world = World(nodes=nodes, scripts=script, queues=queues,
                  takes_ms=lambda pool: takes_ms.get(pool.name, pool.delay_ms))
    world.controller = world.boot(Policy(node_pools=pools, health=Health()))
    return world


def asked(world: World, job_id: JobId) -> list[tuple[str, int]]:
    found = world.events(job_id, ev.CapacityRequested)
    return [(e.pool, e.nodes) for e in found if isinstance(e, ev.CapacityRequested)]


def test_a_gang_asks_once_and_whole_starts_when_all_is_there_and_the_nodes_go_when_idle() -> None:
    world = a_world(a_pool())
    job_id = world.submit(a_gang())
    world.tick()
    (demand,) = world.engine.demands
    assert (demand.nodes, demand.release) == (2, ())
    job = world.job(job_id)
    (first, *_) = verdict(world.cluster, job, world.clock.now_ms()).reasons
    assert first.reason is Reason.PROVISIONING
    assert first.message.startswith("waiting for 2 nodes of pool a100, asked ")
    world.run_to_phase(job_id, Phase.RUNNING)
    assert world.job(job_id).asked is None
    world.run_to_phase(job_id, Phase.SUCCEEDED)
    ended = world.clock.now_ms()
    assert asked(world, job_id) == [("a100", 2)]
    world.run_until(lambda: not world.engine.nodes())
    assert world.clock.now_ms() - ended >= 120_000
    world.run_until(lambda: not world.cluster.fleet.cordoned)
    assert world.cluster.fleet.suspicions == {}, "a node that was let go did nothing wrong"


def test_nothing_is_asked_for_what_fits_or_is_over_its_quota_or_never_fits() -> None:
    world = a_world(a_pool(), nodes=1, run_ms=FOREVER_MS, queues=(QueueSpec(max_gpus=8),))
    world.submit(a_gang(8, "any"))
    over = world.submit(a_gang(4))
    world.tick(3)
    assert asked(world, over) == []
    assert world.engine.demands[0].nodes == 0
    assert could_ever_fit(world.cluster, a_gang(8)) == ""
    assert "no node has a GPU of kind h100" in could_ever_fit(world.cluster, a_gang(1, "h100"))


def test_the_cheapest_pool_for_the_whole_gang_is_asked_and_a_late_one_falls_back_to_the_next() -> None:
    spot = a_pool("spot", price=300)
    steady = a_pool("steady", price=900)
    dear = a_pool("dear", price=5_000)
    world = a_world(dear, steady, spot, takes_ms={"spot": FOREVER_MS})
    job_id = world.submit(a_gang())
    world.run_to_phase(job_id, Phase.RUNNING)
    assert asked(world, job_id) == [("spot", 2), ("steady", 2)]
    (withdrawn,) = world.events(job_id, ev.CapacityWithdrawn)
    assert isinstance(withdrawn, ev.CapacityWithdrawn)
    assert withdrawn.late
    assert "did not deliver" in withdrawn.message
    assert {d.pool.name: d.nodes for d in world.engine.demands} == {"dear": 0, "steady": 2, "spot": 0}
    other = world.submit(a_gang())
    world.run_to_phase(other, Phase.RUNNING)
    assert asked(world, other)[0] == ("steady", 2), "the late pool is left alone for a while"


def test_the_price_counts_for_all_nodes_that_the_gang_takes() -> None:
    small = a_pool("small", gpus=1, price=400, max=16)
    world = a_world(small, a_pool("big", gpus=8, price=1_000))
    job_id = world.submit(a_gang())
    world.tick()
    assert asked(world, job_id) == [("big", 1)]


def test_pools_grow_to_their_maximum_and_no_further() -> None:
    world = a_world(a_pool(max=3), run_ms=100_000)
    jobs = [world.submit(a_gang(4)) for _ in range(5)]
    world.tick(5)
    assert [len(asked(world, job_id)) for job_id in jobs] == [1, 1, 1, 0, 0]
    assert world.engine.demands[0].nodes == 3
    world.run_until(lambda: all(world.job(j).phase is Phase.SUCCEEDED for j in jobs))
    assert len(set(world.cluster.fleet.nodes)) == 3


def test_a_pool_keeps_its_minimum_and_nodes_that_run_something() -> None:
    world = a_world(a_pool(min=1, idle_ms=1_000), run_ms=600_000)
    world.tick()
    assert world.engine.demands[0].nodes == 1
    job_id = world.submit(a_gang(8))
    world.run_to_phase(job_id, Phase.RUNNING)
    assert world.job(job_id).first_placed_at_ms
    world.tick(100, step_ms=1_000)
    assert len(world.engine.nodes()) == 2, "never under a running job"
    world.run_to_phase(job_id, Phase.SUCCEEDED)
    world.run_until(lambda: len(world.engine.nodes()) == 1)
    world.tick(100, step_ms=1_000)
    assert len(world.engine.nodes()) == 1


def test_a_new_server_goes_on_waiting_for_what_the_old_one_asked() -> None:
    pool = a_pool()
    world = a_world(pool)
    job_id = world.submit(a_gang())
    world.tick(3)
    world.controller = world.boot(Policy(node_pools=(pool,)))
    world.engine.demands = ()
    world.tick(3)
    assert [d.nodes for d in world.engine.demands] == [2]
    assert asked(world, job_id) == [("a100", 2)]
    world.run_to_phase(job_id, Phase.RUNNING)


@pytest.mark.parametrize("wish", [ev.JobHeld, ev.JobCancelRequested])
def test_a_job_that_does_not_wait_any_more_takes_its_wish_back(wish: type) -> None:
    world = a_world(a_pool())
    job_id = world.submit(a_gang())
    world.tick(3)
    world.wish(wish(world.clock.now_ms(), job_id, "me"))
    world.tick(3)
    assert world.cluster.asking == {}
    assert [d.nodes for d in world.engine.demands] == [0]


def test_nodes_that_nobody_takes_away_are_used_again() -> None:
    """An autoscaler may have a minimum of its own."""
    world = a_world(a_pool(idle_ms=1_000, delay_ms=5_000))
    world.run_to_phase(world.submit(a_gang(4)), Phase.SUCCEEDED)
    world.engine.keeps = True
    world.run_until(lambda: any(c.by == BY for c in world.cluster.fleet.cordoned.values()))
    (node,) = world.engine.nodes()
    world.tick(100, step_ms=1_000)
    again = world.submit(a_gang(4))
    world.run_to_phase(again, Phase.SUCCEEDED)
    assert asked(world, again) == []
    assert list(world.engine.nodes()) == [node]


@pytest.mark.parametrize(("workers", "nodes"), [(1, 1), (4, 1), (5, 2), (16, 4), (17, 0)])
def test_as_few_nodes_as_the_gang_needs(workers: int, nodes: int) -> None:
    assert nodes_for(shape_of(a_gang(workers)), a_pool()) == nodes
