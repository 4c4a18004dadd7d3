"""What a backend reported: nodes and replicas, in full or as changes. Read by judge and converge, made by backends.

Ages, not instants: clocks of other machines are never trusted, so a backend says "3,200 ms ago" and judge subtracts
that from the server's own clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from jobsched.core.job import Reason
from jobsched.core.launch import LaunchKey
from jobsched.core.node import Node
from jobsched.core.resources import NodeName


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


@dataclass(slots=True)
class Sight:
    """All observations folded: the newest report per replica and node. Owned by the controller, rebuilt on start by a
    full observation; `fold` returns what changed."""

    replicas: dict[LaunchKey, ReplicaReport] = field(default_factory=dict)
    nodes: dict[NodeName, Node] = field(default_factory=dict)
    step_at_ms: dict[LaunchKey, int] = field(default_factory=dict)
    beat_at_ms: dict[LaunchKey, int] = field(default_factory=dict)

    def fold(self, observation: Observation, now_ms: int) -> tuple[set[LaunchKey], set[NodeName]]:
        """Apply; returns keys and nodes that appeared, changed or went. O(size of the observation), plus O(known) when full."""
        keys: set[LaunchKey] = set()
        names: set[NodeName] = set()
        for report in observation.replicas:
            if self.replicas.get(report.key) != report:
                keys.add(report.key)
            self.replicas[report.key] = report
            if report.progress is not None:
                self.step_at_ms[report.key] = now_ms - report.progress.step_age_ms
                self.beat_at_ms[report.key] = now_ms - report.progress.beat_age_ms
        gone = set(observation.gone)
        lost_nodes = set(observation.gone_nodes)
        if observation.full:
            listed = {r.key for r in observation.replicas}
            gone |= self.replicas.keys() - listed
            lost_nodes |= self.nodes.keys() - {n.name for n in observation.nodes}
        for key in gone:
            if self.replicas.pop(key, None) is not None:
                keys.add(key)
            self.step_at_ms.pop(key, None)
            self.beat_at_ms.pop(key, None)
        for node in observation.nodes:
            if self.nodes.get(node.name) != node:
                names.add(node.name)
                self.nodes[node.name] = node
        for name in lost_nodes:
            if self.nodes.pop(name, None) is not None:
                names.add(name)
        return keys, names


