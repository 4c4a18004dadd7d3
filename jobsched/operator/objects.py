"""Kubernetes objects to specs, and answers to their status. Pure; used by `operator.loop` only.

An object is raw JSON, as the API server sent it. A job made from one carries its uid as a label: that is how it is
found again after any crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from jobsched import load
from jobsched.backends.kubernetes_render import JOB, LABEL, ROLE
from jobsched.core.answers import JobAnswer, QueueAnswer
from jobsched.core.job import Job, Phase, ReplicaState
from jobsched.errors import JobschedError
from jobsched.spec.crd import Condition, JobStatus, QueueStatus, RoleStatus, StatusModel
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec

Json = dict[str, Any]

FINALIZER = LABEL + "cancel"
"""On every object that has a job: it is only gone once the job's replicas are."""
UID = LABEL + "uid"
DIRECTORY = LABEL + "directory"
"""Annotation: where the object's file would lie, where replicas run."""
REFUSED = "REFUSED"
"""In place of a phase: there is no job, see the condition Accepted."""
WORKER = "worker"


def name_of(found: Json) -> str:
    return str(found["metadata"]["name"])


def uid_of(found: Json) -> str:
    return str(found["metadata"]["uid"])


def owner_of(found: Json) -> str:
    """Whose job it is: who applied an object is nowhere to be read, its namespace is."""
    return f"kubernetes:{found['metadata']['namespace']}"


def generation_of(found: Json) -> int:
    return int(found["metadata"].get("generation", 0))


def job_spec(found: Json, directory: str = "") -> JobSpec:
    """Raises `SpecError`. Relative directories start from the object's annotation, else from `directory`."""
    annotations = found["metadata"].get("annotations") or {}
    plain = {key: found[key] for key in ("apiVersion", "kind", "metadata", "spec")}
    spec = load.load_job(plain, file=f"trainingjob/{name_of(found)}", directory=annotations.get(DIRECTORY, directory))
    return spec.model_copy(update={"labels": {**spec.labels, UID: uid_of(found)}})


def queue_spec(found: Json) -> QueueSpec:
    """Raises `SpecError`."""
    [queue] = load.load_queues([{"name": name_of(found), **found["spec"]}], file=f"trainingqueue/{name_of(found)}")
    return queue


# ---- status ----


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an object, or its newest edit, was not taken."""

    reason: str
    message: str

    @classmethod
    def of(cls, error: JobschedError, *, edit: bool) -> Refusal:
        said = "; ".join(f"{p.field}: {p.message}" if p.field else p.message for p in error.problems) or error.message
        hint = f" ({error.hint})" if error.hint else ""
        return cls("EditRefused" if edit else type(error).__name__, (said + hint)[:1_000])


def job_status(found: Json, answers: Sequence[JobAnswer], refusal: Refusal | None, now_ms: int) -> Json:
    """The status that the object should have: of its job, of all members of its array, or of a refusal."""
    jobs = [answer.job for answer in answers]
    before = found.get("status") or {}
    if not answers:
        assert refusal is not None
        facts = [_accepted(refusal)]
        return _status(JobStatus(
            observed_generation=generation_of(found), phase=REFUSED, reason=refusal.reason, message=refusal.message,
            conditions=_conditions(before, facts, generation_of(found), now_ms)))  # fmt: skip
    chief = _telling(answers)
    job = chief.job
    roles = _roles(jobs)
    running = sum(role.running for role in roles.values())
    wanted = sum(role.wanted for role in roles.values())
    phase = _phase(jobs)
    reason = _reason(chief)
    message = chief.headline if len(jobs) == 1 else _tally(jobs) + (f"; {chief.headline}" if chief.headline else "")
    facts = [_accepted(refusal), ("Running", phase is Phase.RUNNING, reason or phase.value.capitalize(), message)]
    if phase.terminal:
        kind = "Complete" if phase is Phase.SUCCEEDED else "Failed"
        facts.append((kind, True, reason or phase.value.capitalize(), message))
    ended = [one.ended_at_ms for one in jobs]
    started = [one.first_started_at_ms for one in jobs if one.first_started_at_ms]
    return _status(JobStatus(
        observed_generation=generation_of(found),
        job_id=job.array_id or job.id,
        phase=phase.value, reason=reason, message=message, queue=job.spec.queue, priority=job.priority,
        attempt=job.attempt, restarts=sum(one.restarts for one in jobs),
        ready=f"{running}/{wanted}",
        replicas=sum(_held(one, WORKER) for one in jobs),
        selector=f"{JOB}={job.id},{ROLE}={WORKER}" if len(jobs) == 1 else "",
        roles=roles,
        started_at=_rfc3339(min(started)) if started else None,
        ended_at=_rfc3339(max(ended)) if phase.terminal else None,
        conditions=_conditions(before, facts, generation_of(found), now_ms),
    ))  # fmt: skip


def queue_status(found: Json, answer: QueueAnswer | None, refusal: Refusal | None, now_ms: int) -> Json:
    facts: list[Fact] = [("Ready", True, "Defined", "") if refusal is None
                         else ("Ready", False, refusal.reason, refusal.message)]  # fmt: skip
    conditions = _conditions(found.get("status") or {}, facts, generation_of(found), now_ms)
    if answer is None:
        return _status(QueueStatus(observed_generation=generation_of(found), conditions=conditions))
    return _status(QueueStatus(
        observed_generation=generation_of(found), waiting=answer.waiting, active=answer.active,
        gpus=f"{answer.gpus_in_use:g}", conditions=conditions,
    ))  # fmt: skip


Fact = tuple[str, bool, str, str]
"""Type, whether it holds, one word why, a sentence."""


def _accepted(refusal: Refusal | None) -> Fact:
    return ("Accepted", True, "Submitted", "") if refusal is None else ("Accepted", False, refusal.reason,
                                                                         refusal.message)


def _conditions(before: Json, facts: Sequence[Fact], generation: int, now_ms: int) -> tuple[Condition, ...]:
    """With since-when: kept where a condition holds on."""
    old = {one["type"]: one for one in before.get("conditions") or ()}
    found = []
    for kind, holds, reason, message in facts:
        status: Literal["True", "False"] = "True" if holds else "False"
        same = old.get(kind, {}).get("status") == status
        since = old[kind]["lastTransitionTime"] if same else _rfc3339(now_ms)
        found.append(Condition(type=kind, status=status, reason=reason, message=message, last_transition_time=since,
                               observed_generation=generation))
    return tuple(found)


def _telling(answers: Sequence[JobAnswer]) -> JobAnswer:
    """The member of an array that says most about it: one that failed, else one that runs, else one that waits."""
    order = (Phase.FAILED, Phase.RUNNING, Phase.STARTING, Phase.STOPPING, Phase.QUEUED, Phase.CANCELLED,
             Phase.SUCCEEDED)  # fmt: skip
    return min(answers, key=lambda answer: (order.index(answer.job.phase), answer.job.array_index))


def _phase(jobs: Sequence[Job]) -> Phase:
    phases = [job.phase for job in jobs]
    if all(phase.terminal for phase in phases):
        return next((p for p in (Phase.FAILED, Phase.CANCELLED) if p in phases), Phase.SUCCEEDED)
    return next((p for p in (Phase.RUNNING, Phase.STARTING, Phase.STOPPING) if p in phases), Phase.QUEUED)


def _reason(answer: JobAnswer) -> str:
    waits = answer.verdict.reasons if answer.verdict is not None else ()
    return (waits[0].reason if waits else answer.job.reason).value


def _tally(jobs: Sequence[Job]) -> str:
    phases = [job.phase for job in jobs]
    return ", ".join(f"{phases.count(phase)} {phase.lower()}" for phase in Phase if phase in phases)


def _roles(jobs: Sequence[Job]) -> Mapping[str, RoleStatus]:
    return {
        name: RoleStatus(
            wanted=sum(job.wanted_count(name) for job in jobs),
            running=sum(replica.role == name and replica.state is ReplicaState.RUNNING
                        for job in jobs for replica in job.replicas.values()),
        )
        for name in jobs[0].spec.roles
    }  # fmt: skip


def _held(job: Job, role: str) -> int:
    return sum(replica.role == role and replica.binding is not None for replica in job.replicas.values())


def _status(model: StatusModel) -> Json:
    return model.model_dump(mode="json", by_alias=True)


def _rfc3339(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms // 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- events ----


def event(found: Json, kind: str, reason: str, message: str, key: str, now_ms: int) -> Json:
    """A Kubernetes Event about an object; `key` makes its name, so that the same one is not written twice."""
    meta, at = found["metadata"], _rfc3339(now_ms)
    return {
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": f"{meta['name']}.{key}", "namespace": meta["namespace"]},
        "involvedObject": {"apiVersion": found["apiVersion"], "kind": found["kind"], "name": meta["name"],
                           "namespace": meta["namespace"], "uid": meta["uid"]},
        "type": kind, "reason": reason, "message": message[:1_024], "count": 1,
        "firstTimestamp": at, "lastTimestamp": at, "source": {"component": "jobsched"},
        "reportingComponent": "jobsched", "reportingInstance": "",
    }  # fmt: skip
