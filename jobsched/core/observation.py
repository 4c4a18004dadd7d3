"""What a backend reported: nodes and replicas, in full or as changes. Read by judge and converge, made by backends.

Ages, not instants: clocks of other machines are never trusted, so a backend says "3,200 ms ago" and judge subtracts
that from the server's own clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from enum import StrEnum

from jobsched.core.job import Reason
from jobsched.core.launch import LaunchKey
from jobsched.core.node import Node
from jobsched.core.resources import JobId, NodeName
from jobsched.core.values import dataclass


class Seen(StrEnum):
    """State of a replica as the engine tells it."""

    STARTING = "starting"
    """Accepted, not running yet (image pull, container creation)."""
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Progress:
    """The newest report of a replica through `jobsched.train` (or any line of the report protocol).

    `step_age_ms` is the time since `step` last changed, `beat_age_ms` since any report came. `saved_step` /
    `saved_path` are the last checkpoint that the replica acknowledged. `metrics` are sorted (name, value) pairs.
    """

    step: int = -1
    total: int = -1
    step_age_ms: int = 0
    beat_age_ms: int = 0
    saved_step: int = -1
    saved_path: str = ""
    world_size: int = 0
    metrics: tuple[tuple[str, float], ...] = ()
    message: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One replica as the engine sees it.

    `failure` is set when a replica never ran or was ended by the engine (IMAGE_ERROR, PORT_CONFLICT, START_FAILED, OOM,
    NODE_LOST, …), with `message` for people. Exactly one of `exit_code` and `signal` is set for an EXITED process
    whose end was seen; both None: the end was not seen (lost). `tail` holds its last log lines, `stacks` the answer to
    `Ask.STACKS`.
    """

    key: LaunchKey
    node: NodeName
    state: Seen
    exit_code: int | None = None
    signal: int | None = None
    failure: Reason = Reason.NONE
    message: str = ""
    progress: Progress | None = None
    tail: tuple[str, ...] = ()
    stacks: str = ""
    ident: str = ""
    """What the engine calls it: pid, container id, pod name."""
    ended_age_ms: int = 0
    """Time since its end, so that the first of several failures can be told."""
    idle_age_ms: int = -1
    """Time since its processes last used any CPU, when the engine knows; -1: unknown. A second sign beside a lost
    heartbeat."""


NO_LAUNCH = LaunchKey("")
NO_NODE = NodeName("")


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that an engine says of its own accord about a replica or a node: scheduling, images, evictions, kills.
    For people to read; nothing is decided by it."""

    at_ms: int
    """When it happened last, by the engine's clock."""
    reason: str
    message: str = ""
    key: LaunchKey = NO_LAUNCH
    """The replica's; empty: it is about the node."""
    node: NodeName = NO_NODE
    warning: bool = False
    count: int = 1
    """How often it was told."""


@dataclass(frozen=True, slots=True)
class Observation:
    """`full`: everything there is, so absence means gone; otherwise only what changed since the last call.

    `gone` are replicas that the engine has forgotten (reaped after their end was reported, or removed behind our
    back); `gone_nodes` likewise.
    """

    full: bool
    nodes: tuple[Node, ...] = ()
    replicas: tuple[ReplicaReport, ...] = ()
    gone: tuple[LaunchKey, ...] = ()
    gone_nodes: tuple[NodeName, ...] = ()


NO_NEWS = Observation(full=False)


@dataclass(slots=True)
class Sight:
    """All observations folded: the newest report per replica and node. Owned by the controller, rebuilt on start by a
    full observation; `fold` returns what changed."""

    replicas: dict[LaunchKey, ReplicaReport] = field(default_factory=dict)
    nodes: dict[NodeName, Node] = field(default_factory=dict)
    step_at_ms: dict[LaunchKey, int] = field(default_factory=dict)
    beat_at_ms: dict[LaunchKey, int] = field(default_factory=dict)
    absent_at_ms: dict[LaunchKey, int] = field(default_factory=dict)
    """When a replica that had been seen was first missing."""
    node_absent_at_ms: dict[NodeName, int] = field(default_factory=dict)
    ordered_at_ms: dict[LaunchKey, int] = field(default_factory=dict)
    """When this process last ordered a start of a replica that has not been seen yet."""
    observed_at_ms: int = 0
    by_job: dict[JobId, set[LaunchKey]] = field(default_factory=dict)

    def fold(self, observation: Observation, now_ms: int) -> tuple[set[JobId], set[NodeName]]:
        """Apply; returns jobs and nodes of which something appeared, changed or went. O(size of the observation), plus
        O(known replicas) when it is full."""
        jobs: set[JobId] = set()
        names: set[NodeName] = set()
        self.observed_at_ms = now_ms
        if observation is NO_NEWS:
            return jobs, names
        for report in observation.replicas:
            key = report.key
            job_id = JobId(key.split("/", 1)[0])
            before = self.replicas.get(key)
            self.replicas[key] = report
            if before is None:
                jobs.add(job_id)
                self.by_job.setdefault(job_id, set()).add(key)
                self.absent_at_ms.pop(key, None)
                self.ordered_at_ms.pop(key, None)
            elif before != report:
                jobs.add(job_id)
            if report.progress is not None:
                if report.progress.step >= 0:
                    self.step_at_ms[key] = now_ms - report.progress.step_age_ms
                self.beat_at_ms[key] = now_ms - report.progress.beat_age_ms
        gone: Iterable[LaunchKey] = observation.gone
        lost_nodes: Iterable[NodeName] = observation.gone_nodes
        if observation.full:
            listed = {r.key for r in observation.replicas}
            gone = {*gone, *(self.replicas.keys() - listed)}
            lost_nodes = {*lost_nodes, *(self.nodes.keys() - {n.name for n in observation.nodes})}
        for key in gone:
            if self.replicas.pop(key, None) is not None or key in self.ordered_at_ms:
                self.absent_at_ms[key] = now_ms
                jobs.add(JobId(key.split("/", 1)[0]))
        for node in observation.nodes:
            self.node_absent_at_ms.pop(node.name, None)
            if self.nodes.get(node.name) != node:
                names.add(node.name)
                self.nodes[node.name] = node
        for name in lost_nodes:
            if self.nodes.pop(name, None) is not None:
                self.node_absent_at_ms[name] = now_ms
                names.add(name)
        return jobs, names

    def forget(self, keys: Iterable[LaunchKey]) -> None:
        """The engine was told that it may drop these, whose end is in the log: that it has is no news."""
        for key in keys:
            job_id = JobId(key.split("/", 1)[0])
            known = self.by_job.get(job_id)
            if known is not None:
                known.discard(key)
                if not known:
                    del self.by_job[job_id]
            self.replicas.pop(key, None)
            self._forget_instants(key)

    def forget_ended(self, job_id: JobId) -> None:
        """Drop what is remembered of a job that is over, once none of its replicas exist any more."""
        keys = self.by_job[job_id]
        if keys.isdisjoint(self.replicas):
            del self.by_job[job_id]
            for key in keys:
                self._forget_instants(key)

    def _forget_instants(self, key: LaunchKey) -> None:
        for instants in (self.step_at_ms, self.beat_at_ms, self.absent_at_ms, self.ordered_at_ms):
            instants.pop(key, None)

    def alive(self, key: LaunchKey) -> bool:
        report = self.replicas.get(key)
        return report is not None and report.state is not Seen.EXITED
