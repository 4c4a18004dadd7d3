"""Trust in nodes: different jobs' failures cost it, a check wins it back."""

from __future__ import annotations

from itertools import pairwise

import pytest

from jobsched.core import events as ev
from jobsched.core.job import Phase
from jobsched.core.launch import Launch
from jobsched.core.passes import Policy
from jobsched.core.policies.health import Health
from jobsched.core.resources import NodeName
from jobsched.core.suspicion import BY
from jobsched.sim.backend import Script
from jobsched.spec.job import JobSpec
from tests.world import World, a_spec

HEALTH = Health(threshold=1.9, half_life_ms=3_600_000, recheck_ms=600_000)
BAD = NodeName("n1")


def a_worker(**role: object) -> JobSpec:
    given = {"command": "x", "cpu": 1, "gpu": "any:1", "restart": {"max": 0}, **role}
    return a_spec(roles={"worker": given})


class Sick:
    """Node n1, or one GPU of it, kills what runs there; checks end with `check`."""

    def __init__(self, gpu: str = "", check: int = 0) -> None:
        self.gpu, self.check = gpu, check

    def __call__(self, launch: Launch) -> Script:
        if launch.job_name.startswith("preflight"):
            return Script(run_ms=5_000, exit_code=self.check)
        broken = launch.node == BAD and (not self.gpu or any(s.gpu == self.gpu for s in launch.gpus))
        return Script(run_ms=1_000, exit_code=139) if broken else Script(run_ms=10_000)


def a_world(sick: Sick, nodes: int = 2, gpus: int = 2, health: Health = HEALTH) -> World:
    world = World(nodes=nodes, gpus=gpus, scripts=sick)
    world.controller = world.boot(Policy(health=health))
    return world


def run(world: World, *specs: JobSpec) -> list[Phase]:
    ids = [world.submit(spec) for spec in specs]
    world.run_until(lambda: all(world.job(i).phase.terminal for i in ids))
    return [world.job(i).phase for i in ids]


def checks(world: World) -> list[Phase]:
    mine = [s.event.job_id for s in world.store.read(0) if isinstance(s.event, ev.JobSubmitted) and s.event.owner == BY]
    return [world.job(i).phase for i in mine]


def test_different_jobs_failures_put_a_node_on_probation_until_its_check_passes() -> None:
    sick = Sick()
    world = a_world(sick)
    assert run(world, *[a_worker()] * 6).count(Phase.FAILED) == 4
    cordons = [s.event for s in world.store.read(0) if isinstance(s.event, ev.NodeCordoned)]
    assert [(c.node, c.by) for c in cordons] == [(BAD, BY)]
    assert cordons[0].why.startswith("4 failures: j00001 (ExitCode)")
    world.run_until(lambda: BAD not in world.cluster.fleet.cordoned)
    assert checks(world) == [Phase.SUCCEEDED]
    sick.gpu = "none"
    assert run(world, *[a_worker()] * 4) == [Phase.SUCCEEDED] * 4
    assert world.cluster.fleet.suspicions == {}


def test_nothing_new_runs_there_meanwhile_and_a_failed_check_is_repeated_ever_more_seldom() -> None:
    sick = Sick(check=1)
    world = a_world(sick)
    run(world, *[a_worker()] * 8)
    assert run(world, *[a_worker()] * 6) == [Phase.SUCCEEDED] * 6
    world.run_until(lambda: len(checks(world)) == 3 and checks(world)[-1] is Phase.FAILED)
    begun = [s.event.at_ms for s in world.store.read(0) if isinstance(s.event, ev.JobSubmitted) and s.event.owner == BY]
    waits = [later - before for before, later in pairwise(begun)]
    assert waits[0] == pytest.approx(600_000, rel=0.05)
    assert waits[1] == pytest.approx(1_200_000, rel=0.05)
    sick.check = 0
    world.run_until(lambda: BAD not in world.cluster.fleet.cordoned, limit_ms=24 * 3_600_000)


def test_one_job_that_fails_again_and_again_says_nothing_about_its_node() -> None:
    world = a_world(Sick(), nodes=1)
    run(world, a_worker(restart={"max": 8, "retry_on": [139], "backoff": "1s"}))
    assert world.cluster.fleet.suspicions[BAD].score(world.clock.now_ms(), HEALTH.half_life_ms) < 1
    assert not world.cluster.fleet.cordoned


def test_only_the_gpu_that_was_there_each_time_is_doubted() -> None:
    world = a_world(Sick(gpu="n1-g1", check=1), nodes=1, gpus=4, health=Health(threshold=1.4))
    for _ in range(3):
        run(world, *[a_worker()] * 4)
    assert world.cluster.fleet.cordoned[BAD].gpus == ("n1-g1",)
    assert "n1-g1 of node n1 is on probation" in world.cluster.fleet.cordoned[BAD].why
    assert run(world, *[a_worker()] * 3) == [Phase.SUCCEEDED] * 3
    waits = world.submit(a_worker(gpu="any:4"))
    world.tick(3)
    assert world.job(waits).phase is Phase.QUEUED
    world.wish(ev.NodeUncordoned(world.clock.now_ms(), BAD, "ann"))
    world.tick(3)
    assert world.job(waits).phase is not Phase.QUEUED


def test_without_a_check_trust_returns_with_time() -> None:
    world = a_world(Sick(), health=Health(threshold=1.5, half_life_ms=60_000, preflight=()))
    run(world, *[a_worker()] * 6)
    assert BAD in world.cluster.fleet.cordoned
    world.run_until(lambda: BAD not in world.cluster.fleet.cordoned)
    assert checks(world) == []


def test_a_server_that_starts_anew_keeps_the_probation_and_sees_to_the_check() -> None:
    sick = Sick(check=1)
    world = a_world(sick)
    run(world, *[a_worker()] * 8)
    world.run_until(lambda: bool(checks(world)) and checks(world)[-1] is Phase.FAILED)
    sick.check = 0
    world.controller = world.boot(Policy(health=HEALTH))
    world.tick(2)
    assert world.cluster.fleet.cordoned[BAD].by == BY
    world.run_until(lambda: BAD not in world.cluster.fleet.cordoned)


def test_a_node_that_comes_and_goes_is_doubted() -> None:
    world = a_world(Sick(gpu="none"), health=Health(threshold=2.5))
    node = world.engine.nodes()[BAD]
    for _ in range(3):
        world.tick(2)
        world.engine.lose_node(BAD)
        world.tick(2)
        world.engine.put_node(node)
    world.tick(3)
    assert world.cluster.fleet.cordoned[BAD].why.startswith("3 failures: ")
