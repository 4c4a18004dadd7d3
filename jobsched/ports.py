"""The three seams: Backend, Store and Clock, with the value types that only they use.

Everything that acts stands behind one of these. `tests/contracts/` holds one abstract suite per port; every
implementation, the in-memory ones and the simulator included, inherits it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Literal, Protocol, runtime_checkable

from jobsched.core.events import Event, Stored
from jobsched.core.job import Job, Phase
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.node import Cordon, Node
from jobsched.core.observation import Incident, Observation
from jobsched.core.pools import Demand
from jobsched.core.recall import Recall
from jobsched.core.resources import JobId, NodeName
from jobsched.core.values import dataclass
from jobsched.spec.queue import QueueSpec


class Addressing(StrEnum):
    """How peers of a job find one another."""

    NODE = "node"
    """host = the node's address, ports handed out per node."""
    NAME = "name"
    """host = a stable name per replica, known before it starts; the ports in the spec are free to use."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do; `doctor` prints it, core reads it through launch rendering.

    `absence_is_final`: a replica missing from a full listing has ended (its supervisor is the parent); otherwise
    absence must last for the fence time. `name_template` (for NAME): `{job}`, `{attempt}`, `{role}`, `{index}`.
    """

    name: str
    addressing: Addressing = Addressing.NODE
    name_template: str = ""
    absence_is_final: bool = False
    lost_after_ms: int = 30_000
    warm_start: bool = False
    stacks: bool = False
    limits: str = "none"
    """How CPU and memory limits are enforced: `cgroup v2`, `cgroup v1`, `rlimit`, `container`, `none`."""
    checkpoint_root: str = ""
    """Directory or URL under which a job without `checkpoint.dir` keeps its checkpoints, a sub-directory per job id."""
    report: str = ""
    """Address that replicas use for reports, may hold `{key}`."""


@dataclass(frozen=True, slots=True)
class LogChunk:
    """Some bytes of a replica's log, whole lines where possible; `offset` counts from the log's true beginning, so that
    a reader can go on after a disconnect even when the head has been rotated away."""

    offset: int
    data: bytes


class Backend(Protocol):
    """Where replicas run. Never raises for an outcome (the next observation tells), only
    `errors.BackendUnreachable` when the engine cannot be reached. Thread-safe: `logs` may run beside the others."""

    @property
    def capabilities(self) -> Capabilities: ...

    def observe(self, timeout_ms: int = 0) -> Observation:
        """Nodes and replicas. The first call is full; later ones may be changes only. Waits up to `timeout_ms` for a
        change when there is none yet (0: never waits)."""
        ...

    def start(self, launches: Sequence[Launch]) -> None:
        """Order these replicas; idempotent per key (a key that ever started is not started again). May part-succeed."""
        ...

    def stop(self, keys: Sequence[LaunchKey], grace_ms: int) -> None:
        """Order these replicas to save and end: checkpoint signal, then SIGTERM at the acknowledgement or after
        `grace_ms`, then SIGKILL. Returns at once; idempotent; a shorter grace later shortens the wait; unknown keys
        are fine. Ended replicas are forgotten with `forget`."""
        ...

    def ask_stacks(self, keys: Sequence[LaunchKey]) -> None:
        """Capture the stacks of these replicas; the answer comes in `ReplicaReport.stacks` and the log. Best effort."""
        ...

    def forget(self, keys: Sequence[LaunchKey]) -> None:
        """The end of these replicas is recorded in the log: the engine may drop them (their logs stay). Idempotent."""
        ...

    def logs(self, key: LaunchKey, offset: int = 0, follow: bool = False, timeout_ms: int = 0) -> Iterator[LogChunk]:
        """Log bytes from `offset` (negative: from that many bytes before the end). `follow` goes on until the replica
        has ended, yielding empty chunks at least every `timeout_ms` so that the caller can stop."""
        ...

    def close(self) -> None:
        """Let go of the engine; running replicas go on."""
        ...


@runtime_checkable
class Provisioner(Protocol):
    """What a backend besides implements if it can have nodes made (`core.policies.provisioning`)."""

    def provision(self, demands: Sequence[Demand]) -> None:
        """From now on so many nodes of each pool should exist, and those in `release` should go. Says the whole each
        time, so it is idempotent and the last one holds; returns at once. New nodes are observed like any; until then
        nothing is known of them, and nodes that never come are no error: the asker gives up by itself. Raises
        BackendUnreachable: it is told again."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """Size of the terminal that a command shall have."""

    rows: int = 24
    columns: int = 80


@dataclass(frozen=True, slots=True)
class Output:
    """Some bytes that came out of a session; `error`: on stderr, where that is apart."""

    data: bytes
    error: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing more will come. `code` as a shell tells it: 128 + N for signal N; 0 for a connection that was closed."""

    code: int


class Session(Protocol):
    """A command beside a replica's own, or a connection to one of its ports, for as long as it lasts. One thread
    receives while another may do the rest. BackendUnreachable from any method when the engine is lost."""

    def receive(self, timeout_s: float) -> Output | Ended | None:
        """What came next; None when nothing did in time. After `Ended` it is not asked again."""
        ...

    def send(self, data: bytes) -> None:
        """To stdin, or into the connection. Blocks while the other side does not take it; what comes after its end is
        dropped."""
        ...

    def end_input(self) -> None:
        """Nothing more will be sent."""
        ...

    def resize(self, window: Window) -> None: ...

    def close(self) -> None:
        """End it, if it has not ended by itself. Idempotent."""
        ...


@runtime_checkable
class Reach(Protocol):
    """What a backend besides implements if people can get at its running replicas. `Conflict` when the replica does not
    run (any more), BackendUnreachable when the engine cannot be reached. What happens in a session never touches the
    replica's own command, and ends with it."""

    def execute(
        self, key: LaunchKey, command: Sequence[str], window: Window | None = None, *, stdin: bool = True
    ) -> Session:
        """Run a command beside the replica's own: in its environment, directory (or container), with its GPUs and
        limits; on a terminal of its own if a window is given; without `stdin` it has nothing to read. What cannot be
        run ends with 126 or 127, its reason on stderr, as in a shell."""
        ...

    def ask_checkpoint(self, keys: Sequence[LaunchKey]) -> Sequence[LaunchKey]:
        """Send the checkpoint signal to those processes of these replicas that catch it, and let them go on. The
        replicas that have one; what they save comes in their progress. Strangers and ended ones are fine."""
        ...

    def connect(self, key: LaunchKey, port: int) -> Session:
        """A connection to a TCP port on which the replica listens, at least on its loopback. `error` output tells why
        it broke off."""
        ...


@runtime_checkable
class Chronicle(Protocol):
    """What a backend besides implements if its engine tells more than the state of replicas. The engine's memory is the
    only one: it is short, and the adapter keeps no more than some hundred of them."""

    def incidents(self, job_id: JobId, nodes: Sequence[NodeName] = ()) -> Sequence[Incident]:
        """What it said lately about replicas of the job and about these nodes, oldest first. Never waits."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a leader needs to begin: live jobs, nodes, queues, and the position they are folded up to."""

    seq: int
    jobs: tuple[Job, ...] = ()
    nodes: tuple[Node, ...] = ()
    lost_nodes: tuple[NodeName, ...] = ()
    cordoned: tuple[tuple[NodeName, Cordon], ...] = ()
    queues: tuple[QueueSpec, ...] = ()
    ended: tuple[tuple[JobId, bool], ...] = ()
    """For every job that a live one still waits for but that has ended: whether it succeeded."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A time-bound right to lead. `fence` rises with every new holder."""

    holder: str
    fence: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class JobQuery:
    """Selection for a listing; empty fields select everything. Newest first, `before` continues after a page."""

    phases: tuple[Phase, ...] = ()
    queue: str = ""
    owner: str = ""
    name: str = ""
    array_id: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    id_prefix: str = ""
    submitted_after_ms: int = 0
    before: JobId | None = None
    limit: int = 100


OWN_METRICS = "jobsched."
"""How metrics of samples begin that are jobsched's own, and not shown to anybody."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A progress sample of one job for the side table: never an event, may be lost in a crash."""

    job_id: JobId
    at_ms: int
    attempt: int
    step: int
    total: int
    world_size: int
    metrics: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What one user's jobs in one queue used and waited, over some span of time."""

    queue: str
    owner: str
    jobs: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    gpu_milli_ms: int = 0
    """GPU time held, in thousandths of a GPU times milliseconds."""
    placed: int = 0
    """Jobs that were placed at least once."""
    waited_ms: int = 0
    """Sum of their waits, from submission to first placement."""
    longest_wait_ms: int = 0


@dataclass(frozen=True, slots=True)
class Rejected:
    """A job of an append whose version had moved on; its events were not written, the others were."""

    job_id: JobId
    expected: int
    actual: int


@dataclass(frozen=True, slots=True)
class Appended:
    stored: tuple[Stored, ...]
    rejected: tuple[Rejected, ...] = ()


class Store(Protocol):
    """Event log and projections in one transaction. Raises `StoreUnavailable` when it cannot be reached."""

    def append(
        self, events: Sequence[Event], expected: Mapping[JobId, int] | None = None, fence: int | None = None
    ) -> Appended:
        """Write events in order; durable when it returns. All or nothing per job: a job whose version differs from
        `expected[job]` is rejected alone, with all its events. `fence` is required for decisions (`StaleFence` if a
        newer leader exists) and left out for wishes. A `JobSubmitted` whose (owner, request_id) is known already is not
        written again: the first one's `Stored` is returned in its place."""
        ...

    def read(self, after: int, limit: int = 10_000) -> Sequence[Stored]:
        """Events with seq > after, in order."""
        ...

    def history(self, job_id: JobId, after: int = 0, limit: int = 10_000) -> Sequence[Stored]:
        """Events of one job, in order."""
        ...

    def load(self) -> Loaded: ...

    def job(self, job_id: JobId) -> Job | None: ...

    def jobs(self, query: JobQuery) -> Sequence[Job]: ...

    def count(self, by: Literal["phase", "queue"] = "phase") -> Mapping[str, int]:
        """Jobs per phase (all), or live jobs per queue."""
        ...

    def usage(self, since_ms: int, now_ms: int) -> Sequence[Usage]:
        """Of the jobs that live or ended at `since_ms` or later, by queue and owner. O(jobs)."""
        ...

    def add_samples(self, samples: Sequence[Sample]) -> None: ...

    def samples(self, job_id: JobId, limit: int = 1_000) -> Sequence[Sample]:
        """Newest last."""
        ...

    def keep_recall(self, recall: Recall, fence: int) -> None:
        """Keep what the leader knows beyond the projections, in place of what was kept before. May be lost in a power
        cut. `StaleFence` if a newer leader exists."""
        ...

    def recall(self) -> Recall | None:
        """What was kept last; None when there is none, or it cannot be read any more."""
        ...

    def lease(self, holder: str, ttl_ms: int, now_ms: int) -> Lease | None:
        """Take or renew the leader's lease; None while somebody else holds it."""
        ...

    def release(self, holder: str) -> None: ...

    def last_seq(self) -> int: ...

    def close(self) -> None: ...


class Wake(Protocol):
    """Something that can end a `Clock.wait_until` early (a `threading.Event` is one)."""

    def wait(self, timeout: float | None = None) -> bool: ...

    def clear(self) -> None: ...

    def set(self) -> None: ...

    def is_set(self) -> bool: ...


class Clock(Protocol):
    def now_ms(self) -> int:
        """Milliseconds since the epoch; never goes backwards within a process."""
        ...

    def wait_until(self, instant_ms: int, wake: Wake) -> None:
        """Return at `instant_ms` or when `wake` is set, whichever comes first; clears `wake`."""
        ...


__all__ = [
    "OWN_METRICS", "Addressing", "Appended", "Backend", "Capabilities", "Chronicle", "Clock", "Ended", "Incident",
    "Job", "JobQuery", "Lease", "Loaded", "LogChunk", "Output", "Provisioner", "Reach", "Rejected", "Sample", "Session",
    "Store", "Usage", "Wake", "Window",
]
