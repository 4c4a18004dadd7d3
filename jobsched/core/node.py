"""Nodes and their GPUs, as a backend reports them. Read by placement, judge and launch."""

from __future__ import annotations

from jobsched.core.resources import NOTHING, GpuId, GpuShare, NodeName, Resources
from jobsched.core.values import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU or MIG slice. `kind` is lower case, for example `h100-80gb` or `h100-80gb:1g.10gb`."""

    id: GpuId
    kind: str
    memory_bytes: int = 0
    healthy: bool = True
    island: str = ""
    """NVLink island within its node, where there are several."""


@dataclass(frozen=True, slots=True)
class Cordon:
    """Bind nothing new on a node; on the named GPUs only where there are some."""

    drain: bool = False
    """What runs there saves and moves away."""
    by: str = ""
    why: str = ""
    since_ms: int = 0
    gpus: tuple[GpuId, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """A machine (or virtual machine part) offering capacity.

    `foreign` and `foreign_gpus` are what others use; `labels` are sorted pairs; topology domains are labels too
    (`rack`, `zone`, `nvlink`). `address` is where replicas on this node are reached when the backend addresses by node;
    `port_lo..port_hi` (inclusive, lo 0: none) are the ports jobsched may hand out there.
    """

    name: NodeName
    cpu_milli: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    address: str = "127.0.0.1"
    port_lo: int = 0
    port_hi: int = 0
    port_from: int = 0
    """Where handing out begins (0: at `port_lo`): different per server, so that two on one machine rarely meet."""
    labels: tuple[tuple[str, str], ...] = ()
    taints: tuple[str, ...] = ()
    foreign: Resources = NOTHING
    foreign_gpus: tuple[GpuShare, ...] = ()
    ready: bool = True
    message: str = ""

    def label(self, key: str) -> str:
        for name, value in self.labels:
            if name == key:
                return value
        return ""


def domain(node: Node, level: str) -> str:
    """Name of the node's domain at a topology level; a node without the label is a domain of its own."""
    return str(node.name) if level == "node" else node.label(level) or f"node {node.name}"


def kind_matches(kind: str, wanted: tuple[str, ...]) -> bool:
    """Whether a GPU of `kind` satisfies a request: empty means any whole device; `h100` matches `h100-80gb`, but not
    its MIG slices (those are asked for by their full kind)."""
    if not wanted:
        return ":" not in kind
    return any(kind == w or (kind.startswith(w + "-") and ":" not in kind) for w in (k.lower() for k in wanted))
