"""What happened to a job, in sentences: for `why` and for events on Kubernetes. Pure, from the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from jobsched.core import events as ev
from jobsched.core.explain import many
from jobsched.core.job import Phase, replica_id


def story(events: Sequence[ev.Stored]) -> tuple[str, ...]:
    """The life of a job in lines a newcomer understands, each with the time since its first event; a failure is
    followed by the last log lines of who failed and, for a hang, by its stack."""
    lines: list[str] = []
    since_ms = events[0].event.at_ms if events else 0
    for _, alike in groupby(_telling(events), _ends_alike):
        group = list(alike)
        ends = [event for event in group if isinstance(event, ev.ReplicaExited)]
        text = _ends(ends) if ends else sentence(group[0])
        if text:
            at_s = max(0, group[0].at_ms - since_ms) / 1000  # a pass that began before the job came dates it back a bit
            lines.append(f"{f'+{at_s:.1f}s':>9}  {text}")
            lines += [f"{'':>9}    | {line}" for line in _evidence(group[0])]
    return tuple(lines)


def _telling(events: Sequence[ev.Stored]) -> Iterator[ev.Event]:
    """All but those checkpoints that another one follows."""
    for stored, following in zip(events, [*events[1:], None], strict=True):
        saved = isinstance(stored.event, ev.CheckpointSaved)
        if not (saved and following is not None and isinstance(following.event, ev.CheckpointSaved)):
            yield stored.event


def _ends_alike(event: ev.Event) -> object:
    """Equal for replicas of an attempt that ended the same way; every other event is only like itself."""
    if isinstance(event, ev.ReplicaExited):
        return event.attempt, event.exit_code, event.signal, event.reason
    return id(event)


NAMED = 4
"""Replicas that a line names; the others are counted."""


def _ends(events: Sequence[ev.ReplicaExited]) -> str:
    """Replicas that ended the same way, in one sentence."""
    names = [replica_id(event.role, event.index) for event in events]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    how = f"signal {events[0].signal}" if events[0].signal else f"code {events[0].exit_code}"
    why = f" ({events[0].reason})" if events[0].reason else ""
    return f"{', '.join(names[:NAMED])}{more} ended with {how}{why}"


EVIDENCE_LINES = 12


def _evidence(event: ev.Event) -> tuple[str, ...]:
    cause = None
    if isinstance(event, ev.AttemptStopping):
        cause = event.outcome.cause
    elif isinstance(event, ev.ReplicasRestarted):
        cause = event.cause
    if cause is None:
        return ()
    own = dict(cause.stacks).get(replica_id(cause.role, cause.index), "")
    return (*cause.tail[-EVIDENCE_LINES:], *own.splitlines()[:EVIDENCE_LINES]) if own else cause.tail[-EVIDENCE_LINES:]


def sentence(event: ev.Event) -> str:
    """One event in words; "" for those that tell a reader nothing."""
    match event:
        case ev.JobSubmitted():
            return f"submitted by {event.owner} to queue {event.spec.queue}"
        case ev.JobCancelRequested():
            return f"{event.by} asked to cancel"
        case ev.JobHeld():
            return f"held by {event.by}"
        case ev.JobReleased():
            return f"released by {event.by}"
        case ev.JobRestartRequested():
            return f"{event.by} asked for a restart"
        case ev.JobScaled():
            return f"{event.by} asked for " + ", ".join(f"{n} × {role}" for role, n in event.wanted.items())
        case ev.JobPriorityChanged():
            return f"{event.by} set priority {event.priority}"
        case ev.JobEdited():
            how = "; it starts anew with that" if event.restart else ""
            return f"{event.by} changed {', '.join(event.fields)}{how}"
        case ev.AttemptPlaced():
            nodes = dict.fromkeys(b.node for b in event.bindings)
            return f"attempt {event.attempt}: {many(len(event.bindings), 'replica')} placed on {', '.join(nodes)}"
        case ev.AttemptStarted():
            return f"attempt {event.attempt}: every replica runs"
        case ev.ReplicaExited():
            return _ends([event])
        case ev.ReplicasLost():
            return f"{', '.join(event.replicas)} lost ({event.reason})"
        case ev.ReplicasRestarted():
            return f"{', '.join(event.replicas)} started anew in place; {event.cause.message}"
        case ev.ReplicasUnbound():
            return f"{', '.join(event.replicas)} lost their place; {event.cause.message}"
        case ev.ReplicasBound():
            why = f" ({event.why})" if event.why else ""
            return "grew by " + ", ".join(f"{b.id} on {b.node}" for b in event.bindings) + why
        case ev.ReplicasReleased():
            whom = f", to make room for job {event.for_job}" if event.for_job and not event.why else ""
            why = f"; {event.why}" if event.why else ""
            return f"shrinks by {', '.join(event.replicas)} ({event.reason}{whom}{why})"
        case ev.HangSuspected():
            return f"suspected of hanging: {event.message}; taking stacks"
        case ev.HangCleared():
            return "progress again; suspicion cleared"
        case ev.CapacityRequested():
            return f"asked for {many(event.nodes, 'node')} of pool {event.pool}"
        case ev.CapacityWithdrawn():
            return f"asks for no nodes of pool {event.pool} any more: {event.message}"
        case ev.CheckpointSaved():
            return f"checkpoint at step {event.step}"
        case ev.AttemptStopping():
            out = event.outcome
            cause = f": {out.cause.message}" if out.cause and out.cause.message else ""
            then = "the job will wait again" if out.phase is Phase.QUEUED else out.phase
            return f"attempt {event.attempt} stops ({out.reason}); {then}{cause}"
        case ev.AttemptEnded():
            return f"attempt {event.attempt} is over" + (": the job waits" if event.phase is Phase.QUEUED else "")
        case ev.JobEnded():
            return f"{event.phase}: {event.cause.message}"
        case _:
            return ""
