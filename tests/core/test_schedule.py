"""What one pass decides about a job goes together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.heads import worth_a_try
from jobsched.core.job import Outcome, Phase, Reason
from jobsched.core.lines import Line
from jobsched.core.passes import Pass, Policy
from jobsched.core.plan import Reservation
from jobsched.core.policies.backfill import Backfill
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.ordering import learned
from jobsched.core.policies.preemption import Replan
from jobsched.core.policies.victims import Preemption
from jobsched.core.rehearsal import picture_of
from jobsched.core.resources import JobId
from jobsched.core.schedule import schedule
from jobsched.sim.backend import Script
from jobsched.spec.job import JobSpec
from tests.world import World, a_gpu_node, a_spec


@pytest.mark.parametrize("policy", [
    Policy(fair=FairShare(), preemption=Preemption(min_runtime_ms=0)), Policy(replan=Replan(learned)),
])  # fmt: skip
def test_a_job_that_has_to_leave_does_not_grow_in_the_same_pass(policy: Policy) -> None:
    """It could: what became free elsewhere is too little for whom it leaves. Stop and growth together are illegal, so
    that the store would refuse both, again and again."""

    def spec(replicas: object, gpu: str, **more: object) -> JobSpec:
        worker = {"command": "w", "gpu": gpu, "cpu": "100m", "replicas": replicas, "restart": {"scope": "replica"}}
        return a_spec(roles={"worker": worker}, **more)

    world = World(1, 4, lambda launch: Script(run_ms=3_600_000))
    world.boot(policy)
    world.tick(2)
    world.submit(spec(1, "any:2"))
    world.tick(3)
    world.engine.put_node(a_gpu_node("other", 2))
    world.tick(2)
    ends = world.submit(spec(1, "any:2", placement={"avoid": ["n1"]}))
    world.tick(3)
    elastic = world.submit(spec("1..4", "any:1"))
    world.tick(3)
    assert [r.binding.node for r in world.job(elastic).replicas.values() if r.binding] == ["n1", "n1"]
    now_ms = world.clock.now_ms()
    twin = picture_of(world.cluster).cluster()
    twin.evolve(ev.AttemptStopping(now_ms, ends, 1, Outcome(Phase.SUCCEEDED, Reason.COMPLETED)))
    twin.evolve(ev.AttemptEnded(now_ms, ends, 1, Phase.SUCCEEDED))
    urgent = spec(1, "any:4", priority=9)
    twin.evolve(ev.JobSubmitted(now_ms, JobId("urgent"), "urgent", "me", urgent))
    about = [type(d) for d in schedule(twin, now_ms, policy).decisions if d.job_id == elastic]
    assert about == [ev.AttemptStopping]


def test_whom_a_reservation_hindered_is_tried_again_once_it_is_taken_back() -> None:
    """On a cluster where nothing runs any more, nothing else would ever wake them."""
    policy = Policy(fair=FairShare(), backfill=Backfill())
    world = World(1, 1, lambda launch: Script(run_ms=3_600_000))
    world.boot(policy)
    world.submit()
    waits = [world.submit(a_spec(priority=priority)) for priority in (0, 1)]
    world.tick(3)
    cluster, (hindered, promised) = world.cluster, (world.job(job_id) for job_id in waits)
    cluster.reservations[promised.id] = Reservation(promised.id, 1, (), (0, 0, 0, ""), queue="default")
    line = cluster.line_of(hindered.id)
    assert line is not None
    line.blocked_at, line.hindered_at = line.stock.freed, cluster.claims_made
    assert line not in worth_a_try(cluster, policy)
    run = Pass(cluster, world.clock.now_ms(), policy)
    run.reserved(promised, None)
    assert line in worth_a_try(cluster, policy)
    assert run.eased, "another pass comes at once"


def test_a_reservation_that_is_due_is_not_put_off_by_the_time_that_passes() -> None:
    """Its job fits once somebody has saved and left; until then there would be pass after pass, at once."""
    world = World(1, 1, lambda launch: Script(run_ms=3_600_000))
    world.boot(Policy(backfill=Backfill()))
    promised = world.job(world.submit())
    world.tick()
    cluster = world.cluster
    due = cluster.reservations[promised.id] = Reservation(promised.id, 10, (), (0, 0, 0, ""))
    run = Pass(cluster, 20, world.policy)
    for soon_ms in (20, 21):  # who should have ended is expected to end at any moment
        run.reserved(promised, replace(due, at_ms=soon_ms))
        assert not run.eased
    run.reserved(promised, replace(due, at_ms=60_000))
    assert run.eased


def test_a_pass_looks_at_no_line_when_nothing_came_free_and_nobody_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after a pass in vain nor once the starts that it decided are folded; a newcomer is looked at again."""
    looks: list[int] = []

    def counted(cluster: Cluster, policy: Policy) -> list[Line]:
        looks.append(len(cluster.lines))
        return worth_a_try(cluster, policy)

    monkeypatch.setattr("jobsched.core.schedule.worth_a_try", counted)
    world = World(1, 2, lambda launch: Script(run_ms=3_600_000))
    world.boot(Policy(fair=FairShare()))
    world.submit()
    world.submit(a_spec(roles={"worker": {"command": "w", "gpu": "any:2"}}))
    world.tick(1)
    looks.clear()
    world.tick(5)  # the first one is seen to run
    assert world.cluster.lines.waiting == 1
    assert not looks
    world.submit()
    world.tick(1)
    assert looks
