"""Plans: the ordered result of one scheduling pass, as the decisions (events) that would carry it out."""

from __future__ import annotations

from dataclasses import dataclass

from jobsched.core import events as ev
from jobsched.core.job import Binding, RoleShape
from jobsched.core.resources import JobId

Decision = ev.AttemptPlaced | ev.ReplicasBound | ev.ReplicasReleased | ev.AttemptStopping


@dataclass(frozen=True, slots=True)
class Plan:
    decisions: tuple[Decision, ...] = ()
    examined: int = 0
    """How many jobs the pass looked at; what a pass costs."""


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
    """`Cluster.pools_moved` when it was made: another number, and the nodes are not what they were."""
