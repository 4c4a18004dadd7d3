"""The life of a job: one table of legal transitions, and the fold of one job's events.

`evolve_job` is called by `cluster.evolve` (the leader's memory) and by every store (projections): one function, so both
agree by construction. It never looks at other jobs, nodes or the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, cast

from jobsched.core import events as ev
from jobsched.core.job import (
    Asked,
    Changes,
    CheckpointMark,
    FailureClass,
    Job,
    Phase,
    Reason,
    Replica,
    ReplicaId,
    ReplicaState,
)
from jobsched.core.resources import NO_JOB, NodeName
from jobsched.core.values import changed
from jobsched.spec.job import JobSpec, resizes_in_place

Q, S, R, X = Phase.QUEUED, Phase.STARTING, Phase.RUNNING, Phase.STOPPING
LIVE: Final = (Q, S, R, X)
ACTIVE: Final = (S, R, X)

LEGAL: Final[Mapping[type, tuple[Phase, ...]]] = {
    # event                      phases in which it may happen      phase afterwards
    ev.AttemptPlaced:            (Q,),                              # STARTING
    ev.AttemptStarted:           (S,),                              # RUNNING
    ev.AttemptStopping:          (S, R, X),                         # STOPPING (from STOPPING: another outcome)
    ev.AttemptEnded:             (X,),                              # the outcome's: QUEUED or a terminal one
    ev.JobEnded:                 (Q,),                              # FAILED | CANCELLED
    ev.JobCancelRequested:       LIVE,                              # the same; judge acts on the wish
    ev.JobHeld:                  LIVE,
    ev.JobReleased:              LIVE,
    ev.JobRestartRequested:      LIVE,
    ev.JobScaled:                LIVE,
    ev.JobPriorityChanged:       LIVE,
    ev.JobEdited:                LIVE,                              # the same; applied at once or to the next attempt
    ev.DependencyMet:            LIVE,
    ev.ReplicasStarted:          ACTIVE,
    ev.ReplicaExited:            ACTIVE,
    ev.ReplicasLost:             ACTIVE,
    ev.ReplicasRestarted:        (S, R),
    ev.ReplicasUnbound:          (S, R),
    ev.ReplicasBound:            (S, R),
    ev.ReplicasReleased:         (S, R),
    ev.ReplicasGone:             ACTIVE,
    ev.HangSuspected:            (R,),
    ev.HangCleared:              (R,),
    ev.CheckpointSaved:          ACTIVE,
    ev.FailuresForgiven:         LIVE,
    ev.CapacityRequested:        (Q,),
    ev.CapacityWithdrawn:        (Q,),
}  # fmt: skip
"""Terminal phases allow nothing: an ended job never changes again."""

REBINDS: Final = frozenset(
    (ev.AttemptPlaced, ev.AttemptEnded, ev.ReplicasBound, ev.ReplicasUnbound, ev.ReplicasGone)
)
"""Events after which a job may hold other GPUs than before."""

COUNTED: Final = (FailureClass.USER, FailureClass.OOM, FailureClass.HANG)
"""Failures that use up the restart budget."""


_FOLDED: Final[dict[int, tuple[ev.JobEvent, Job | None, Job]]] = {}
"""What was folded and not yet taken, by the event's identity: (event, job before, job after). Judge, the store and the
cluster apply the same event to the same job one after the other; they get the same result without folding again.
Entries keep their events alive, so identities cannot be reused."""
FOLDED_KEPT = 4_096


class Illegal(ValueError):
    """An event that the job's phase does not allow; the writer decided on an outdated job."""


def evolve_job(job: Job | None, event: ev.JobEvent) -> Job:
    """The job after `event`. O(replicas of the job) at most. Raises `Illegal`; never changes its input."""
    folded = _FOLDED.get(id(event))
    if folded is not None and folded[1] is job:
        return folded[2]
    after = _fold(job, event)
    if len(_FOLDED) >= FOLDED_KEPT:
        _FOLDED.clear()
    _FOLDED[id(event)] = (event, job, after)
    return after


def take_evolved(job: Job | None, event: ev.JobEvent) -> Job:
    """The same for whoever comes last, the leader's memory: nobody will ask again, so nothing is kept."""
    folded = _FOLDED.pop(id(event), None)
    return folded[2] if folded is not None and folded[1] is job else _fold(job, event)


def _fold(job: Job | None, event: ev.JobEvent) -> Job:
    if job is None:
        if isinstance(event, ev.JobSubmitted):
            return _submitted(event)
        raise Illegal(f"{event.kind} for job {event.job_id}, which is not there")
    kind = type(event)
    if kind is ev.JobSubmitted:
        raise Illegal(f"job {event.job_id} is already there")
    if job.phase not in LEGAL[kind]:
        raise Illegal(f"{event.kind} is not possible while job {job.id} is {job.phase}")
    attempt = getattr(event, "attempt", None)
    if attempt is not None and attempt != job.attempt + (kind is ev.AttemptPlaced):
        raise Illegal(f"{event.kind} names attempt {attempt}, job {job.id} is at {job.attempt}")
    changes = _STEPS[kind](job, event)
    if kind in REBINDS:
        replicas = cast(Mapping[ReplicaId, Replica], changes["replicas"])
        held = sum([share.milli for r in replicas.values() if r.binding is not None for share in r.binding.gpus])
        changes |= {"gpu_milli_ms": job.gpu_time(event.at_ms), "gpu_milli": held, "gpu_since_ms": event.at_ms}
    changes["version"] = job.version + 1
    return changed(job, changes)


def _submitted(e: ev.JobSubmitted) -> Job:
    return Job(
        id=e.job_id,
        name=e.name,
        owner=e.owner,
        spec=e.spec,
        submitted_at_ms=e.at_ms,
        phase_since_ms=e.at_ms,
        priority=e.spec.priority,
        held=e.held,
        waiting_for=e.waiting_for,
        array_id=e.array_id,
        array_index=e.array_index,
        labels=e.spec.labels,
    )


def _enter(phase: Phase, reason: Reason, at_ms: int) -> Changes:
    return {"phase": phase, "reason": reason, "phase_since_ms": at_ms}


def _change(job: Job, ids: Iterable[ReplicaId], change: Callable[[Replica], Replica]) -> Changes:
    replicas = dict(job.replicas)
    for rid in ids:
        if rid not in replicas:
            raise Illegal(f"job {job.id} has no replica {rid}")
        replicas[rid] = change(replicas[rid])
    return {"replicas": replicas}


def _cancel(job: Job, e: ev.JobCancelRequested) -> Changes:
    return {"cancel_by": e.by or "somebody"}


def _held(job: Job, e: ev.JobHeld) -> Changes:
    return {"held": True, "stop_wish": Reason.HELD if e.stop and job.phase in (S, R) else job.stop_wish}


def _released(job: Job, e: ev.JobReleased) -> Changes:
    wish = Reason.NONE if job.stop_wish is Reason.HELD else job.stop_wish
    return {"held": False, "not_before_ms": 0, "stop_wish": wish}


def _restart_requested(job: Job, e: ev.JobRestartRequested) -> Changes:
    wish = Reason.RESTART_REQUESTED if job.phase in (S, R) else job.stop_wish
    return {"stop_wish": wish, "not_before_ms": 0, "failures": 0, "infra_failures": 0}


def _scaled(job: Job, e: ev.JobScaled) -> Changes:
    wish = _rescaling(job, job.spec, e.wanted) if job.phase in (S, R) else job.stop_wish
    return {"wanted": {**job.wanted, **e.wanted}, "stop_wish": wish}


def _rescaling(job: Job, spec: JobSpec, wanted: Mapping[str, int]) -> Reason:
    """The wish to stop that other counts bring: a new attempt, where a role cannot change in place."""
    in_place = all(resizes_in_place(spec, role) for role in wanted)
    return job.stop_wish if in_place else Reason.RESCALED


def _priority(job: Job, e: ev.JobPriorityChanged) -> Changes:
    return {"priority": e.priority}


def _edited(job: Job, e: ev.JobEdited) -> Changes:
    before = job.next_spec or job.spec
    explicit = "priority" in e.fields or e.spec.priority != before.priority
    changes: Changes = {
        "edits": job.edits + 1, "labels": e.spec.labels, "priority": e.spec.priority if explicit else job.priority,
        "failures": 0, "infra_failures": 0,
    }  # fmt: skip
    if job.phase is Q:
        return {**changes, "not_before_ms": 0, **_respecified(job, e.spec, e.wanted)}
    running = job.phase in (S, R)
    if e.restart or job.next_spec is not None:
        wanted = {role: count for role, count in job.wanted.items() if role not in e.wanted}
        wish = Reason.RESTART_REQUESTED if running else job.stop_wish
        return {**changes, "next_spec": e.spec, "wanted": wanted, "stop_wish": wish}
    changes |= _respecified(job, e.spec, e.wanted)
    return {**changes, "stop_wish": _rescaling(job, e.spec, e.wanted)} if running else changes


def _respecified(job: Job, spec: JobSpec, wanted: Mapping[str, int]) -> Changes:
    """With another spec, and of the counts set by `scale` those that it allows."""
    known = {role: count for role, count in {**job.wanted, **wanted}.items()
             if role in spec.roles and spec.roles[role].replicas.min <= count <= spec.roles[role].replicas.max}
    return {"spec": spec, "next_spec": None, "wanted": known}


def _dependency_met(job: Job, e: ev.DependencyMet) -> Changes:
    return {"waiting_for": tuple(d for d in job.waiting_for if d != e.dependency)}


def _placed(job: Job, e: ev.AttemptPlaced) -> Changes:
    return {
        **_enter(S, Reason.NONE, e.at_ms),
        "attempt": e.attempt,
        "restarts": job.restarts + (e.attempt > 1),
        "replicas": {b.id: Replica(b.role, b.index, b) for b in e.bindings},
        "coordinator_port": e.coordinator_port,
        "attempt_started_at_ms": e.at_ms,
        "waited_ms": max(0, e.at_ms - job.phase_since_ms),
        "first_placed_at_ms": job.first_placed_at_ms or e.at_ms,
        "not_before_ms": 0,
        "asked": None,
    }


def _capacity_requested(job: Job, e: ev.CapacityRequested) -> Changes:
    return {"asked": Asked(e.pool, e.nodes, e.target, e.at_ms, e.until_ms)}


def _capacity_withdrawn(job: Job, e: ev.CapacityWithdrawn) -> Changes:
    return {"asked": None}


def _replicas_started(job: Job, e: ev.ReplicasStarted) -> Changes:
    return _change(job, e.replicas, _run)


def _run(replica: Replica) -> Replica:
    return changed(replica, state=ReplicaState.RUNNING)


def _attempt_started(job: Job, e: ev.AttemptStarted) -> Changes:
    return {
        **(_change(job, e.replicas, _run) if e.replicas else {}),
        **_enter(R, Reason.NONE, e.at_ms),
        "first_started_at_ms": job.first_started_at_ms or e.at_ms,
        "running_since_ms": e.at_ms,
    }


def _replica_exited(job: Job, e: ev.ReplicaExited) -> Changes:
    def exited(r: Replica) -> Replica:
        return changed(r, state=ReplicaState.EXITED, exit_code=e.exit_code, signal=e.signal)

    return _change(job, (ReplicaId(f"{e.role}/{e.index}"),), exited)


def _replicas_lost(job: Job, e: ev.ReplicasLost) -> Changes:
    return _change(job, e.replicas, lambda r: changed(r, state=ReplicaState.LOST))


def _count_failure(job: Job, failure_class: FailureClass, at_ms: int) -> Changes:
    if failure_class in COUNTED:
        return {"failures": job.failures + 1, "failed_at_ms": at_ms}
    if failure_class is FailureClass.INFRA:
        return {"infra_failures": job.infra_failures + 1, "failed_at_ms": at_ms}
    return {}


def _replicas_restarted(job: Job, e: ev.ReplicasRestarted) -> Changes:
    def again(r: Replica) -> Replica:
        return Replica(r.role, r.index, r.binding, restart=r.restart + 1, not_before_ms=e.not_before_ms)

    return {
        **_change(job, e.replicas, again),
        **_count_failure(job, e.cause.failure_class, e.at_ms),
        "restarts": job.restarts + 1,
        "cause": e.cause,
        "suspected_since_ms": 0,
        "suspects": (),
    }


def _replicas_unbound(job: Job, e: ev.ReplicasUnbound) -> Changes:
    unbound = _change(job, e.replicas, lambda r: changed(r, state=ReplicaState.UNBOUND, binding=None))
    return {**unbound, **_count_failure(job, e.cause.failure_class, e.at_ms), "cause": e.cause}


def _replicas_bound(job: Job, e: ev.ReplicasBound) -> Changes:
    replicas = dict(job.replicas)
    for b in e.bindings:
        old = replicas.get(b.id)
        if old is not None and old.state not in (ReplicaState.UNBOUND, ReplicaState.GONE):
            raise Illegal(f"replica {b.id} of job {job.id} already has a place")
        replicas[b.id] = Replica(b.role, b.index, b, restart=0 if old is None else old.restart + 1)
    return {"replicas": replicas}


def _replicas_released(job: Job, e: ev.ReplicasReleased) -> Changes:
    return _change(job, e.replicas, lambda r: changed(r, state=ReplicaState.STOPPING, for_job=e.for_job))


def _replicas_gone(job: Job, e: ev.ReplicasGone) -> Changes:
    return _change(job, e.replicas, lambda r: changed(r, state=ReplicaState.GONE, binding=None, for_job=NO_JOB))


def _hang_suspected(job: Job, e: ev.HangSuspected) -> Changes:
    return {"suspected_since_ms": e.at_ms, "suspects": e.replicas}


def _hang_cleared(job: Job, e: ev.HangCleared) -> Changes:
    return {"suspected_since_ms": 0, "suspects": ()}


def _checkpoint_saved(job: Job, e: ev.CheckpointSaved) -> Changes:
    return {"checkpoint": CheckpointMark(e.attempt, e.step, e.path, e.at_ms)}


def _forgiven(job: Job, e: ev.FailuresForgiven) -> Changes:
    return {"failures": 0, "infra_failures": 0}


def _stopping(job: Job, e: ev.AttemptStopping) -> Changes:
    cause = e.outcome.cause
    changes: Changes = {
        **_enter(X, e.outcome.reason, e.at_ms),
        "outcome": e.outcome,
        "cause": cause or (None if e.outcome.phase is Phase.SUCCEEDED else job.cause),
        "stop_wish": Reason.NONE,
        "suspected_since_ms": 0,
        "suspects": (),
    }
    if job.phase is not X:
        ran = e.at_ms - job.running_since_ms if job.running_since_ms else 0
        changes |= {"ran_ms": job.ran_ms + max(0, ran), "running_since_ms": 0}
        if cause is not None:
            infra = cause.failure_class is FailureClass.INFRA and cause.node
            changes |= _count_failure(job, cause.failure_class, e.at_ms)
            changes["avoid"] = (NodeName(cause.node),) if infra else ()
    return changes


def _ended(job: Job, e: ev.AttemptEnded) -> Changes:
    outcome = job.outcome
    assert outcome is not None
    if e.phase is not outcome.phase:
        raise Illegal(f"job {job.id} was stopping towards {outcome.phase}, not {e.phase}")
    changes: Changes = {
        **_enter(e.phase, outcome.reason, e.at_ms),
        "replicas": {},
        "outcome": None,
        "coordinator_port": 0,
        "not_before_ms": outcome.not_before_ms if e.phase is Q else 0,
        "ended_at_ms": 0 if e.phase is Q else e.at_ms,
    }
    if outcome.for_job or outcome.reason in (Reason.PREEMPTED, Reason.MOVED):
        # What was saved while stopping is not lost.
        changes["lost_ms"] = job.lost_ms + job.unsaved_ms(job.phase_since_ms)
    if e.phase is Q and job.next_spec is not None:
        changes |= _respecified(job, job.next_spec, {})
    return changes


def _job_ended(job: Job, e: ev.JobEnded) -> Changes:
    if e.phase not in (Phase.FAILED, Phase.CANCELLED):
        raise Illegal(f"a waiting job cannot become {e.phase}")
    return {**_enter(e.phase, e.cause.reason, e.at_ms), "cause": e.cause, "ended_at_ms": e.at_ms}


_STEPS: Final[Mapping[type, Callable[..., Changes]]] = {
    ev.JobCancelRequested: _cancel,
    ev.JobHeld: _held,
    ev.JobReleased: _released,
    ev.JobRestartRequested: _restart_requested,
    ev.JobScaled: _scaled,
    ev.JobPriorityChanged: _priority,
    ev.JobEdited: _edited,
    ev.DependencyMet: _dependency_met,
    ev.AttemptPlaced: _placed,
    ev.ReplicasStarted: _replicas_started,
    ev.AttemptStarted: _attempt_started,
    ev.ReplicaExited: _replica_exited,
    ev.ReplicasLost: _replicas_lost,
    ev.ReplicasRestarted: _replicas_restarted,
    ev.ReplicasUnbound: _replicas_unbound,
    ev.ReplicasBound: _replicas_bound,
    ev.ReplicasReleased: _replicas_released,
    ev.ReplicasGone: _replicas_gone,
    ev.HangSuspected: _hang_suspected,
    ev.HangCleared: _hang_cleared,
    ev.CheckpointSaved: _checkpoint_saved,
    ev.FailuresForgiven: _forgiven,
    ev.CapacityRequested: _capacity_requested,
    ev.CapacityWithdrawn: _capacity_withdrawn,
    ev.AttemptStopping: _stopping,
    ev.AttemptEnded: _ended,
    ev.JobEnded: _job_ended,
}
"""What each event changes of its job."""
assert _STEPS.keys() == LEGAL.keys()
