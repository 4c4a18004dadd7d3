"""Plans: the ordered result of one scheduling pass, as the decisions (events) that would carry it out."""

from __future__ import annotations

from jobsched.core import events as ev
from jobsched.core.job import Binding, Job, RoleShape
from jobsched.core.resources import JobId
from jobsched.core.values import dataclass

Decision = ev.AttemptPlaced | ev.ReplicasBound | ev.ReplicasReleased | ev.AttemptStopping


@dataclass(frozen=True, slots=True)
class Plan:
    decisions: tuple[Decision, ...] = ()
    examined: int = 0
    """How many jobs the pass looked at; what a pass costs."""
    more: bool = False
    """It broke off: the next has more to decide at once."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A future claim of a waiting job: these seats, at this instant. `key`: where the job stands in the policy's order;
    only jobs behind it have to respect the claim."""

    job_id: JobId
    at_ms: int
    seats: tuple[tuple[Binding, RoleShape], ...]
    key: tuple[int, int, int, str]
    coordinator_port: int = 0
    made_for: int = 0
    """`Fleet.moved` when it was made: another number, and the nodes are not what they were."""
    queue: str = ""
    """Set: it is a claim, too, on what this queue may take; the queue's own jobs have to respect that."""
    owner: str = ""
    """Set: on what this user's jobs may take there."""

    def limits(self, job: Job) -> bool:
        """Whether the other job would take of the queue's limit that is claimed."""
        return bool(self.queue) and (
            self.queue == job.spec.queue and self.owner in ("", job.owner) and job.id != self.job_id
        )

    def binds(self, job: Job) -> bool:
        """Whether the other job has to respect the claim at all."""
        return job.id != self.job_id and (bool(self.seats) or self.limits(job))


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a job starts: `after_ms` if all take as long as half of their like did and who leaves does so at once,
    `before_ms` if as long as nine in ten did and who leaves takes all its grace; 0 when that cannot be told, and
    `unknown` says why. `by`: what the run times of the jobs that end before are known from (`Estimates.source`),
    "leaving" where somebody leaves, "pace" where only the first of very many were looked at."""

    after_ms: int = 0
    before_ms: int = 0
    by: tuple[str, ...] = ()
    unknown: str = ""
