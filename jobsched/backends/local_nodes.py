"""The nodes of the local backend: this machine as it is, or virtual nodes that divide it in name only.

Used by `registry` (what the config asks for) and `LocalBackend` (what is so now). For tests and demonstrations, a file
`HOME/nodes/NAME.down` makes a node unready, its text being the message, and `NAME.gone` makes it vanish: behind the
back of everything else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobsched.backends.gpus import Inventory, Ours, read_inventory
from jobsched.core.node import Gpu, Node
from jobsched.core.resources import GpuId, NodeName

GPU_REFRESH_S = 10.0
FOREIGN_REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class VirtualGroup:
    """Like virtual nodes `PREFIX-0`, `PREFIX-1`, …: `gpus` are (kind, count) pairs of one node."""

    count: int
    name_prefix: str = "node"
    cpu_milli: int = 8_000
    memory_bytes: int = 32 * 2**30
    gpus: tuple[tuple[str, int], ...] = ()
    gpu_memory_bytes: int = 16 * 2**30
    labels: tuple[tuple[str, str], ...] = ()
    taints: tuple[str, ...] = ()


def virtual_nodes(groups: Iterable[VirtualGroup], port_lo: int, port_hi: int, skew: int = 0) -> tuple[Node, ...]:
    """Nodes of all groups, each with an equal share of the ports, because they are all on one address."""
    nodes = [_virtual_node(group, index) for group in groups for index in range(group.count)]
    return share_ports(nodes, port_lo, port_hi, skew)


def share_ports(nodes: Sequence[Node], port_lo: int, port_hi: int, skew: int = 0) -> tuple[Node, ...]:
    """Split `port_lo..port_hi` (inclusive) evenly; handing out begins `skew` (any number) into each share. ValueError
    when there is not even one port for each."""
    each = (port_hi - port_lo + 1) // max(len(nodes), 1)
    if nodes and each < 1:
        raise ValueError(f"{len(nodes)} nodes need more ports than {port_lo}-{port_hi}")
    firsts = range(port_lo, port_hi + 1, max(each, 1))
    return tuple(
        replace(node, port_lo=lo, port_hi=lo + each - 1, port_from=lo + skew % each)
        for node, lo in zip(nodes, firsts, strict=False)
    )


def _virtual_node(group: VirtualGroup, index: int) -> Node:
    name = f"{group.name_prefix}-{index}"
    kinds = [kind for kind, count in group.gpus for _ in range(count)]
    gpus = tuple(Gpu(GpuId(f"{name}/sim-{at}"), kind, group.gpu_memory_bytes) for at, kind in enumerate(kinds))
    labels = tuple(sorted(group.labels))
    return Node(NodeName(name), group.cpu_milli, group.memory_bytes, gpus, labels=labels, taints=group.taints)


NodeSource = Callable[[Ours], tuple[Node, ...]]
"""The nodes now."""


def fixed(nodes: Sequence[Node]) -> NodeSource:
    """Nodes that never change."""
    return lambda _: tuple(nodes)


@dataclass(slots=True)
class Machine:
    """This machine as one node; a `NodeSource`. GPUs are looked at again every ten seconds, and every second while
    others use some: a process that has just ended still counts for a moment."""

    name: str = field(default_factory=lambda: os.uname().nodename)
    port_lo: int = 20_000
    port_hi: int = 32_000
    port_from: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    inventory: Callable[[Ours], Inventory] = read_inventory
    _seen: Inventory = field(default_factory=Inventory)
    _seen_at: float = -GPU_REFRESH_S

    def __call__(self, ours: Ours) -> tuple[Node, ...]:
        if time.monotonic() - self._seen_at >= (FOREIGN_REFRESH_S if self._seen.foreign else GPU_REFRESH_S):
            self._seen, self._seen_at = self.inventory(ours), time.monotonic()
        return (Node(
            NodeName(self.name), cpu_milli=len(os.sched_getaffinity(0)) * 1_000, memory_bytes=_memory_bytes(),
            gpus=self._seen.gpus, port_lo=self.port_lo, port_hi=self.port_hi,
            port_from=self.port_from, labels=tuple(sorted(self.labels)),
            foreign_gpus=self._seen.foreign, message=self._seen.message,
        ),)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def overlaid(nodes: Sequence[Node], directory: Path) -> tuple[Node, ...]:
    """The nodes as the files in `directory` make them out to be."""
    try:
        files = set(os.listdir(directory))
    except FileNotFoundError:
        return tuple(nodes)
    shown = []
    for node in nodes:
        if f"{node.name}.gone" in files:
            continue
        if f"{node.name}.down" in files:
            message = (directory / f"{node.name}.down").read_text().strip() or "taken down"
            node = replace(node, ready=False, message=message)
        shown.append(node)
    return tuple(shown)
