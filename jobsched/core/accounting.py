"""Report terms, each defined once: queue delay, JCT, makespan, allocation, goodput. Pure; folds the event log.

Used by the simulator's reports and by anything else that sums up a log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jobsched.core import events as ev
from jobsched.core.job import Binding, Phase, Reason
from jobsched.core.node import Node
from jobsched.core.resources import WHOLE_GPU, JobId, NodeName


@dataclass(slots=True)
class JobAccount:
    """One job's life in instants (0: not yet) and amounts."""

    job_id: JobId
    queue: str
    owner: str
    submitted_ms: int
    first_placed_ms: int = 0
    ended_ms: int = 0
    phase: Phase = Phase.QUEUED
    attempts: int = 0
    preemptions: int = 0
    rescales: int = 0
    gpu_ms: int = 0
    """GPU-milliseconds held."""
    gpus: int = 0
    """GPUs of its last placement."""
    spells: list[tuple[int, int, int]] = field(default_factory=list)
    """(from, to, GPUs) of each attempt, for Gantt charts."""

    @property
    def jct_ms(self) -> int:
        """Job completion time: submission to end."""
        return self.ended_ms - self.submitted_ms

    @property
    def queue_delay_ms(self) -> int:
        """Submission to first placement."""
        return self.first_placed_ms - self.submitted_ms


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a run. Percentiles are nearest rank: sorted[int(q n)]."""

    jobs: int
    ended: int
    avg_jct_s: float
    p50_jct_s: float
    p99_jct_s: float
    avg_queue_s: float
    p99_queue_s: float
    makespan_s: float
    gpu_allocation_pct: float
    fragmentation_pct: float
    preemptions: int
    rescales: int
    restarts: int

    def to_dict(self) -> dict[str, object]:
        return {
            "jobs": self.jobs,
            "avg_jct_s": self.avg_jct_s,
            "p50_jct_s": self.p50_jct_s,
            "p99_jct_s": self.p99_jct_s,
            "avg_queue_s": self.avg_queue_s,
            "p99_queue_s": self.p99_queue_s,
            "makespan_s": self.makespan_s,
            "gpu_allocation_pct": self.gpu_allocation_pct,
            "unallocated_gpu_pct": round(100 - self.gpu_allocation_pct, 3),
            "fragmentation_pct": self.fragmentation_pct,
            "preemptions": self.preemptions,
            "rescales": self.rescales,
            "restarts": self.restarts,
        }


class Point(NamedTuple):
    """How things stood from an instant on."""

    at_ms: int
    milli: int
    """Thousandths of GPUs held."""
    waiting: int
    """Jobs."""
    capacity_milli: int


def _gpu_milli(node: Node) -> int:
    return WHOLE_GPU * len(node.gpus)


def gpus_of(bindings: Iterable[Binding]) -> int:
    """GPUs held, in thousandths."""
    return sum(share.milli for binding in bindings for share in binding.gpus)


@dataclass(slots=True)
class Accounts:
    """A log folded into what reports need."""

    start_ms: int
    capacity_milli: int
    jobs: dict[JobId, JobAccount] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    """Whenever something changed."""
    _on_demand: dict[NodeName, int] = field(default_factory=dict)
    """Thousandths of GPUs of the nodes that are there besides; None of `of`'s nodes are."""
    _listed: frozenset[NodeName] = frozenset()
    _held: dict[JobId, dict[str, int]] = field(default_factory=dict)
    """Job -> replica -> thousandths."""
    _since: dict[JobId, int] = field(default_factory=dict)
    _milli: int = 0
    _waiting: int = 0

    @classmethod
    def of(cls, nodes: Sequence[Node], events: Iterable[ev.Event], start_ms: int) -> Accounts:
        """`nodes`: those that count as there all the time; others count while they are."""
        accounts = cls(start_ms, sum(map(_gpu_milli, nodes)), _listed=frozenset(node.name for node in nodes))
        for event in events:
            accounts.add(event)
        return accounts

    def add(self, event: ev.Event) -> None:
        """Fold one event."""
        match event:
            case ev.JobSubmitted(at_ms=at, job_id=job_id):
                self.jobs[job_id] = JobAccount(job_id, event.spec.queue, event.owner, at)
                self._waiting += 1
            case ev.AttemptPlaced(at_ms=at, job_id=job_id, bindings=bindings):
                job = self.jobs[job_id]
                job.first_placed_ms = job.first_placed_ms or at
                job.attempts += 1
                job.gpus = gpus_of(bindings) // WHOLE_GPU
                self._waiting -= 1
                self._since[job_id] = at
                self._hold(job_id, {b.id: gpus_of((b,)) for b in bindings})
            case ev.ReplicasBound(job_id=job_id, bindings=bindings):
                self.jobs[job_id].rescales += 1
                self._hold(job_id, {b.id: gpus_of((b,)) for b in bindings})
            case ev.ReplicasUnbound() | ev.ReplicasGone():
                self._drop(event.job_id, event.replicas)
            case ev.AttemptStopping(job_id=job_id, outcome=outcome):
                job = self.jobs[job_id]
                job.preemptions += outcome.reason in (Reason.PREEMPTED, Reason.MOVED)
                job.rescales += outcome.reason is Reason.RESCALED
                return
            case ev.AttemptEnded(at_ms=at, job_id=job_id, phase=phase):
                job, since = self.jobs[job_id], self._since.pop(job_id)
                held = sum(self._held.get(job_id, {}).values())
                job.spells.append((since, at, held // WHOLE_GPU))
                job.gpu_ms += held * (at - since) // WHOLE_GPU
                self._drop(job_id, tuple(self._held.pop(job_id, {})), held)
                self._end(job, phase, at)
            case ev.JobEnded(at_ms=at, job_id=job_id, phase=phase):
                self._waiting -= 1
                self._end(self.jobs[job_id], phase, at)
            case ev.NodeSeen(node=node) if node.name not in self._listed:
                self._there(node.name, _gpu_milli(node))
            case ev.NodeLost(node=name) if name in self._on_demand:
                self._there(name, 0)
            case _:
                return
        self._note(event.at_ms)

    def _there(self, name: NodeName, milli: int) -> None:
        self.capacity_milli += milli - self._on_demand.get(name, 0)
        self._on_demand[name] = milli

    def _end(self, job: JobAccount, phase: Phase, at_ms: int) -> None:
        job.phase = phase
        if phase.terminal:
            job.ended_ms = at_ms
        else:
            self._waiting += 1

    def _hold(self, job_id: JobId, more: dict[str, int]) -> None:
        self._held.setdefault(job_id, {}).update(more)
        self._milli += sum(more.values())

    def _drop(self, job_id: JobId, replicas: Iterable[str], milli: int | None = None) -> None:
        held = self._held.get(job_id, {})
        self._milli -= sum(held.pop(r, 0) for r in replicas) if milli is None else milli

    def _note(self, at_ms: int) -> None:
        if self.points and self.points[-1][0] == at_ms:
            self.points.pop()
        self.points.append(Point(at_ms, self._milli, self._waiting, self.capacity_milli))

    @property
    def end_ms(self) -> int:
        return max((self.start_ms, *(job.ended_ms for job in self.jobs.values())))

    def summary(self) -> Summary:
        jobs = list(self.jobs.values())
        done = [job for job in jobs if job.phase.terminal]
        jct = sorted(job.jct_ms for job in done)
        waits = sorted(job.queue_delay_ms for job in jobs if job.first_placed_ms)
        begin = min((job.submitted_ms for job in jobs), default=self.start_ms)
        end = max(begin, self.end_ms)
        held = idle_while_waiting = room = 0
        for point, then in zip(self.points, self.points[1:], strict=False):
            for_ms = max(0, min(end, then.at_ms) - max(begin, point.at_ms))  # some jobs never end
            held += point.milli * for_ms
            room += point.capacity_milli * for_ms
            if point.waiting:
                idle_while_waiting += (point.capacity_milli - point.milli) * for_ms
        room = max(1, room)
        return Summary(
            jobs=len(jobs),
            ended=len(done),
            avg_jct_s=_mean_s(jct),
            p50_jct_s=quantile_s(jct, 0.5),
            p99_jct_s=quantile_s(jct, 0.99),
            avg_queue_s=_mean_s(waits),
            p99_queue_s=quantile_s(waits, 0.99),
            makespan_s=(end - begin) / 1_000,
            gpu_allocation_pct=round(100 * held / room, 3),
            fragmentation_pct=round(100 * idle_while_waiting / room, 3),
            preemptions=sum(job.preemptions for job in jobs),
            rescales=sum(job.rescales for job in jobs),
            restarts=sum(max(0, job.attempts - 1 - job.preemptions - job.rescales) for job in jobs),
        )


def _mean_s(values: Sequence[int]) -> float:
    return round(sum(values) / len(values) / 1_000, 3) if values else 0.0


def quantile_s(ordered: Sequence[int], q: float) -> float:
    """Nearest rank of sorted milliseconds, in seconds: `ordered[int(q n)]`."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] / 1_000 if ordered else 0.0
