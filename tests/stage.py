"""A stage for tests of the service and the API: a memory store, a cluster folded from it on demand, a backend that only
has logs, a clock that stands still, and a leader's pen to move jobs through their lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from jobsched.core import events as ev
from jobsched.core.answers import JobProgress
from jobsched.core.cluster import Cluster
from jobsched.core.events import Stored
from jobsched.core.job import Binding, Cause, FailureClass, Job, Outcome, Phase, Reason, replica_id
from jobsched.core.launch import Launch, LaunchKey, launch_key
from jobsched.core.node import Gpu, Node
from jobsched.core.observation import Observation, Sight
from jobsched.core.passes import Policy
from jobsched.core.resources import GpuId, GpuShare, JobId, NodeName
from jobsched.logs import Listener
from jobsched.ports import Capabilities, LogChunk, Store, Wake
from jobsched.service import Service
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec
from jobsched.spec.server import ServerConfig
from jobsched.store.memory import MemoryStore

GIB = 2**30


def a_spec(**fields: object) -> JobSpec:
    """One worker with one GPU unless told otherwise."""
    fields.setdefault("name", "bert")
    fields.setdefault("roles", {"worker": {"command": "true", "gpu": "any:1"}})
    return JobSpec.model_validate(fields)


def a_node(name: str = "n1", gpus: int = 4) -> Node:
    devices = tuple(Gpu(GpuId(f"{name}-g{i}"), "sim-gpu", 16 * GIB) for i in range(gpus))
    return Node(NodeName(name), 16_000, 64 * GIB, devices, port_lo=20_000, port_hi=20_999)


class StillClock:
    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self.time_ms = now_ms

    def now_ms(self) -> int:
        return self.time_ms

    def wait_until(self, instant_ms: int, wake: Wake) -> None:
        self.time_ms = max(self.time_ms, instant_ms)
        wake.clear()


class LogBackend:
    """Keeps the logs that a test writes; a followed log ends once it is closed."""

    def __init__(self) -> None:
        self.logs_of: dict[LaunchKey, bytearray] = {}
        self.ended: set[LaunchKey] = set()
        self.chunk = 7
        """Small chunks cut lines in two."""
        self._news = threading.Condition()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("test", limits="cgroup v2", stacks=True)

    def write(self, key: LaunchKey, text: str, *, end: bool = False) -> None:
        with self._news:
            self.logs_of.setdefault(key, bytearray()).extend(text.encode())
            if end:
                self.ended.add(key)
            self._news.notify_all()

    def logs(self, key: LaunchKey, offset: int = 0, follow: bool = False, timeout_ms: int = 0) -> Iterator[LogChunk]:
        if offset < 0:
            offset = max(0, len(self.logs_of.get(key, b"")) + offset)
        while True:
            with self._news:
                data = bytes(self.logs_of.get(key, b"")[offset : offset + self.chunk])
                if not data:
                    if not follow or key in self.ended:
                        return
                    self._news.wait(timeout_ms / 1_000)
            yield LogChunk(offset, data)
            offset += len(data)

    def observe(self, timeout_ms: int = 0) -> Observation:
        return Observation(full=True)

    def start(self, launches: Sequence[Launch]) -> None: ...

    def stop(self, keys: Sequence[LaunchKey], grace_ms: int) -> None: ...

    def ask_stacks(self, keys: Sequence[LaunchKey]) -> None: ...

    def forget(self, keys: Sequence[LaunchKey]) -> None: ...

    def close(self) -> None: ...


@dataclass
class StillHealth:
    ticks: int = 1
    last_tick_ms: float = 0.5
    store_error: str = ""
    backend_error: str = ""
    rejected: int = 0


class FoldedView:
    """`LiveView` over a store: folds what is new whenever somebody looks."""

    def __init__(self, store: Store) -> None:
        self.leading = True
        self.policy = Policy()
        self.health = StillHealth()
        self.cluster = Cluster()
        self.sight = Sight()
        self.progress_of: dict[JobId, JobProgress] = {}
        self.woken = 0
        self._store = store
        self._lock = threading.RLock()
        self.listeners: list[Listener] = []

    @contextmanager
    def view(self) -> Iterator[tuple[Cluster, Sight]]:
        self.fold()
        with self._lock:
            yield self.cluster, self.sight

    def wake(self) -> None:
        self.woken += 1
        self.fold()

    def caught_up(self, seq: int, timeout_s: float) -> bool:
        return False

    def fold(self) -> None:
        with self._lock:
            while batch := self._store.read(self.cluster.seq, 1_000):
                for stored in batch:
                    self.cluster.evolve(stored.event, stored.seq)
                self.tell(batch)

    def tell(self, batch: Sequence[Stored]) -> None:
        for listener in list(self.listeners):
            listener(batch, frozenset())

    def report(self, job_id: JobId, progress: JobProgress) -> None:
        """A replica tells how far it is."""
        self.progress_of[job_id] = progress
        for listener in list(self.listeners):
            listener((), frozenset({job_id}))

    def progress(self, job_id: JobId) -> JobProgress | None:
        return self.progress_of.get(job_id)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)


class Stage:
    """Everything together. One queue, `nodes` nodes of four GPUs."""

    def __init__(self, nodes: int = 1) -> None:
        self.store = MemoryStore()
        self.clock = StillClock()
        self.backend = LogBackend()
        self.live = FoldedView(self.store)
        self.service = Service(
            self.store, self.live, self.backend, self.clock, priority_classes=ServerConfig().priority_classes
        )
        self.decide(ev.QueueDefined(0, QueueSpec()), *(ev.NodeSeen(0, a_node(f"n{i + 1}")) for i in range(nodes)))

    def decide(self, *events: ev.Event) -> None:
        """Append as the leader."""
        lease = self.store.lease("stage", 60_000, self.clock.now_ms())
        assert lease is not None
        appended = self.store.append(events, fence=lease.fence)
        assert not appended.rejected
        self.live.fold()

    def submit(self, **fields: object) -> Job:
        return self.service.submit(a_spec(**fields), owner="ann").jobs[0].job

    def job(self, job_id: JobId) -> Job:
        job = self.store.job(job_id)
        assert job is not None
        return job

    def run(self, job: Job) -> Job:
        """Place and start every replica on the first node."""
        attempt, now_ms = job.attempt + 1, self.clock.now_ms()
        bindings, gpu = [], 0
        for name, role in job.spec.roles.items():
            for index in range(job.wanted_count(name)):
                count = role.gpu.count if role.gpu else 0
                shares = tuple(GpuShare(GpuId(f"n1-g{gpu + i}")) for i in range(count))
                gpu += count
                bindings.append(Binding(name, index, NodeName("n1"), shares, (20_000 + len(bindings),)))
        self.decide(
            ev.AttemptPlaced(now_ms, job.id, attempt, tuple(bindings)),
            ev.ReplicasStarted(now_ms, job.id, attempt, tuple(b.id for b in bindings)),
            ev.AttemptStarted(now_ms, job.id, attempt),
        )
        return self.job(job.id)

    def end(self, job: Job, phase: Phase = Phase.SUCCEEDED, exit_code: int = 0) -> Job:
        """End the attempt towards `phase`; QUEUED restarts the job."""
        now_ms = self.clock.now_ms()
        cause = None if phase is Phase.SUCCEEDED else Cause(Reason.EXIT_CODE, FailureClass.USER, f"code {exit_code}")
        reason = Reason.COMPLETED if phase is Phase.SUCCEEDED else Reason.EXIT_CODE
        self.decide(
            *(ev.ReplicaExited(now_ms, job.id, job.attempt, r.role, r.index, exit_code) for r in job.replicas.values()),
            ev.AttemptStopping(now_ms, job.id, job.attempt, Outcome(phase, reason, cause)),
            ev.AttemptEnded(now_ms, job.id, job.attempt, phase),
        )
        return self.job(job.id)

    def restart_replica(self, job: Job, role: str, index: int) -> Job:
        now_ms, rid = self.clock.now_ms(), replica_id(role, index)
        self.decide(
            ev.ReplicaExited(now_ms, job.id, job.attempt, role, index, signal=9),
            ev.ReplicasRestarted(now_ms, job.id, job.attempt, (rid,), Cause(Reason.SIGNAL)),
            ev.ReplicasStarted(now_ms, job.id, job.attempt, (rid,)),
        )
        return self.job(job.id)

    @staticmethod
    def key(job: Job, role: str = "worker", index: int = 0) -> LaunchKey:
        return launch_key(job.id, job.attempt, role, index, job.replicas[replica_id(role, index)].restart)
