"""Plans: the ordered result of one scheduling pass, as the decisions (events) that would carry it out."""

from __future__ import annotations

from dataclasses import dataclass

from jobsched.core import events as ev

Decision = ev.AttemptPlaced | ev.ReplicasBound | ev.ReplicasReleased | ev.AttemptStopping


@dataclass(frozen=True, slots=True)
class Plan:
    decisions: tuple[Decision, ...] = ()
    examined: int = 0
    """How many jobs the pass looked at; what a pass costs."""
