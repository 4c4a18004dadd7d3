"""The ledger: what is free on every node, indexed so that finding a best fit costs what the answer costs.

`Cluster` owns one and keeps it true through `take` and `give`. A scheduling pass works on the same ledger inside
`trial()`: everything taken there is put back at the end, so a pass costs what it places, not what exists (the
checkpoint/rollback of KAI-Scheduler's statement.go).

Index: GPU class (kind, memory) -> count of wholly free devices -> sorted node names; class "" holds every node by its
count of free devices of all kinds, for replicas without GPUs. A class with shared devices also keeps
(free thousandths, node, gpu) in order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from jobsched.core.job import Binding, RoleShape
from jobsched.core.node import Node, kind_matches
from jobsched.core.resources import WHOLE_GPU, GpuId, GpuShare, NodeName, Resources

GpuClass = tuple[str, int]
"""(kind, memory in bytes)"""
ANY: GpuClass = ("", 0)
FEW = 3
"""Looking at each allowed node is cheaper than walking the index when they are less than one in this many."""
_Item = TypeVar("_Item", NodeName, tuple[int, NodeName, GpuId])


@dataclass(slots=True)
class Space:
    """What is free on one node."""

    node: Node
    cpu_milli: int
    memory_bytes: int
    gpu_free: dict[GpuId, int]
    """Thousandths left of each healthy GPU."""
    gpu_class: dict[GpuId, GpuClass]
    whole: dict[GpuClass, int] = field(default_factory=dict)
    ports_used: set[int] = field(default_factory=set)
    next_port: int = 0
    """Rolls through the node's range, so that a port is not handed out again soon after its release."""
    bound: int = 0
    """How many replicas are bound here."""

    @property
    def whole_total(self) -> int:
        return sum(self.whole.values())


class Ledger:
    def __init__(self) -> None:
        self.spaces: dict[NodeName, Space] = {}
        self.freed = 0
        """Rises whenever something becomes free: shapes that did not fit are worth another try."""
        self._freed_everywhere = 0
        self._freed_with: dict[tuple[str, str], int] = {}
        """Node label -> `freed` when something last became free on a node that carries it."""
        self._whole: dict[GpuClass, dict[int, list[NodeName]]] = {}
        self._shared: dict[GpuClass, list[tuple[int, NodeName, GpuId]]] = {}
        self._undo: list[tuple[Binding, RoleShape, int, int]] | None = None
        """What a trial did: (binding, role, +1 taken or -1 lent, the node's next port before)."""

    # ---- nodes ----

    def put_node(self, node: Node, bound: Iterable[tuple[Binding, RoleShape]] = ()) -> None:
        """Add a node or replace what is known of it; `bound` are the bindings that it carries."""
        self.drop_node(node.name)
        usable = [g for g in node.gpus if g.healthy]
        space = Space(
            node=node,
            cpu_milli=node.cpu_milli - node.foreign.cpu_milli,
            memory_bytes=node.memory_bytes - node.foreign.memory_bytes,
            gpu_free={g.id: WHOLE_GPU for g in usable},
            gpu_class={g.id: (g.kind.lower(), g.memory_bytes) for g in usable},
            next_port=node.port_from or node.port_lo,
        )
        for share in node.foreign_gpus:
            if share.gpu in space.gpu_free:
                space.gpu_free[share.gpu] = max(0, space.gpu_free[share.gpu] - share.milli)
        for gpu, free in space.gpu_free.items():
            cls = space.gpu_class[gpu]
            space.whole[cls] = space.whole.get(cls, 0) + (free == WHOLE_GPU)
        self.spaces[node.name] = space
        self._index(space)
        for gpu, free in space.gpu_free.items():
            if 0 < free < WHOLE_GPU:
                insort(self._shared.setdefault(space.gpu_class[gpu], []), (free, node.name, gpu))
        for binding, role in bound:
            self.take(binding, role)
        self._note_free(node)

    def drop_node(self, name: NodeName) -> None:
        space = self.spaces.pop(name, None)
        if space is None:
            return
        self._unindex(space)
        for gpu, free in space.gpu_free.items():
            if 0 < free < WHOLE_GPU:
                _remove(self._shared[space.gpu_class[gpu]], (free, name, gpu))

    def classes(self) -> tuple[GpuClass, ...]:
        """Every GPU class present, sorted."""
        return tuple(sorted(c for c in self._whole if c != ANY))

    # ---- taking and giving ----

    def take(self, binding: Binding, role: RoleShape) -> None:
        """Book a replica. A node that is gone is ignored (its resources went with it)."""
        if self._undo is not None:
            self._undo.append((binding, role, +1, self.spaces[binding.node].next_port))
        self._book(binding, role, +1)

    def lend(self, binding: Binding, role: RoleShape) -> None:
        """Inside a trial: as if a booked replica were gone."""
        assert self._undo is not None
        if binding.node in self.spaces:
            self._undo.append((binding, role, -1, self.spaces[binding.node].next_port))
            self._book(binding, role, -1)

    def give(self, binding: Binding, role: RoleShape) -> None:
        """Free a replica's booking."""
        self._book(binding, role, -1)
        space = self.spaces.get(binding.node)
        if space is not None:
            self._note_free(space.node)
        else:
            self.freed += 1  # a quota may have room again

    def unblock(self) -> None:
        """Whatever did not fit is worth another try, wherever it looks."""
        self.freed += 1
        self._freed_everywhere = self.freed

    def _note_free(self, node: Node) -> None:
        self.freed += 1
        for label in node.labels:
            self._freed_with[label] = self.freed

    def freed_for(self, labels: tuple[tuple[str, str], ...]) -> int:
        """Changes whenever something becomes free on a node that carries all these labels (and maybe more often)."""
        if not labels:
            return self.freed
        return max(self._freed_everywhere, min(self._freed_with.get(label, 0) for label in labels))

    def _book(self, binding: Binding, role: RoleShape, sign: int) -> None:
        space = self.spaces.get(binding.node)
        if space is None:
            return
        space.cpu_milli -= sign * role.cpu_milli
        space.memory_bytes -= sign * role.memory_bytes
        space.bound += sign
        if sign > 0:
            space.ports_used.update(binding.ports)
            if binding.ports:
                space.next_port = max(binding.ports) + 1
        else:
            space.ports_used.difference_update(binding.ports)
        if not binding.gpus:
            return
        self._unindex(space)
        for share in binding.gpus:
            before = space.gpu_free.get(share.gpu)
            if before is None:
                continue
            after = before - sign * share.milli
            cls = space.gpu_class[share.gpu]
            space.gpu_free[share.gpu] = after
            space.whole[cls] += (after == WHOLE_GPU) - (before == WHOLE_GPU)
            shared = self._shared.setdefault(cls, [])
            if 0 < before < WHOLE_GPU:
                _remove(shared, (before, space.node.name, share.gpu))
            if 0 < after < WHOLE_GPU:
                insort(shared, (after, space.node.name, share.gpu))
        self._index(space)

    @contextmanager
    def trial(self) -> Iterator[Ledger]:
        """Everything taken inside is put back at the end. Not re-entrant."""
        assert self._undo is None
        freed, self._undo = self.freed, []
        try:
            yield self
        finally:
            self.rollback(0)
            self._undo, self.freed = None, freed

    def mark(self) -> int:
        """A point inside a trial to roll back to."""
        assert self._undo is not None
        return len(self._undo)

    def rollback(self, mark: int) -> None:
        assert self._undo is not None
        while len(self._undo) > mark:
            binding, role, sign, next_port = self._undo.pop()
            self._book(binding, role, -sign)
            self.spaces[binding.node].next_port = next_port

    # ---- finding ----

    def matching(self, role: RoleShape) -> tuple[GpuClass, ...]:
        """GPU classes that satisfy the role, best first (order of its kinds, then smaller memory, then name)."""
        found = [c for c in self.classes() if kind_matches(c[0], role.gpu_kinds) and _memory_fits(c[1], role)]
        return tuple(sorted(found, key=lambda c: (_preference(c[0], role.gpu_kinds), c[1], c[0])))

    def best_fit(
        self,
        role: RoleShape,
        classes: tuple[GpuClass, ...],
        allowed: Callable[[Node], bool],
        among: Collection[NodeName] | None = None,
        emptiest: bool = False,
    ) -> tuple[NodeName, tuple[GpuShare, ...]] | None:
        """The feasible node that is left fullest: fewest free GPUs first, then name. `allowed` filters nodes; `among`
        names the few that are worth a look. `emptiest`: most free GPUs first (a whole GPU or more per replica only).

        O(nodes in the buckets tried, or among); a bucket's first node usually fits."""
        if role.gpu_milli == 0:
            return self._fit_whole(ANY, 0, role, allowed, among, emptiest)
        for cls in classes:
            if role.gpu_milli < WHOLE_GPU:
                found = self._fit_share(cls, role, allowed)
            else:
                found = self._fit_whole(cls, role.gpu_milli // WHOLE_GPU, role, allowed, among, emptiest)
            if found is not None:
                return found
        return None

    def _fit_whole(
        self,
        cls: GpuClass,
        count: int,
        role: RoleShape,
        allowed: Callable[[Node], bool],
        among: Collection[NodeName] | None = None,
        emptiest: bool = False,
    ) -> tuple[NodeName, tuple[GpuShare, ...]] | None:
        if among is not None and len(among) * FEW < len(self.spaces):
            return self._fit_among(cls, count, role, allowed, among, emptiest)
        buckets = self._whole.get(cls, {})
        for free in sorted(buckets, reverse=emptiest):
            if free < count:
                continue
            for name in buckets[free]:
                space = self.spaces[name]
                if _has_room(space, role) and allowed(space.node):
                    return name, self._pick(space, cls, count)
        return None

    def _fit_among(
        self,
        cls: GpuClass,
        count: int,
        role: RoleShape,
        allowed: Callable[[Node], bool],
        among: Collection[NodeName],
        emptiest: bool,
    ) -> tuple[NodeName, tuple[GpuShare, ...]] | None:
        """The same answer as from the index, by looking at each of these few nodes."""
        best: tuple[int, NodeName] | None = None
        for name in among:
            space = self.spaces.get(name)
            if space is None:
                continue
            free = space.whole_total if cls == ANY else space.whole.get(cls, -1)
            key = (-free if emptiest else free, name)
            if free >= count and (best is None or key < best) and _has_room(space, role) and allowed(space.node):
                best = key
        return None if best is None else (best[1], self._pick(self.spaces[best[1]], cls, count))

    def _fit_share(
        self, cls: GpuClass, role: RoleShape, allowed: Callable[[Node], bool]
    ) -> tuple[NodeName, tuple[GpuShare, ...]] | None:
        shared = self._shared.get(cls, [])
        for _, name, gpu in shared[bisect_left(shared, role.gpu_milli, key=lambda entry: entry[0]) :]:
            space = self.spaces[name]
            if _has_room(space, role) and allowed(space.node):
                return name, (GpuShare(gpu, role.gpu_milli),)
        found = self._fit_whole(cls, 1, role, allowed)
        return None if found is None else (found[0], (GpuShare(found[1][0].gpu, role.gpu_milli),))

    @staticmethod
    def _pick(space: Space, cls: GpuClass, count: int) -> tuple[GpuShare, ...]:
        if count == 0:
            return ()
        free = [g for g, left in space.gpu_free.items() if left == WHOLE_GPU and space.gpu_class[g] == cls]
        return tuple(GpuShare(g) for g in free[:count])

    def ports(self, name: NodeName, count: int) -> tuple[int, ...] | None:
        """`count` free ports of a node; () when the node hands out none (replicas have addresses of their own)."""
        space = self.spaces[name]
        low, high = space.node.port_lo, space.node.port_hi
        if low == 0:
            return ()
        size = high - low + 1
        found: list[int] = []
        for offset in range(size):
            port = low + (space.next_port - low + offset) % size
            if port not in space.ports_used:
                found.append(port)
                if len(found) == count:
                    return tuple(found)
        return None

    def free(self, name: NodeName) -> Resources:
        space = self.spaces[name]
        return Resources(space.cpu_milli, space.memory_bytes, sum(space.gpu_free.values()))

    # ---- index ----

    def _index(self, space: Space) -> None:
        for cls, count in (*space.whole.items(), (ANY, space.whole_total)):
            insort(self._whole.setdefault(cls, {}).setdefault(count, []), space.node.name)

    def _unindex(self, space: Space) -> None:
        for cls, count in (*space.whole.items(), (ANY, space.whole_total)):
            bucket = self._whole[cls][count]
            _remove(bucket, space.node.name)
            if not bucket:
                del self._whole[cls][count]


def _remove(items: list[_Item], item: _Item) -> None:
    at = bisect_left(items, item)
    assert items[at] == item, "the ledger's index has lost track"
    del items[at]


def _has_room(space: Space, role: RoleShape) -> bool:
    return space.cpu_milli >= role.cpu_milli and space.memory_bytes >= role.memory_bytes


def _memory_fits(memory_bytes: int, role: RoleShape) -> bool:
    high = role.gpu_memory_max_bytes
    return memory_bytes >= role.gpu_memory_min_bytes and (high == 0 or memory_bytes <= high)


def _preference(kind: str, wanted: tuple[str, ...]) -> int:
    for place, name in enumerate(wanted):
        if kind == name or kind.startswith(name + "-"):
            return place
    return len(wanted)
