"""A job as folded from its events: phase, reason, attempt, replicas and where each is bound.

Frozen values; only `lifecycle.evolve_job` makes new ones. Instants are milliseconds since the epoch on the server's
clock; 0 means "not yet".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from typing import NewType

from jobsched.core.resources import NO_JOB, GpuShare, JobId, NodeName
from jobsched.core.values import dataclass
from jobsched.spec.job import JobSpec

ReplicaId = NewType("ReplicaId", str)
"""`role/index`, unique within an attempt."""


def replica_id(role: str, index: int) -> ReplicaId:
    return ReplicaId(f"{role}/{index}")


class Phase(StrEnum):
    """Where a job stands; the whole legal life is the table in `lifecycle.py`."""

    terminal: bool
    active: bool
    """Holds resources."""
    runs: bool
    """Holds them to go on: starting or running."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    def __init__(self, value: str) -> None:
        self.terminal = value in ("SUCCEEDED", "FAILED", "CANCELLED")
        self.runs = value in ("STARTING", "RUNNING")
        self.active = self.runs or value == "STOPPING"


class Reason(StrEnum):
    """Why a job is in its phase; closed, stable, shown beside the phase."""

    NONE = ""
    # waiting
    SUBMITTED = "Submitted"
    HELD = "Held"
    BACKOFF = "Backoff"
    DEPENDENCY = "Dependency"
    PRIORITY = "Priority"
    RESOURCES = "Resources"
    GPU_TYPE = "GpuType"
    TOPOLOGY = "Topology"
    QUOTA_QUEUE = "QuotaQueue"
    QUOTA_USER = "QuotaUser"
    BUDGET = "Budget"
    QUEUE_PAUSED = "QueuePaused"
    NODE_CORDONED = "NodeCordoned"
    ARRAY_LIMIT = "ArrayLimit"
    RESERVATION = "Reservation"
    PROVISIONING = "Provisioning"
    UNPLACEABLE = "Unplaceable"
    # ended, or why an attempt ended
    COMPLETED = "Completed"
    EXIT_CODE = "ExitCode"
    SIGNAL = "Signal"
    OOM = "Oom"
    HANG = "Hang"
    HEARTBEAT_LOST = "HeartbeatLost"
    REPLICA_LOST = "ReplicaLost"
    NODE_LOST = "NodeLost"
    GPU_ERROR = "GpuError"
    IMAGE_ERROR = "ImageError"
    PORT_CONFLICT = "PortConflict"
    START_FAILED = "StartFailed"
    START_TIMEOUT = "StartTimeout"
    TIME_LIMIT = "TimeLimit"
    QUEUE_DEADLINE = "QueueDeadline"
    DEPENDENCY_FAILED = "DependencyFailed"
    PREEMPTED = "Preempted"
    RESCALED = "Rescaled"
    MOVED = "Moved"
    RESTART_REQUESTED = "RestartRequested"
    CANCELLED = "Cancelled"
    CRASH_LOOP = "CrashLoop"


class FailureClass(StrEnum):
    """Whose fault a failure is; decides whether a restart counts."""

    NONE = ""
    USER = "user"
    OOM = "oom"
    HANG = "hang"
    INFRA = "infra"
    PREEMPTED = "preempted"


@dataclass(frozen=True, slots=True)
class Cause:
    """The one root cause of an end: first failing replica, code or signal, class, its last log lines."""

    reason: Reason
    failure_class: FailureClass = FailureClass.NONE
    message: str = ""
    role: str = ""
    index: int = -1
    rank: int = -1
    node: str = ""
    exit_code: int | None = None
    signal: int | None = None
    tail: tuple[str, ...] = ()
    stacks: tuple[tuple[str, str], ...] = ()
    """(replica name, stack text) of every rank, for hangs."""


@dataclass(frozen=True, slots=True)
class Binding:
    """One replica -> node, GPU shares and ports. `ports[0]` is its peer port, then its named ports in spec order;
    the replica that hosts the coordinator has one more port at the end."""

    role: str
    index: int
    node: NodeName
    gpus: tuple[GpuShare, ...] = ()
    ports: tuple[int, ...] = ()

    @property
    def id(self) -> ReplicaId:
        return replica_id(self.role, self.index)


class ReplicaState(StrEnum):
    """What the log knows about one replica of the current attempt."""

    desired: bool
    """It is to run: whatever of a job else runs is to end."""

    BOUND = "bound"
    """Placed; start ordered or about to be (not before `not_before_ms`)."""
    RUNNING = "running"
    EXITED = "exited"
    LOST = "lost"
    UNBOUND = "unbound"
    """Wanted, but without a place: waits for `schedule` to bind it again."""
    STOPPING = "stopping"
    """Being removed by a rescale while the attempt goes on."""
    GONE = "gone"
    """Left by a rescale; kept so that its restart number is not used twice."""

    def __init__(self, value: str) -> None:
        self.desired = value in ("bound", "running")


@dataclass(frozen=True, slots=True)
class Replica:
    role: str
    index: int
    binding: Binding | None
    state: ReplicaState = ReplicaState.BOUND
    restart: int = 0
    """How often this replica was started anew in this attempt; part of the launch key."""
    not_before_ms: int = 0
    exit_code: int | None = None
    signal: int | None = None
    for_job: JobId = NO_JOB
    """The job for which it leaves; empty: none."""

    @property
    def id(self) -> ReplicaId:
        return replica_id(self.role, self.index)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a STOPPING attempt is going once every replica is gone."""

    phase: Phase
    reason: Reason
    cause: Cause | None = None
    not_before_ms: int = 0
    """For QUEUED: earliest next attempt (backoff)."""
    for_job: JobId = NO_JOB
    """The job for which it makes room; its places are kept for it meanwhile. Empty: none."""
    also_for: tuple[JobId, ...] = ()
    """Further ones, where it goes on with fewer replicas."""


@dataclass(frozen=True, slots=True)
class CheckpointMark:
    """The last acknowledged checkpoint."""

    attempt: int
    step: int
    path: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Asked:
    """Nodes that do not exist yet and that a waiting job has asked for."""

    pool: str
    nodes: int
    target: int
    """How many nodes the pool has when they are there."""
    at_ms: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class Job:
    id: JobId
    name: str
    owner: str
    spec: JobSpec
    submitted_at_ms: int
    version: int = 1
    """Number of this job's events; compare-and-set token of the store."""
    phase: Phase = Phase.QUEUED
    reason: Reason = Reason.SUBMITTED
    phase_since_ms: int = 0
    priority: int = 0
    attempt: int = 0
    """Number of the current or last attempt; 0 before the first placement."""
    restarts: int = 0
    """All restarts so far: new attempts and replicas started anew, whatever their cause."""
    failures: int = 0
    """Counted failures in a row (class user, oom, hang); progress resets it."""
    failed_at_ms: int = 0
    """When the last failure was decided on."""
    infra_failures: int = 0
    """Infrastructure failures in a row; only sets the backoff."""
    held: bool = False
    not_before_ms: int = 0
    cancel_by: str = ""
    """Who asked for cancellation; empty: nobody."""
    stop_wish: Reason = Reason.NONE
    """A wish to end the attempt and queue again (HELD, RESTART_REQUESTED, …), not yet acted on."""
    wanted: Mapping[str, int] = field(default_factory=dict)
    """Role -> replica count set by `scale`; absent: the spec's `prefer`."""
    next_spec: JobSpec | None = None
    """An edit that the running attempt cannot take: the next one starts with it."""
    edits: int = 0
    """How often it was edited."""
    replicas: Mapping[ReplicaId, Replica] = field(default_factory=dict)
    """Of the current attempt; empty when QUEUED or terminal."""
    outcome: Outcome | None = None
    """Where it goes, while it is STOPPING."""
    cause: Cause | None = None
    """Root cause of the last attempt that failed, or of the end."""
    checkpoint: CheckpointMark | None = None
    suspected_since_ms: int = 0
    """Since when replicas are suspected of hanging; 0: not."""
    suspects: tuple[ReplicaId, ...] = ()
    waiting_for: tuple[JobId, ...] = ()
    """Dependencies that have not succeeded yet."""
    array_id: str = ""
    array_index: int = -1
    asked: Asked | None = None
    avoid: tuple[NodeName, ...] = ()
    """Nodes that just failed this job."""
    first_placed_at_ms: int = 0
    gpu_milli: int = 0
    """GPUs held now, in thousandths."""
    gpu_milli_ms: int = 0
    """GPU time held up to `gpu_since_ms`, in thousandths of a GPU times milliseconds; see `gpu_time`."""
    gpu_since_ms: int = 0
    first_started_at_ms: int = 0
    attempt_started_at_ms: int = 0
    waited_ms: int = 0
    """How long the current or last attempt waited for its places."""
    ran_ms: int = 0
    """Run time of ended attempts, from all replicas running to STOPPING."""
    running_since_ms: int = 0
    lost_ms: int = 0
    """Run time that preemptions cost: from the last checkpoint to the stop, in every attempt that was preempted."""
    ended_at_ms: int = 0
    coordinator_port: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    def unsaved_ms(self, now_ms: int) -> int:
        """Time of its attempt that would be lost if it stopped now without saving."""
        return max(0, now_ms - max(self.attempt_started_at_ms, self.checkpoint.at_ms if self.checkpoint else 0))

    def gpu_time(self, now_ms: int) -> int:
        """GPU time held so far, in thousandths of a GPU times milliseconds."""
        return self.gpu_milli_ms + self.gpu_milli * max(0, now_ms - self.gpu_since_ms)

    def wanted_count(self, role: str) -> int:
        return self.wanted.get(role, self.spec.roles[role].replicas.prefer)


Changes = dict[str, object]
"""Fields of a job and what they are to be."""

@dataclass(frozen=True, slots=True)
class Shape:
    """What placement needs to know of a job; jobs with equal shapes fit or do not fit alike."""

    roles: tuple[RoleShape, ...]
    within: str = ""
    prefer: str = ""
    spread: str = ""
    node_labels: tuple[tuple[str, str], ...] = ()
    tolerate: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    elastic: bool = False
    """Some role may have fewer or more replicas than it has now."""
    least_gpu_milli: int = field(init=False, repr=False, compare=False)
    """GPUs that the gang takes at its minimum."""
    by_name: Mapping[str, RoleShape] = field(init=False, repr=False, compare=False)
    """Its roles."""
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Shapes are looked up all the time; what is asked of them most is computed once."""
        object.__setattr__(self, "least_gpu_milli", sum([role.min * role.gpu_milli for role in self.roles]))
        object.__setattr__(self, "by_name", {role.role: role for role in self.roles})
        parts = (self.roles, self.within, self.prefer, self.spread, self.node_labels, self.tolerate, self.avoid)
        object.__setattr__(self, "_hash", hash(parts))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class RoleShape:
    role: str
    min: int
    prefer: int
    cpu_milli: int
    memory_bytes: int
    gpu_milli: int
    """Per replica: below 1000 a share of one device, else whole devices times 1000; 0: none."""
    gpu_kinds: tuple[str, ...] = ()
    gpu_memory_min_bytes: int = 0
    gpu_memory_max_bytes: int = 0
    """0: no upper bound."""
    ports: int = 1
    """Ports one replica needs."""
