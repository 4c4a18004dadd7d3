"""Node pools: nodes that do not exist yet and can be had. Values only; `policies.provisioning` decides, backends that
can make nodes carry out the `Demand`s.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobsched.core.node import Gpu, Node
from jobsched.core.resources import GpuId, NodeName

BY = "jobsched pools"
"""Who cordons nodes that are let go."""
PORT_LO, PORT_HI = 20_000, 32_000
"""What an imagined node has; the real one tells its own."""


@dataclass(frozen=True, slots=True)
class NodePool:
    """Like nodes. A node belongs to the pool whose `labels` it all has."""

    name: str
    cpu_milli: int
    memory_bytes: int
    gpu_kind: str = ""
    gpus: int = 0
    gpu_memory_bytes: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    """Sorted; never empty."""
    taints: tuple[str, ...] = ()
    min: int = 0
    """Nodes that are always kept."""
    max: int = 1
    price: int = 0
    """Of a node for an hour, in thousandths of whatever the user counts in; only compared."""
    delay_ms: int = 300_000
    """How long nodes usually take to come; after twice as long they are late."""
    idle_ms: int = 600_000
    """A node that nobody used for so long is let go."""

    def has(self, node: Node) -> bool:
        return all(pair in node.labels for pair in self.labels)

    def node(self, index: int) -> Node:
        """One of its nodes as it will be when it comes."""
        name = f"{self.name}-{index}"
        gpus = tuple(Gpu(GpuId(f"{name}-{i}"), self.gpu_kind, self.gpu_memory_bytes) for i in range(self.gpus))
        return Node(
            NodeName(name), self.cpu_milli, self.memory_bytes, gpus, port_lo=PORT_LO, port_hi=PORT_HI,
            labels=self.labels, taints=self.taints,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Demand:
    """What should exist of one pool. All of it or, while it is not all there, nothing is used: the gangs that wait for
    it start whole."""

    pool: NodePool
    nodes: int
    """How many, those in `release` not counted."""
    release: tuple[NodeName, ...] = ()
    """Nodes that are to go: nothing runs on them and nothing will."""
