"""Events: immutable past-tense facts, the only input of `evolve`. The store keeps them in order, for ever.

Every event has `at_ms` (server clock). Job events carry `job_id`; that of others is None. Decisions (written by the
leader, fenced) and wishes (written by users through the service) are told apart by `is_wish`. The wire form is
`EVENT.dump_json`, a closed union told apart by `kind`; fields may be added with defaults, never renamed or removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter

from jobsched.core.job import Binding, Cause, Outcome, Phase, Reason, ReplicaId
from jobsched.core.node import Node
from jobsched.core.resources import NO_JOB, GpuId, JobId, NodeName
from jobsched.core.values import dataclass
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec

# ---- wishes: what users asked for ----


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    at_ms: int
    job_id: JobId
    name: str
    owner: str
    spec: JobSpec
    request_id: str = ""
    """The client's idempotency key."""
    waiting_for: tuple[JobId, ...] = ()
    array_id: str = ""
    array_index: int = -1
    held: bool = False
    kind: Literal["JobSubmitted"] = "JobSubmitted"


@dataclass(frozen=True, slots=True)
class JobCancelRequested:
    at_ms: int
    job_id: JobId
    by: str
    kind: Literal["JobCancelRequested"] = "JobCancelRequested"


@dataclass(frozen=True, slots=True)
class JobHeld:
    """Keep the job from starting; a running attempt saves and is stopped if `stop` (suspend)."""

    at_ms: int
    job_id: JobId
    by: str
    stop: bool = False
    kind: Literal["JobHeld"] = "JobHeld"


@dataclass(frozen=True, slots=True)
class JobReleased:
    at_ms: int
    job_id: JobId
    by: str
    kind: Literal["JobReleased"] = "JobReleased"


@dataclass(frozen=True, slots=True)
class JobRestartRequested:
    at_ms: int
    job_id: JobId
    by: str
    kind: Literal["JobRestartRequested"] = "JobRestartRequested"


@dataclass(frozen=True, slots=True)
class JobScaled:
    """Wanted replica counts of elastic roles, within their bounds."""

    at_ms: int
    job_id: JobId
    by: str
    wanted: Mapping[str, int] = field(default_factory=dict)
    kind: Literal["JobScaled"] = "JobScaled"


@dataclass(frozen=True, slots=True)
class JobPriorityChanged:
    at_ms: int
    job_id: JobId
    by: str
    priority: int
    kind: Literal["JobPriorityChanged"] = "JobPriorityChanged"


@dataclass(frozen=True, slots=True)
class JobEdited:
    """Another spec for the job. What can be is applied at once; with `restart`, the attempt saves and stops, and the
    next one starts with it."""

    at_ms: int
    job_id: JobId
    by: str
    spec: JobSpec
    fields: tuple[str, ...] = ()
    """Paths of what differs."""
    wanted: Mapping[str, int] = field(default_factory=dict)
    restart: bool = False
    kind: Literal["JobEdited"] = "JobEdited"


@dataclass(frozen=True, slots=True)
class NodeCordoned:
    """Bind nothing new on the node (on these GPUs of it); `drain` also asks its attempts to save and move."""

    at_ms: int
    node: NodeName
    by: str
    drain: bool = False
    why: str = ""
    gpus: tuple[GpuId, ...] = ()
    kind: Literal["NodeCordoned"] = "NodeCordoned"
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class NodeUncordoned:
    at_ms: int
    node: NodeName
    by: str
    kind: Literal["NodeUncordoned"] = "NodeUncordoned"
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class QueueDefined:
    at_ms: int
    queue: QueueSpec
    kind: Literal["QueueDefined"] = "QueueDefined"
    job_id: ClassVar[None] = None


# ---- facts about nodes ----


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """A node joined or changed (capacity, health, foreign use)."""

    at_ms: int
    node: Node
    kind: Literal["NodeSeen"] = "NodeSeen"
    job_id: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node is gone for longer than its grace; its replicas are lost with it."""

    at_ms: int
    node: NodeName
    message: str = ""
    kind: Literal["NodeLost"] = "NodeLost"
    job_id: ClassVar[None] = None


# ---- decisions and facts about jobs ----


@dataclass(frozen=True, slots=True)
class AttemptPlaced:
    """QUEUED -> STARTING: a gang got its places."""

    at_ms: int
    job_id: JobId
    attempt: int
    bindings: tuple[Binding, ...]
    coordinator_port: int = 0
    kind: Literal["AttemptPlaced"] = "AttemptPlaced"


@dataclass(frozen=True, slots=True)
class ReplicasStarted:
    """Some run, but not all yet; or one anew in place."""

    at_ms: int
    job_id: JobId
    attempt: int
    replicas: tuple[ReplicaId, ...]
    kind: Literal["ReplicasStarted"] = "ReplicasStarted"


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """STARTING -> RUNNING: every replica of the gang runs, `replicas` as the last of them."""

    at_ms: int
    job_id: JobId
    attempt: int
    replicas: tuple[ReplicaId, ...] = ()
    kind: Literal["AttemptStarted"] = "AttemptStarted"


@dataclass(frozen=True, slots=True)
class ReplicaExited:
    at_ms: int
    job_id: JobId
    attempt: int
    role: str
    index: int
    exit_code: int | None = None
    signal: int | None = None
    reason: Reason = Reason.NONE
    tail: tuple[str, ...] = ()
    message: str = ""
    kind: Literal["ReplicaExited"] = "ReplicaExited"


@dataclass(frozen=True, slots=True)
class ReplicasLost:
    at_ms: int
    job_id: JobId
    attempt: int
    replicas: tuple[ReplicaId, ...]
    reason: Reason = Reason.REPLICA_LOST
    message: str = ""
    kind: Literal["ReplicasLost"] = "ReplicasLost"


@dataclass(frozen=True, slots=True)
class ReplicasRestarted:
    """Replicas are started anew in place (same binding, restart number + 1), not before `not_before_ms`."""

    at_ms: int
    job_id: JobId
    attempt: int
    replicas: tuple[ReplicaId, ...]
    cause: Cause
    not_before_ms: int = 0
    kind: Literal["ReplicasRestarted"] = "ReplicasRestarted"


@dataclass(frozen=True, slots=True)
class ReplicasUnbound:
    """Replicas lose their place but stay wanted (their node went away); `schedule` may bind them anew."""

    at_ms: int
    job_id: JobId
    attempt: int
    replicas: tuple[ReplicaId, ...]
    cause: Cause
    kind: Literal["ReplicasUnbound"] = "ReplicasUnbound"


@dataclass(frozen=True, slots=True)
class ReplicasBound:
    """A running attempt grows: new or unbound replicas get places."""

    at_ms: int
    job_id: JobId
    attempt: int
    bindings: tuple[Binding, ...]
    why: str = ""
    """What an elastic job gains by it."""
    kind: Literal["ReplicasBound"] = "ReplicasBound"


@dataclass(frozen=True, slots=True)
class ReplicasReleased:
    """A running attempt shrinks: these replicas save, stop and leave."""

    at_ms: int
    job_id: JobId
    attempt: int
    replicas: tuple[ReplicaId, ...]
    reason: Reason = Reason.RESCALED
    for_job: JobId = NO_JOB
    """The job for which they make room."""
    why: str = ""
    """What it does to the speed of an elastic job, or who takes their places and by what right."""
    kind: Literal["ReplicasReleased"] = "ReplicasReleased"


@dataclass(frozen=True, slots=True)
class ReplicasGone:
    """Released replicas have ended; their resources are free."""

    at_ms: int
    job_id: JobId
    attempt: int
    replicas: tuple[ReplicaId, ...]
    kind: Literal["ReplicasGone"] = "ReplicasGone"


@dataclass(frozen=True, slots=True)
class HangSuspected:
    at_ms: int
    job_id: JobId
    attempt: int
    replicas: tuple[ReplicaId, ...]
    message: str = ""
    kind: Literal["HangSuspected"] = "HangSuspected"


@dataclass(frozen=True, slots=True)
class HangCleared:
    at_ms: int
    job_id: JobId
    attempt: int
    kind: Literal["HangCleared"] = "HangCleared"


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    at_ms: int
    job_id: JobId
    attempt: int
    step: int
    path: str
    kind: Literal["CheckpointSaved"] = "CheckpointSaved"


@dataclass(frozen=True, slots=True)
class FailuresForgiven:
    """The job made progress for long enough after its last restart; the budget of restarts is whole again."""

    at_ms: int
    job_id: JobId
    kind: Literal["FailuresForgiven"] = "FailuresForgiven"


@dataclass(frozen=True, slots=True)
class CapacityRequested:
    """A waiting job asked for nodes of a pool, all or nothing."""

    at_ms: int
    job_id: JobId
    pool: str
    nodes: int
    target: int
    """How many nodes the pool has when they are there."""
    until_ms: int
    """They are late from then on."""
    kind: Literal["CapacityRequested"] = "CapacityRequested"


@dataclass(frozen=True, slots=True)
class CapacityWithdrawn:
    """A waiting job does not ask for nodes any more; `late`: because the pool did not deliver."""

    at_ms: int
    job_id: JobId
    pool: str
    message: str
    late: bool = False
    kind: Literal["CapacityWithdrawn"] = "CapacityWithdrawn"


@dataclass(frozen=True, slots=True)
class AttemptStopping:
    """STARTING | RUNNING -> STOPPING, with where it goes afterwards and why."""

    at_ms: int
    job_id: JobId
    attempt: int
    outcome: Outcome
    kind: Literal["AttemptStopping"] = "AttemptStopping"


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """STOPPING -> the outcome's phase: every replica of the attempt is gone."""

    at_ms: int
    job_id: JobId
    attempt: int
    phase: Phase
    kind: Literal["AttemptEnded"] = "AttemptEnded"


@dataclass(frozen=True, slots=True)
class JobEnded:
    """QUEUED -> CANCELLED | FAILED without an attempt."""

    at_ms: int
    job_id: JobId
    phase: Phase
    cause: Cause
    kind: Literal["JobEnded"] = "JobEnded"


@dataclass(frozen=True, slots=True)
class DependencyMet:
    at_ms: int
    job_id: JobId
    dependency: JobId
    kind: Literal["DependencyMet"] = "DependencyMet"


Wish = (
    JobSubmitted | JobCancelRequested | JobHeld | JobReleased | JobRestartRequested | JobScaled | JobPriorityChanged
    | JobEdited | NodeCordoned | NodeUncordoned | QueueDefined
)
JobEvent = (
    JobSubmitted | JobCancelRequested | JobHeld | JobReleased | JobRestartRequested | JobScaled | JobPriorityChanged
    | JobEdited | AttemptPlaced | ReplicasStarted | AttemptStarted | ReplicaExited | ReplicasLost | ReplicasRestarted
    | ReplicasUnbound | ReplicasBound | ReplicasReleased | ReplicasGone | HangSuspected | HangCleared
    | CheckpointSaved | FailuresForgiven | CapacityRequested | CapacityWithdrawn
    | AttemptStopping | AttemptEnded | JobEnded | DependencyMet
)
ClusterEvent = NodeCordoned | NodeUncordoned | QueueDefined | NodeSeen | NodeLost
Event = JobEvent | ClusterEvent

EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")], config={"defer_build": True})


def is_wish(event: Event) -> bool:
    """Whether users may append this event without being the leader."""
    return isinstance(event, Wish)


def of_job(event: Event) -> JobEvent:
    """An event of a job's history."""
    assert not isinstance(event, ClusterEvent)
    return event


@dataclass(frozen=True, slots=True)
class Stored:
    """An event with its place in the log. `seq` counts from 1 without gaps."""

    seq: int
    event: Event
