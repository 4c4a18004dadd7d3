"""Edits of jobs: what is applied in place, and what takes a new attempt."""

from __future__ import annotations

from jobsched.core import events as ev
from jobsched.core.edit import compare
from jobsched.core.job import Phase, Reason
from jobsched.core.resources import JobId
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec
from tests.world import World, a_spec

ELASTIC = {"worker": {"command": "true", "gpu": "any:1", "replicas": "1..4", "restart": {"scope": "replica"}}}


def scaled(spec: JobSpec, prefer: int) -> JobSpec:
    role = spec.roles["worker"]
    replicas = role.replicas.model_copy(update={"prefer": prefer})
    return spec.model_copy(update={"roles": {"worker": role.model_copy(update={"replicas": replicas})}})


def edit(world: World, job_id: JobId, new: JobSpec) -> None:
    job = world.job(job_id)
    change = compare(job.next_spec or job.spec, new)
    world.wish(ev.JobEdited(world.clock.now_ms(), job_id, "ada", new, change.fields, change.wanted, change.restart))


def test_nothing_differs() -> None:
    assert compare(a_spec(), a_spec()).fields == ()


def test_what_replicas_know_nothing_of_is_changed_in_place() -> None:
    change = compare(a_spec(), a_spec(labels={"a": "b"}, priority=5, time_limit=60))
    assert set(change.fields) == {"labels", "priority", "time_limit"}
    assert not change.restart


def test_counts_of_elastic_roles_are_changed_in_place() -> None:
    old = a_spec(roles=ELASTIC)
    assert compare(old, scaled(old, 2)).wanted == {"worker": 2}
    assert not compare(old, scaled(old, 2)).restart


def test_everything_else_takes_a_restart() -> None:
    fixed = a_spec(roles={"worker": {"command": "true", "replicas": 2}})
    more = a_spec(roles={"worker": {"command": "true", "replicas": 3}})
    other = a_spec(roles={"worker": {"command": "false", "replicas": 2}})
    chief = a_spec(roles={"worker": {"command": "true", "replicas": 2}, "chief": {"command": "true"}})
    assert compare(fixed, more).restart
    assert compare(fixed, other).fields == ("roles.worker.command",)
    assert compare(fixed, chief).fields == ("roles.chief",)
    assert compare(chief, fixed).fields == ("roles.chief",)
    assert compare(a_spec(), a_spec(queue="other")).restart


def test_a_waiting_job_takes_anything_at_once() -> None:
    world = World(nodes=1, gpus=1)
    job_id = world.submit(a_spec(roles={"worker": {"command": "true", "gpu": "any:8"}}))
    world.tick(3)
    assert world.job(job_id).phase is Phase.QUEUED
    edit(world, job_id, a_spec())
    world.run_until(lambda: world.job(job_id).phase is Phase.RUNNING)
    assert world.job(job_id).attempt == 1


def test_a_running_job_saves_and_starts_anew_with_it() -> None:
    world = World(nodes=2, gpus=4)
    job_id = world.submit()
    world.run_until(lambda: world.job(job_id).phase is Phase.RUNNING)
    before = world.job(job_id).spec
    edit(world, job_id, a_spec(roles={"worker": {"command": "true", "gpu": "any:1", "replicas": 3}}))
    assert world.job(job_id).spec == before, "the attempt under way goes on as it was"
    world.run_until(lambda: world.job(job_id).phase is Phase.RUNNING and world.job(job_id).attempt == 2)
    job = world.job(job_id)
    assert len(job.replicas) == 3
    assert job.next_spec is None
    assert any(isinstance(s.event, ev.AttemptStopping) and s.event.outcome.reason is Reason.RESTART_REQUESTED
               for s in world.store.history(job_id))  # fmt: skip


def test_an_elastic_job_grows_and_shrinks_where_it_runs() -> None:
    world = World(nodes=1, gpus=4)
    spec = scaled(a_spec(roles=ELASTIC), 2)
    job_id = world.submit(spec)

    def running(count: int) -> bool:
        job = world.job(job_id)
        return job.phase is Phase.RUNNING and sum(r.state == "running" for r in job.replicas.values()) == count

    world.run_until(lambda: running(2))
    edit(world, job_id, scaled(spec, 4))
    world.run_until(lambda: running(4))
    edit(world, job_id, scaled(spec, 1))
    world.run_until(lambda: running(1))
    assert world.job(job_id).attempt == 1


def test_another_queue_is_charged_from_the_next_attempt_on() -> None:
    world = World(nodes=1, gpus=4, queues=(QueueSpec(), QueueSpec(name="other")))
    job_id = world.submit()
    world.run_until(lambda: world.job(job_id).phase is Phase.RUNNING)
    edit(world, job_id, a_spec(queue="other"))
    world.run_until(lambda: world.job(job_id).phase is Phase.RUNNING and world.job(job_id).attempt == 2)
    held = {name: account.held.get("gpus", 0) for name, account in world.cluster.quotas.accounts.items()}
    assert held["default"] == 0
    assert held["other"] == 1_000


def test_an_edit_that_takes_a_restart_is_not_lost_by_one_that_does_not() -> None:
    world = World(nodes=1, gpus=4)
    job_id = world.submit()
    world.run_until(lambda: world.job(job_id).phase is Phase.RUNNING)
    other = a_spec(roles={"worker": {"command": "other", "gpu": "any:1"}})
    edit(world, job_id, other)
    edit(world, job_id, other.model_copy(update={"priority": 7}))
    world.run_until(lambda: world.job(job_id).phase is Phase.RUNNING and world.job(job_id).attempt == 2)
    assert world.job(job_id).priority == 7
    assert world.job(job_id).spec.roles["worker"].command == "other"
