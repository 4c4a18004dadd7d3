"""Suspicion: what was held against one node lately. Folded by `Cluster` and `Fleet` from failures; weighed
by `policies.health`.

Not durable: a server that starts anew begins without suspicions. Probation, which follows from them, is: as a cordon.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import exp2
from typing import Final

from jobsched.core import events as ev
from jobsched.core.job import FailureClass, Job, Reason, replica_id
from jobsched.core.node import Node
from jobsched.core.resources import GpuId, NodeName

BY = "jobsched"
"""Who cordons nodes that are on probation, and owns their checks."""
PREFLIGHT_LABEL = "jobsched.dev/preflight"
"""On a check: the node it checks."""
KEPT = 32
"""Newest accusations kept per node."""

_BY_REASON = {Reason.GPU_ERROR: 1.0, Reason.REPLICA_LOST: 1.0, Reason.IMAGE_ERROR: 0.0, Reason.PORT_CONFLICT: 0.0,
              Reason.NODE_LOST: 0.0, Reason.SIGNAL: 0.5}  # fmt: skip
"""A lost node is one accusation, however many jobs it takes with it: `against_node` has it."""
_BY_CLASS = {FailureClass.INFRA: 1.0, FailureClass.HANG: 0.5, FailureClass.USER: 0.25}


@dataclass(frozen=True, slots=True)
class Accusation:
    """One job's failure, or a failure of the node itself."""

    who: str
    """The same for all failures of one job: it counts once."""
    what: str
    weight: float
    at_ms: int
    gpus: tuple[GpuId, ...] = ()
    """Which the failed replica held."""


@dataclass(slots=True)
class Suspicion:
    accusations: dict[str, Accusation] = field(default_factory=dict)
    """By who; newest last."""

    def add(self, new: Accusation) -> None:
        old = self.accusations.pop(new.who, None)
        self.accusations[new.who] = new if old is None or old.weight <= new.weight else old
        if len(self.accusations) > KEPT:
            del self.accusations[next(iter(self.accusations))]

    def score(self, now_ms: int, half_life_ms: int) -> float:
        """Sum of the weights, each halved every `half_life_ms`."""
        return sum(a.weight * exp2(-max(0, now_ms - a.at_ms) / half_life_ms) for a in self.accusations.values())

    def the_gpu(self) -> GpuId | None:
        """The one GPU that was there each time; None: there is no such one, or several."""
        found = [set(a.gpus) for a in self.accusations.values()]
        common = set.intersection(*found) if found else set()
        return min(common) if len(common) == 1 else None

    def said(self) -> str:
        """The accusations in words."""
        newest = list(self.accusations.values())[-4:]
        return f"{len(self.accusations)} failures: " + ", ".join(a.what for a in newest)


ACCUSING: Final = frozenset((ev.AttemptStopping, ev.ReplicasRestarted, ev.ReplicasUnbound))
"""Events that may hold something against a node."""


def accusation(job: Job | None, event: ev.Event) -> tuple[NodeName, Accusation] | None:
    """What an event holds against a node; `job` is the event's job before it."""
    if isinstance(event, ev.AttemptStopping):
        cause = event.outcome.cause
    elif isinstance(event, ev.ReplicasRestarted | ev.ReplicasUnbound):
        cause = event.cause
    else:
        return None
    if cause is None or not cause.node or job is None or job.owner == BY:
        return None
    killed = cause.reason is Reason.EXIT_CODE and (cause.exit_code or 0) > 128  # by a signal, as shells tell it
    reason = Reason.SIGNAL if killed else cause.reason
    weight = _BY_REASON.get(reason, _BY_CLASS.get(cause.failure_class, 0.0))
    if not weight:
        return None
    replica = job.replicas.get(replica_id(cause.role, cause.index))
    gpus = tuple(share.gpu for share in replica.binding.gpus) if replica and replica.binding else ()
    return NodeName(cause.node), Accusation(job.id, f"{job.name} ({cause.reason})", weight, event.at_ms, gpus)


def against_node(before: Node | None, event: ev.NodeSeen | ev.NodeLost) -> Iterator[Accusation]:
    """The node was lost, or a GPU of it broke."""
    if isinstance(event, ev.NodeLost):
        yield Accusation(f"lost at {event.at_ms}", "the node was lost", 1.0, event.at_ms)
    elif before is not None:
        sound = {gpu.id for gpu in before.gpus if gpu.healthy}
        for gpu in event.node.gpus:
            if not gpu.healthy and gpu.id in sound:
                yield Accusation(f"{gpu.id} at {event.at_ms}", f"{gpu.id} broke", 1.0, event.at_ms, (gpu.id,))


@dataclass(frozen=True, slots=True)
class Checked:
    """How the last pre-flight check of a node on probation ended."""

    at_ms: int
    in_a_row: int
    """Checks that failed since the last one that passed; 0: it passed."""
