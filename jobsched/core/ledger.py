"""The ledger: what is free on every node, indexed so that finding a fit costs what the answer costs.

`Cluster` owns one and keeps it true through `take` and `give`. A scheduling pass works on the same ledger inside
`trial()`: everything taken there is put back at the end, so a pass costs what it places, not what exists (the
checkpoint/rollback of KAI-Scheduler's statement.go).

Indexes: GPU class (kind, memory) -> count of wholly free devices -> sorted node names, where class `ANY` holds every
node by its free devices of all kinds, once there are replicas without GPUs; a class with shared devices also keeps
(free thousandths, node, gpu) in order; a topology level that someone asked for keeps the free devices of each domain.
`changes` names the nodes that were touched, for rankings that keep up (`policies/ranking.py`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import TypeVar

from jobsched.core.job import Binding, RoleShape, Shape
from jobsched.core.node import Node, domain, kind_matches
from jobsched.core.resources import WHOLE_GPU, GpuId, GpuShare, NodeName, Resources
from jobsched.core.values import dataclass

GpuClass = tuple[str, int]
"""(kind, memory in bytes)"""
ANY: GpuClass = ("", 0)
GpuState = tuple[tuple[GpuClass, tuple[int, ...]], ...]
FEW = 3
"""Looking at each allowed node is cheaper than walking the index when they are less than one in this many."""
CHANGES_KEPT = 50_000
STOCKS_KEPT = 1_000
_Item = TypeVar("_Item", NodeName, tuple[int, NodeName, GpuId])


Labels = tuple[tuple[str, str], ...]


@dataclass(eq=False, slots=True)
class Stock:
    """What is free on all nodes that carry certain labels."""

    labels: Labels
    free_milli: int = 0
    """Thousandths of GPUs."""
    freed: int = 0
    """Rises whenever something becomes free there: what did not fit is worth another try."""

    def of(self, node: Node) -> bool:
        """Whether it is one of these nodes."""
        return all(node.label(key) == value for key, value in self.labels)


@dataclass(slots=True)
class Space:
    """What is free on one node."""

    node: Node
    cpu_milli: int
    memory_bytes: int
    gpu_free: dict[GpuId, int]
    """Thousandths left of each healthy GPU."""
    gpu_class: dict[GpuId, GpuClass]
    island: dict[GpuId, str]
    """NVLink island of each GPU, where a node has several."""
    whole: dict[GpuClass, int] = field(default_factory=dict)
    whole_total: int = 0
    """Wholly free GPUs of all classes."""
    ports_used: set[int] = field(default_factory=set)
    next_port: int = 0
    """Rolls through the node's range, so that a port is not handed out again soon after its release."""
    bound: int = 0
    """How many replicas are bound here."""
    stocks: list[Stock] = field(default_factory=list)
    """Those that the node belongs to."""
    notes: dict[tuple[int, GpuClass], tuple[object, int]] = field(default_factory=dict)
    """What scores found out about the node; gone as soon as anything is taken or freed."""
    _levels: dict[GpuClass, tuple[int, ...]] = field(default_factory=dict)
    _state: GpuState | None = None

    def gpu_state(self) -> GpuState:
        """Every class with its levels: nodes that agree in this, CPUs and memory are alike."""
        if self._state is None:
            self._state = tuple([(cls, self.levels(cls)) for cls in self.whole])
        return self._state

    def levels(self, cls: GpuClass) -> tuple[int, ...]:
        """Thousandths left of each GPU of a class, sorted."""
        found = self._levels.get(cls)
        if found is None:
            free = self.gpu_free
            found = self._levels[cls] = tuple(sorted([free[g] for g, c in self.gpu_class.items() if c == cls]))
        return found

    def capacity(self, role: RoleShape, cls: GpuClass, most: int) -> int:
        """How many replicas of the role fit here, with GPUs of one class; counts to `most` only."""
        if role.gpu_milli >= WHOLE_GPU:
            most = min(most, self.whole.get(cls, 0) // (role.gpu_milli // WHOLE_GPU))
        elif role.gpu_milli:
            most = min(most, sum(level // role.gpu_milli for level in self.levels(cls)))
        if role.cpu_milli:
            most = min(most, self.cpu_milli // role.cpu_milli)
        if role.memory_bytes:
            most = min(most, self.memory_bytes // role.memory_bytes)
        node = self.node
        if node.port_lo and role.ports:
            most = min(most, (node.port_hi - node.port_lo + 1 - len(self.ports_used)) // role.ports)
        return max(0, most)

    def pick(self, cls: GpuClass, count: int) -> tuple[GpuShare, ...]:
        """Wholly free GPUs of a class, of one NVLink island where one has as many: of the fullest such; else of the
        emptiest islands first, so that few take part."""
        if count == 0:
            return ()
        free = [g for g, left in self.gpu_free.items() if left == WHOLE_GPU and self.gpu_class[g] == cls]
        if self.island and len(free) > count:
            islands: dict[str, list[GpuId]] = {}
            for gpu in free:
                islands.setdefault(self.island[gpu], []).append(gpu)
            by_size = sorted(islands.values(), key=len)
            enough = [gpus for gpus in by_size if len(gpus) >= count]
            free = enough[0] if enough else [gpu for gpus in reversed(by_size) for gpu in gpus]
        return tuple([GpuShare(g) for g in free[:count]])

    def pick_share(self, cls: GpuClass, milli: int, level: int) -> tuple[GpuShare, ...]:
        """A share of the first GPU of a class that has exactly `level` thousandths left."""
        for gpu, left in self.gpu_free.items():
            if left == level and self.gpu_class[gpu] == cls:
                return (GpuShare(gpu, milli),)
        raise AssertionError(f"no GPU of {self.node.name} has {level} thousandths left")


@dataclass(slots=True)
class Level:
    """The domains of one topology level."""

    members: dict[str, dict[NodeName, None]] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)
    """Wholly free GPUs of each domain."""


@dataclass(frozen=True, slots=True)
class Short:
    """Why a gang did not fit: the first role that fell short, and how many of its replicas found a place."""

    role: RoleShape
    placed: int


class Ledger:
    def __init__(self) -> None:
        self.spaces: dict[NodeName, Space] = {}
        self.freed = 0
        """Rises whenever something becomes free: shapes that did not fit are worth another try."""
        self.changes: list[NodeName] = []
        """Nodes touched, in order; `changes_from` were dropped from its front."""
        self.changes_from = 0
        self.everywhere = Stock(())
        self.misfits: dict[int, tuple[Shape, Short]] = {}
        """By identity, shapes that were found not to fit since something last became free. Kept by `placement`."""
        self._misfits_at = 0
        """How much of a trial had been done when one of these was last noted; going back behind that forgets them."""
        self._stocks: dict[Labels, Stock] = {(): self.everywhere}
        self._freed_everywhere = 0
        self._whole: dict[GpuClass, dict[int, list[NodeName]]] = {}
        self._shared: dict[GpuClass, list[tuple[int, NodeName, GpuId]]] = {}
        self._levels: dict[str, Level] = {}
        self._matching: dict[tuple[object, ...], tuple[tuple[GpuClass, ...], ...]] = {}
        self._undo: list[tuple[Binding, RoleShape, int, int]] | None = None
        """What a trial did: (binding, role, +1 taken or -1 lent, the node's next port before)."""
        self._freed_before = 0
        """`freed` when the trial began."""
        self._stays: list[Binding] = []
        """What the trial under way decided on."""
        self._kept: dict[int, tuple[Binding, RoleShape, int, int]] = {}
        """By identity of the binding, what the last trial took and decided on, as in `_undo`: still taken, so that it
        need not be booked three times."""

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
            island={g.id: g.island for g in usable} if any(g.island for g in usable) else {},
            next_port=node.port_from or node.port_lo,
        )
        for share in node.foreign_gpus:
            if share.gpu in space.gpu_free:
                space.gpu_free[share.gpu] = max(0, space.gpu_free[share.gpu] - share.milli)
        for gpu, free in space.gpu_free.items():
            cls = space.gpu_class[gpu]
            if cls not in self._whole:
                self._matching.clear()
            space.whole[cls] = space.whole.get(cls, 0) + (free == WHOLE_GPU)
        space.whole_total = sum(space.whole.values())
        space.stocks += [stock for stock in self._stocks.values() if stock.of(node)]
        for stock in space.stocks:
            stock.free_milli += sum(space.gpu_free.values())
        self.spaces[node.name] = space
        for cls in space.whole:
            self._whole.setdefault(cls, {})
        for cls, count in self._counts(space):
            insort(self._whole[cls].setdefault(count, []), node.name)
        for gpu, free in space.gpu_free.items():
            if 0 < free < WHOLE_GPU:
                insort(self._shared.setdefault(space.gpu_class[gpu], []), (free, node.name, gpu))
        for name, level in self._levels.items():
            _join(level, domain(node, name), space)
        for binding, role in bound:
            self.take(binding, role)
        self._note_free(space)
        self.misfits.clear()
        self.note_change(node.name)

    def drop_node(self, name: NodeName) -> None:
        self.settle()
        space = self.spaces.pop(name, None)
        if space is None:
            return
        for stock in space.stocks:
            stock.free_milli -= sum(space.gpu_free.values())
        for cls, count in self._counts(space):
            self._leave_bucket(self._whole[cls], count, name)
        for gpu, free in space.gpu_free.items():
            if 0 < free < WHOLE_GPU:
                _remove(self._shared[space.gpu_class[gpu]], (free, name, gpu))
        for level_name, level in self._levels.items():
            key = domain(space.node, level_name)
            del level.members[key][name]
            level.free[key] -= space.whole_total
            if not level.members[key]:
                del level.members[key], level.free[key]
        self.note_change(name)

    def classes(self) -> tuple[GpuClass, ...]:
        """Every GPU class present, sorted."""
        return tuple(sorted(c for c in self._whole if c != ANY))

    def level(self, name: str) -> Level:
        """The domains of a topology level. O(nodes) when first asked for, kept true from then on."""
        level = self._levels.get(name)
        if level is None:
            level = self._levels[name] = Level()
            for space in self.spaces.values():
                _join(level, domain(space.node, name), space)
        return level

    def note_change(self, name: NodeName) -> None:
        """Something about the node is different: rankings look at it again."""
        self.changes.append(name)

    # ---- taking and giving ----

    def has_room_for(self, binding: Binding, role: RoleShape) -> bool:
        """Whether exactly these seats are free: its GPUs and ports, CPUs and memory, on a node that is there."""
        space = self.spaces.get(binding.node)
        return (
            space is not None
            and space.cpu_milli >= role.cpu_milli
            and space.memory_bytes >= role.memory_bytes
            and space.ports_used.isdisjoint(binding.ports)
            and all(space.gpu_free.get(share.gpu, 0) >= share.milli for share in binding.gpus)
        )

    def take(self, binding: Binding, role: RoleShape) -> None:
        """Book a replica. A node that is gone is ignored (its resources went with it)."""
        if self._undo is not None:
            self._undo.append((binding, role, +1, self.spaces[binding.node].next_port))
        elif self._kept:
            if self._kept.pop(id(binding), None) is not None:
                return
            self.settle()
        self._book(binding, role, +1)

    def take_all(self, bookings: Iterable[tuple[Binding, RoleShape]]) -> bool:
        """Inside a trial: book all of these, if exactly these seats are free; else nothing."""
        mark = self.mark()
        for binding, role in bookings:
            if not self.has_room_for(binding, role):
                self.rollback(mark)
                return False
            self.take(binding, role)
        return True

    def lend(self, binding: Binding, role: RoleShape) -> None:
        """Inside a trial: as if a booked replica were gone."""
        assert self._undo is not None
        self.misfits.clear()
        if binding.node in self.spaces:
            self._undo.append((binding, role, -1, self.spaces[binding.node].next_port))
            self._book(binding, role, -1)

    def give(self, binding: Binding, role: RoleShape) -> None:
        """Free a replica's booking."""
        self.settle()
        self._book(binding, role, -1)
        self.misfits.clear()
        space = self.spaces.get(binding.node)
        if space is not None:
            self._note_free(space)
        else:
            self.freed += 1  # a quota may have room again

    @property
    def unblocked(self) -> int:
        """Changes whenever everything is worth another try."""
        return self._freed_everywhere

    def unblock(self) -> None:
        """Whatever did not fit is worth another try, wherever it looks."""
        self.settle()
        self.freed += 1
        self.misfits.clear()
        self._freed_everywhere = self.freed
        for stock in self._stocks.values():
            stock.freed = self.freed

    def _note_free(self, space: Space) -> None:
        self.freed += 1
        for stock in space.stocks:
            stock.freed = self.freed

    def stock(self, labels: Labels) -> Stock:
        """What is free on nodes with these labels, or on more of them. O(nodes) when first asked for, kept true from
        then on."""
        stock = self._stocks.get(labels)
        if stock is None:
            if len(self._stocks) > STOCKS_KEPT:
                return self.everywhere
            stock = self._stocks[labels] = Stock(labels, freed=self.freed)
            for space in self.spaces.values():
                if stock.of(space.node):
                    space.stocks.append(stock)
                    stock.free_milli += sum(space.gpu_free.values())
        return stock

    def stocks(self) -> Iterator[Stock]:
        """All that are kept true."""
        yield from self._stocks.values()

    @property
    def free_gpu_milli(self) -> int:
        """Thousandths of GPUs left on all nodes."""
        return self.everywhere.free_milli

    def _book(self, binding: Binding, role: RoleShape, sign: int) -> None:
        space = self.spaces.get(binding.node)
        if space is None:
            return
        space.cpu_milli -= sign * role.cpu_milli
        space.memory_bytes -= sign * role.memory_bytes
        space.bound += sign
        if binding.ports:
            if sign > 0:
                space.ports_used.update(binding.ports)
                space.next_port = max(binding.ports) + 1
            else:
                space.ports_used.difference_update(binding.ports)
        if space.notes:
            space.notes.clear()
        self.changes.append(binding.node)
        if not binding.gpus:
            return
        space._levels.clear()
        space._state = None
        name, gpu_free, gpu_class = space.node.name, space.gpu_free, space.gpu_class
        gained: dict[GpuClass, int] = {}
        """Wholly free devices."""
        freed = 0
        for share in binding.gpus:
            gpu = share.gpu
            before = gpu_free.get(gpu)
            if before is None:
                continue
            change = -sign * share.milli
            after = gpu_free[gpu] = before + change
            cls = gpu_class[gpu]
            freed += change
            if before == WHOLE_GPU:
                gained[cls] = gained.get(cls, 0) - 1
            elif before > 0:
                _remove(self._shared[cls], (before, name, gpu))
            if after == WHOLE_GPU:
                gained[cls] = gained.get(cls, 0) + 1
            elif after > 0:
                insort(self._shared.setdefault(cls, []), (after, name, gpu))
        for stock in space.stocks:
            stock.free_milli += freed
        total = 0
        for cls, gain in gained.items():
            if gain:
                count = space.whole[cls]
                space.whole[cls] = count + gain
                self._move(cls, count, count + gain, name)
                total += gain
        if total:
            if ANY in self._whole:
                self._move(ANY, space.whole_total, space.whole_total + total, name)
            space.whole_total += total
            for level_name, level in self._levels.items():
                level.free[domain(space.node, level_name)] += total

    @contextmanager
    def trial(self) -> Iterator[Ledger]:
        """Everything taken inside is put back at the end. Not re-entrant."""
        self.begin()
        try:
            yield self
        finally:
            self.end()

    def begin(self) -> None:
        """A trial begins."""
        assert self._undo is None
        self.settle()
        self._undo, self._freed_before = [], self.freed
        self.misfits.clear()
        if len(self.changes) > CHANGES_KEPT:
            dropped = len(self.changes) - CHANGES_KEPT // 2
            del self.changes[:dropped]
            self.changes_from += dropped

    def end(self) -> None:
        """It ends: everything is put back, unless all that was done is to take what stays."""
        assert self._undo is not None
        if self._stays:
            taken = {id(entry[0]): entry for entry in self._undo if entry[2] > 0}
            if len(taken) == len(self._undo) and taken.keys() <= set(map(id, self._stays)):
                self._kept = taken
                self._undo.clear()
            self._stays.clear()
        self.rollback(0)
        self._undo, self.freed = None, self._freed_before

    def stay(self, bindings: Iterable[Binding]) -> None:
        """Inside a trial: it is decided that these, which are taken, will be. They may stay taken until then."""
        self._stays += bindings

    def decided(self) -> Iterator[tuple[Binding, RoleShape]]:
        """What is taken for decisions that are not folded yet."""
        yield from [(binding, role) for binding, role, _, _ in self._kept.values()]

    def settle(self) -> None:
        """What was decided on and has not come to be is put back. Done before anything else changes."""
        if self._kept:
            undo, self._kept = list(self._kept.values()), {}
            self._restore(undo, 0)

    def mark(self) -> int:
        """A point inside a trial to roll back to."""
        assert self._undo is not None
        return len(self._undo)

    def rollback(self, mark: int) -> None:
        assert self._undo is not None
        if mark < self._misfits_at:
            self.misfits.clear()
            self._misfits_at = 0
        self._restore(self._undo, mark)

    def _restore(self, undo: list[tuple[Binding, RoleShape, int, int]], mark: int) -> None:
        while len(undo) > mark:
            binding, role, sign, next_port = undo.pop()
            self._book(binding, role, -sign)
            self.spaces[binding.node].next_port = next_port

    def note_misfit(self, shape: Shape, short: Short) -> None:
        """Inside a trial: the shape does not fit as things are, nor will it while things are only taken."""
        self.misfits[id(shape)] = (shape, short)
        self._misfits_at = max(self._misfits_at, self.mark())

    # ---- finding ----

    def matching(self, role: RoleShape) -> tuple[GpuClass, ...]:
        """GPU classes that satisfy the role, best first (order of its kinds, then smaller memory, then name)."""
        return tuple([cls for tier in self.tiers(role) for cls in tier])

    def tiers(self, role: RoleShape) -> tuple[tuple[GpuClass, ...], ...]:
        """The same in groups between which the role's order of kinds does not decide, best group first."""
        key = (role.gpu_kinds, role.gpu_memory_min_bytes, role.gpu_memory_max_bytes)
        tiers = self._matching.get(key)
        if tiers is None:
            found = [c for c in self.classes() if kind_matches(c[0], role.gpu_kinds) and _memory_fits(c[1], role)]
            groups: dict[int, list[GpuClass]] = {}
            for cls in sorted(found, key=lambda c: (_preference(c[0], role.gpu_kinds), c[1], c[0])):
                groups.setdefault(_preference(cls[0], role.gpu_kinds), []).append(cls)
            tiers = self._matching[key] = tuple(tuple(group) for group in groups.values())
        return tiers

    def best_fit(self, role: RoleShape, cls: GpuClass, among: Collection[NodeName], wanted: int) -> Fit | None:
        """Where as many of `wanted` like replicas as possible go together: the fullest node (fewest free GPUs, then
        name) that holds all of them, else the one that holds most. A share goes alone: to the fullest GPU that has it.

        O(nodes in the buckets looked at, or among); the first node of a bucket usually fits."""
        if 0 < role.gpu_milli < WHOLE_GPU:
            shared = self._fullest_share(role, cls, among)
            if shared is not None:
                return shared
            wanted = 1
        per = max(1, role.gpu_milli // WHOLE_GPU) if role.gpu_milli else 0
        best: Fit | None = None
        if _few(among, self.spaces):
            found: list[tuple[int, int, NodeName]] = []
            spaces = self.spaces
            for name in among:
                space = spaces.get(name)
                if space is None:
                    continue
                free = space.whole.get(cls, 0) if per else space.whole_total
                if free >= per and (holds := space.capacity(role, cls, wanted)):
                    found.append((-holds, free, name))
            if not found:
                return None
            holds, _, name = min(found)
            return Fit(name, -holds, WHOLE_GPU)
        buckets = self._buckets(cls if per else ANY)
        order = sorted(buckets)
        for free in order:
            if free >= per * wanted:
                for name in buckets[free]:
                    if name in among and self.spaces[name].capacity(role, cls, wanted) == wanted:
                        return Fit(name, wanted, WHOLE_GPU)
        if wanted == 1:
            return None
        for free in reversed(order):
            most = min(wanted, free // per) if per else wanted
            if most <= (best.count if best else 0):
                break
            for name in buckets[free]:
                if name in among:
                    holds = self.spaces[name].capacity(role, cls, most)
                    if holds > (best.count if best else 0):
                        best = Fit(name, holds, WHOLE_GPU)
                        if holds == most:
                            break
        return best

    def emptiest(self, role: RoleShape, cls: GpuClass, among: Collection[NodeName], wanted: int) -> Fit | None:
        """The node with most free GPUs, then by name, and how many of `wanted` like replicas it holds."""
        if 0 < role.gpu_milli < WHOLE_GPU:
            return self.best_fit(role, cls, among, 1)
        per = role.gpu_milli // WHOLE_GPU
        if _few(among, self.spaces):
            best: tuple[int, NodeName] | None = None
            for name in among:
                space = self.spaces.get(name)
                if space is None:
                    continue
                key = (-(space.whole.get(cls, 0) if per else space.whole_total), name)
                if (best is None or key < best) and space.capacity(role, cls, 1):
                    best = key
            return None if best is None else Fit(best[1], self.spaces[best[1]].capacity(role, cls, wanted), WHOLE_GPU)
        buckets = self._buckets(cls if per else ANY)
        for free in sorted(buckets, reverse=True):
            if free < per:
                break
            for name in buckets[free]:
                if name in among and (holds := self.spaces[name].capacity(role, cls, wanted)):
                    return Fit(name, holds, WHOLE_GPU)
        return None

    def _fullest_share(self, role: RoleShape, cls: GpuClass, among: Collection[NodeName]) -> Fit | None:
        if _few(among, self.spaces):
            found = [
                (level, name)
                for name in among
                if name in self.spaces and self.spaces[name].capacity(role, cls, 1)
                for level in self.spaces[name].levels(cls)
                if role.gpu_milli <= level < WHOLE_GPU
            ]
            return Fit(min(found)[1], 1, min(found)[0]) if found else None
        shared = self._shared.get(cls, [])
        for at in range(bisect_left(shared, role.gpu_milli, key=lambda entry: entry[0]), len(shared)):
            level, name, _ = shared[at]
            if name in among and self.spaces[name].capacity(role, cls, 1):
                return Fit(name, 1, level)
        return None

    def by_free(self, among: Collection[NodeName], at_least: int) -> Iterator[NodeName]:
        """Nodes with so many wholly free GPUs of whatever kind, fullest first."""
        buckets = self._buckets(ANY)
        for free in sorted(buckets):
            if free >= at_least:
                for name in tuple(buckets.get(free, ())):
                    if name in among:
                        yield name

    def ports(self, name: NodeName, count: int) -> tuple[int, ...] | None:
        """`count` free ports of a node; () when the node hands out none (replicas have addresses of their own)."""
        space = self.spaces[name]
        low, high = space.node.port_lo, space.node.port_hi
        if low == 0 or count == 0:
            return ()
        size = high - low + 1
        if size - len(space.ports_used) < count:
            return None
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

    def _buckets(self, cls: GpuClass) -> dict[int, list[NodeName]]:
        """Nodes by how many of their GPUs of a class are free. For `ANY`, O(nodes) when first asked for, kept true from
        then on."""
        if cls == ANY and ANY not in self._whole:
            found: dict[int, list[NodeName]] = {}
            for name in sorted(self.spaces):
                found.setdefault(self.spaces[name].whole_total, []).append(name)
            self._whole[ANY] = found
        return self._whole.get(cls, {})

    def _counts(self, space: Space) -> list[tuple[GpuClass, int]]:
        """In which buckets a node is."""
        return [*space.whole.items(), *([(ANY, space.whole_total)] if ANY in self._whole else [])]

    def _move(self, cls: GpuClass, before: int, after: int, name: NodeName) -> None:
        buckets = self._whole[cls]
        self._leave_bucket(buckets, before, name)
        bucket = buckets.get(after)
        if bucket is None:
            buckets[after] = [name]
        else:
            insort(bucket, name)

    @staticmethod
    def _leave_bucket(buckets: dict[int, list[NodeName]], count: int, name: NodeName) -> None:
        bucket = buckets[count]
        if len(bucket) == 1 and bucket[0] == name:
            del buckets[count]
        else:
            _remove(bucket, name)


@dataclass(frozen=True, slots=True)
class Fit:
    """A node for `count` like replicas; `level`: thousandths left of the GPU that a share is to come from."""

    node: NodeName
    count: int
    level: int


def _few(among: Collection[NodeName], spaces: Collection[NodeName]) -> bool:
    return len(among) * FEW < len(spaces)


def _join(level: Level, key: str, space: Space) -> None:
    level.members.setdefault(key, {})[space.node.name] = None
    level.free[key] = level.free.get(key, 0) + space.whole_total


def _remove(items: list[_Item], item: _Item) -> None:
    at = bisect_left(items, item)
    assert items[at] == item, "the ledger's index has lost track"
    del items[at]


def _memory_fits(memory_bytes: int, role: RoleShape) -> bool:
    high = role.gpu_memory_max_bytes
    return memory_bytes >= role.gpu_memory_min_bytes and (high == 0 or memory_bytes <= high)


def _preference(kind: str, wanted: tuple[str, ...]) -> int:
    for place, name in enumerate(wanted):
        if kind == name or kind.startswith(name + "-"):
            return place
    return len(wanted)
