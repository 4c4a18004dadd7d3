"""Plans: the real passes on a copy, with nothing changed."""

from __future__ import annotations

from jobsched.controller.loop import Controller
from jobsched.core import invariants
from jobsched.core.answers import PlanAnswer, PlanVictim, QuotaAfter
from jobsched.core.cluster import Cluster
from jobsched.core.job import Phase
from jobsched.core.passes import Policy
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.victims import Preemption
from jobsched.core.rehearsal import picture_of, plan
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec
from tests.world import World, a_ps_spec, a_spec

POLICY = Policy(fair=FairShare(), preemption=Preemption(min_runtime_ms=0))


def a_worker(gpu: str = "any:1", replicas: object = 1, **fields: object) -> JobSpec:
    return a_spec(roles={"worker": {"command": "x", "cpu": 1, "gpu": gpu, "replicas": replicas}}, **fields)


def planned(world: World, spec: JobSpec, policy: Policy = POLICY) -> PlanAnswer:
    """The answer; the live cluster is as it was."""
    before = fingerprint(world.cluster)
    answer = plan(picture_of(world.cluster).cluster(), spec, "me", world.clock.now_ms(), policy)
    assert fingerprint(world.cluster) == before
    assert invariants.check(world.cluster) == ()
    return answer


def fingerprint(cluster: Cluster) -> object:
    spaces = {name: (dict(s.gpu_free), s.cpu_milli) for name, s in cluster.ledger.spaces.items()}
    return dict(cluster.jobs), spaces, {key: list(line.places) for key, line in cluster.lines.items()}


def a_world(**fields: object) -> World:
    world = World(**fields)  # type: ignore[arg-type]
    world.controller = Controller(world.store, world.backend, world.clock, POLICY, queues=world.queues)
    return world


def test_where_it_would_run_now() -> None:
    world = a_world(nodes=2)
    world.submit()
    world.tick(3)
    answer = planned(world, a_ps_spec())
    assert answer.code == 0
    assert {(r.role, r.replicas, r.where) for r in answer.roles} == {("worker", 3, ("n1",)), ("ps", 2, ("n1",))}
    assert answer.victims == ()


def test_what_must_wait_and_what_never_starts() -> None:
    world = a_world(nodes=2)
    for _ in range(2):
        world.submit(a_worker("any:8"))
    world.tick(3)
    waits = planned(world, a_worker("any:8"))
    assert (waits.code, waits.roles) == (10, ())
    assert waits.verdict is not None
    assert "0 of 16 matching GPUs are free" in waits.verdict.reasons[0].message
    assert planned(world, a_worker("any:9")).code == 8


def test_who_would_stop_for_it_and_what_that_costs() -> None:
    world = a_world(nodes=1, gpus=4)
    low = world.submit(a_worker("any:4", name="low", checkpoint={"grace": 0}))
    world.run_to_phase(low, Phase.RUNNING)
    world.clock.advance_to(world.clock.now_ms() + 100_000)
    answer = planned(world, a_worker("any:2", priority=10))
    assert answer.code == 10
    (victim,) = answer.victims
    assert (victim.job_id, victim.how) == (low, "stops")
    assert 400 <= victim.unsaved_gpu_s < 410
    assert [(r.role, r.replicas) for r in answer.roles] == [("worker", 1)]
    assert planned(world, a_worker("any:2")).victims == ()


def test_who_would_shrink_by_starting_anew_and_by_how_many() -> None:
    world = a_world(nodes=1, gpus=4)
    role = {"command": "x", "cpu": 1, "gpu": "any:1", "replicas": {"min": 1, "max": 4, "prefer": 4}}
    job_id = world.submit(a_spec(name="shrinks", roles={"worker": role}, restart={"scope": "job"}))
    world.run_to_phase(job_id, Phase.RUNNING)
    world.tick(50, step_ms=2_000)
    before = picture_of(world.cluster)
    answer = planned(world, a_worker("any:2", priority=5))
    (victim,) = answer.victims
    assert (victim.job_id, victim.how) == (job_id, "shrinks from 4 to 2 replicas, by a new attempt")
    assert victim.unsaved_gpu_s > 0
    assert picture_of(world.cluster) == before


def test_who_would_shrink_and_what_its_queue_then_holds() -> None:
    queues = tuple(QueueSpec(name=name, cohort="all", quota={"gpus": 2}) for name in "ab")
    world = a_world(nodes=1, gpus=4, queues=queues)
    role = {"command": "x", "cpu": 1, "gpu": "any:1", "replicas": {"min": 2, "max": 4, "prefer": 4},
            "restart": {"scope": "replica"}}  # fmt: skip
    job_id = world.submit(a_spec(name="grows", queue="a", roles={"worker": role}))
    world.run_to_phase(job_id, Phase.RUNNING)
    answer = planned(world, a_worker("any:2", queue="b"))
    assert answer.victims == (PlanVictim(job_id, "grows", "shrinks by 2", 0.0),)
    assert answer.quota == (QuotaAfter("b", "gpus", 2.0, 2.0, 0.0),)
