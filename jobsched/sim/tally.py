"""What happened in a run, counted by sort: a run in which something never happens proves nothing about it.

Fed with the log by `sim.faults`, shown by `jobsched simulate --faults` and the fault tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from jobsched.core import events as ev
from jobsched.core.job import Binding, Job, Phase, Reason
from jobsched.core.pools import BY as POOLS
from jobsched.core.resources import NO_JOB, WHOLE_GPU, GpuId, JobId, NodeName
from jobsched.core.suspicion import BY as TRUST

SORTS = (
    "starts", "starts on a part of a GPU", "starts in the places it kept", "grows in place",
    "shrinks in place by itself", "changes its size by a restart", "shrinks in place for priority",
    "shrinks in place for its lender", "shrinks by a restart for priority", "shrinks by a restart for its lender",
    "stops for priority", "stops for its lender", "gives way to a second job", "moves", "fails and starts anew",
    "replica starts anew in place", "replica loses its node", "saves", "nodes asked for", "nodes come late",
    "node let go", "node on probation", "job held", "job scaled by its user", "job cancelled",
    "node closed by an operator",
)  # fmt: skip
"""What a run of a mixed workload with faults is to show."""


@dataclass(slots=True)
class Tally:
    """Counts by sort."""

    counts: Counter[str] = field(default_factory=Counter)
    _claimant: dict[JobId, JobId] = field(default_factory=dict)
    """Job -> the last one for which it gave way."""
    _smaller: dict[JobId, set[tuple[NodeName, GpuId]]] = field(default_factory=dict)
    """Who starts anew with fewer replicas for another job -> the GPUs that it had."""

    def add(self, event: ev.Event, jobs: Mapping[JobId, Job]) -> None:
        """`jobs`: as they are once it is folded."""
        sort = self._sort(event, jobs)
        if sort:
            self.counts[sort] += 1

    def __str__(self) -> str:
        return ", ".join([f"{sort} {self.counts[sort]:,}" for sort in SORTS if self.counts[sort]]) or "nothing"

    def missing(self) -> list[str]:
        """What never happened."""
        return [sort for sort in SORTS if not self.counts[sort]]

    def _sort(self, event: ev.Event, jobs: Mapping[JobId, Job]) -> str:
        match event:
            case ev.AttemptPlaced(job_id=job_id, bindings=bindings):
                had = self._smaller.pop(job_id, set())
                if had and had.issuperset(_gpus(bindings)):
                    self.counts["starts in the places it kept"] += 1
                if any(_part(binding) for binding in bindings):
                    self.counts["starts on a part of a GPU"] += 1
                return "starts"
            case ev.ReplicasBound():
                return "grows in place"
            case ev.ReplicasReleased(job_id=job_id, for_job=for_job):
                return f"shrinks in place {self._right(job_id, for_job, jobs)}"
            case ev.AttemptStopping(job_id=job_id, outcome=outcome) if outcome.reason is Reason.RESCALED:
                if not outcome.for_job:
                    return "changes its size by a restart"
                replicas = jobs[job_id].replicas.values()
                self.counts["gives way to a second job"] += len(outcome.also_for)
                self._smaller[job_id] = set(_gpus(r.binding for r in replicas if r.binding is not None))
                return f"shrinks by a restart {self._right(job_id, outcome.for_job, jobs)}"
            case ev.AttemptStopping(job_id=job_id, outcome=outcome) if outcome.reason is Reason.PREEMPTED:
                return f"stops {self._right(job_id, outcome.for_job, jobs)}"
            case ev.AttemptStopping(outcome=outcome) if outcome.reason is Reason.MOVED:
                return "moves"
            case ev.AttemptStopping(outcome=outcome) if outcome.phase is Phase.QUEUED:
                return "fails and starts anew"
            case ev.ReplicasRestarted():
                return "replica starts anew in place"
            case ev.ReplicasUnbound():
                return "replica loses its node"
            case ev.CheckpointSaved():
                return "saves"
            case ev.CapacityRequested():
                return "nodes asked for"
            case ev.CapacityWithdrawn(late=True):
                return "nodes come late"
            case ev.NodeCordoned(by=by) if by in (POOLS, TRUST):
                return "node let go" if by == POOLS else "node on probation"
            case ev.NodeCordoned():
                return "node closed by an operator"
            case ev.JobHeld():
                return "job held"
            case ev.JobScaled():
                return "job scaled by its user"
            case ev.JobCancelRequested():
                return "job cancelled"
        return ""

    def _right(self, job_id: JobId, for_job: JobId, jobs: Mapping[JobId, Job]) -> str:
        """For whom a job gives way, by what right; counts when that is another one than last time."""
        if for_job == NO_JOB:
            return "by itself"
        before = self._claimant.get(job_id)
        self._claimant[job_id] = for_job
        if before not in (None, for_job):
            self.counts["gives way to a second job"] += 1
        victim, claimant = jobs[job_id], jobs[for_job]
        same = victim.spec.queue == claimant.spec.queue
        return "for priority" if same or victim.priority < claimant.priority else "for its lender"


def _gpus(bindings: Iterable[Binding]) -> Iterator[tuple[NodeName, GpuId]]:
    yield from ((binding.node, share.gpu) for binding in bindings for share in binding.gpus)


def _part(binding: Binding) -> bool:
    return any(share.milli < WHOLE_GPU for share in binding.gpus)
