"""What an append does: a pure step from values to values that every store takes, so that they agree by construction.

`MemoryStore` keeps one `Projections` as its whole state; `SqlStore` fills one with the rows that an append touches,
steps it, and writes back what changed. No I/O, no clock, no locks here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from jobsched.core import events as ev
from jobsched.core.fleet import cordon_of
from jobsched.core.job import Job
from jobsched.core.lifecycle import Illegal, evolve_job
from jobsched.core.node import Cordon, Node
from jobsched.core.resources import JobId, NodeName
from jobsched.errors import StaleFence
from jobsched.ports import Appended, Lease, Loaded, Rejected
from jobsched.spec.queue import QueueSpec

SAMPLES_KEPT: Final = 1_000
"""Newest progress samples kept per job."""

Request = tuple[str, str]
"""(owner, request_id): what makes two submissions one."""


def request_of(event: ev.Event) -> Request | None:
    """The identity of a submission that may be sent twice; None for everything else."""
    if isinstance(event, ev.JobSubmitted) and event.request_id:
        return event.owner, event.request_id
    return None


NodeEvent = ev.NodeSeen | ev.NodeLost | ev.NodeCordoned | ev.NodeUncordoned
APPLIED: Final = frozenset(
    (ev.JobSubmitted, ev.NodeSeen, ev.NodeLost, ev.NodeCordoned, ev.NodeUncordoned, ev.QueueDefined)
)
"""Events that change more than their job."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node with what was decided about it. `node` is None while it is only known by name (cordoned beforehand)."""

    node: Node | None = None
    lost: bool = False
    cordon: Cordon | None = None


def evolve_node(state: NodeState, event: NodeEvent) -> NodeState:
    match event:
        case ev.NodeSeen(node=node):
            return replace(state, node=node, lost=False)
        case ev.NodeLost():
            return replace(state, lost=True)
        case ev.NodeCordoned():
            return replace(state, cordon=cordon_of(event))
        case ev.NodeUncordoned():
            return replace(state, cordon=None)


def node_of(event: NodeEvent) -> NodeName:
    return event.node.name if isinstance(event, ev.NodeSeen) else event.node


def loaded(seq: int, jobs: Sequence[Job], nodes: Mapping[NodeName, NodeState], queues: Sequence[QueueSpec]) -> Loaded:
    """The answer of `Store.load`; nodes by name."""
    states = sorted(nodes.items())
    return Loaded(
        seq=seq,
        jobs=tuple(jobs),
        nodes=tuple(s.node for _, s in states if s.node is not None),
        lost_nodes=tuple(name for name, s in states if s.lost),
        cordoned=tuple((name, s.cordon) for name, s in states if s.cordon is not None),
        queues=tuple(sorted(queues, key=lambda q: q.name)),
    )


def assert_wishes(events: Sequence[ev.Event]) -> None:
    """Only wishes may come without a fence: a decision without one is its writer's mistake."""
    assert all(map(ev.is_wish, events)), "decisions need the leader's fence"


def check_fence(fence: int | None, current: int) -> None:
    """`StaleFence` unless `fence` is the current leader's, or not needed (None)."""
    if fence is not None and fence != current:
        raise StaleFence(
            f"fence {fence} is not the leader's: that is {current}",
            hint="another server leads now; this one stops deciding until it holds the lease again",
        )


def next_lease(current: Lease, holder: str, ttl_ms: int, now_ms: int) -> Lease | None:
    """The lease after `holder` asks for it at `now_ms`; None while somebody else's has not run out. An empty holder
    means that nobody leads; the fence outlives its holder, so that it never falls."""
    if current.holder == holder:
        return replace(current, expires_ms=now_ms + ttl_ms)
    if current.holder and current.expires_ms > now_ms:
        return None
    return Lease(holder, current.fence + 1, now_ms + ttl_ms)


@dataclass(slots=True)
class Projections:
    """The log's end and what is folded from it: all of it, or the part that some appends touch."""

    seq: int = 0
    jobs: dict[JobId, Job] = field(default_factory=dict)
    nodes: dict[NodeName, NodeState] = field(default_factory=dict)
    queues: dict[str, QueueSpec] = field(default_factory=dict)
    requests: dict[Request, ev.Stored] = field(default_factory=dict)

    def append(self, events: Sequence[ev.Event], expected: Mapping[JobId, int]) -> Appended:
        """Number and apply `events`; see `Store.append`. O(events). An event that its job's phase does not allow
        rejects the job like a version that moved on. Changes nothing when it raises."""
        jobs, rejected, repeats = self._judge(events, expected)
        stored: list[ev.Stored] = []
        seq = self.seq
        for place, event in enumerate(events):
            if repeats and place in repeats:
                stored += filter(None, [self.requests.get(repeats[place])])
            elif not rejected or event.job_id not in rejected:
                seq += 1
                stored.append(entry := ev.Stored(seq, event))
                if type(event) in APPLIED:
                    self._apply(entry)
        self.seq = seq
        self.jobs.update(jobs)
        return Appended(tuple(stored), tuple(rejected.values()) if rejected else ())

    def _judge(
        self, events: Sequence[ev.Event], expected: Mapping[JobId, int]
    ) -> tuple[dict[JobId, Job], dict[JobId | None, Rejected], dict[int, Request]]:
        """Fold each job's events aside: (jobs that changed, jobs rejected, places of submissions that are repeats)."""
        changed: dict[JobId, Job] = {}
        rejected: dict[JobId | None, Rejected] = {}
        repeats: dict[int, Request] = {}
        fresh: set[Request] = set()
        for place, event in enumerate(events):
            if event.job_id is None:
                continue
            job_id = event.job_id
            request = request_of(event) if type(event) is ev.JobSubmitted else None
            if request is not None and (request in self.requests or request in fresh):
                repeats[place] = request
                continue
            if rejected and job_id in rejected:
                continue
            before = changed.get(job_id)
            try:
                if before is None:
                    before = self.jobs.get(job_id)
                    version = 0 if before is None else before.version
                    if expected.get(job_id, version) != version:
                        raise Illegal(f"job {job_id} is at version {version}")
                changed[job_id] = evolve_job(before, event)
            except Illegal:
                changed.pop(job_id, None)
                known = self.jobs.get(job_id)
                version = known.version if known is not None else 0
                rejected[job_id] = Rejected(job_id, expected.get(job_id, version), version)
            else:
                if request is not None:
                    fresh.add(request)
        return changed, rejected, repeats

    def _apply(self, stored: ev.Stored) -> None:
        match stored.event:
            case ev.JobSubmitted() as event:
                request = request_of(event)
                if request is not None:
                    self.requests[request] = stored
            case ev.NodeSeen() | ev.NodeLost() | ev.NodeCordoned() | ev.NodeUncordoned() as event:
                name = node_of(event)
                self.nodes[name] = evolve_node(self.nodes.get(name, NodeState()), event)
            case ev.QueueDefined(queue=queue):
                self.queues[queue.name] = queue
            case _:
                pass
