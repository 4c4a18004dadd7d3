"""Nodes in the order of a score, kept from one placement to the next.

A score of one node for one kind of replica depends on what is free there alone, so nodes in like state form a group
and are rated together; after a placement only the groups that are new since the last look are rated. The cost of a
placement follows the states that came up since the last one of its kind, not the nodes. Called by `placement`; the
scores themselves are in `fragmentation`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Protocol

from jobsched.core.job import RoleShape
from jobsched.core.ledger import Fit, GpuClass, GpuState, Ledger, Space
from jobsched.core.resources import WHOLE_GPU, NodeName


class Rated(NamedTuple):
    """How good a node is for one replica: higher is better. `level`: thousandths left of the GPU that a share is to
    come from."""

    value: int
    level: int


class NodeScore(Protocol):
    """Rates a node that holds at least one replica of a role, with GPUs of one class."""

    @property
    def version(self) -> int:
        """Another number: what was rated before is out of date."""
        ...

    @property
    def steady(self) -> bool:
        """Whether nodes with the same CPUs, memory and GPUs free rate the same."""
        ...

    @property
    def by_name(self) -> bool:
        """Whether nodes of equal rating are taken by name; else the one with least CPUs free, which costs less."""
        ...

    def rate(self, space: Space, cls: GpuClass, role: RoleShape) -> Rated: ...


_State = tuple[int, int, GpuState]
"""CPUs, memory and GPUs free."""


@dataclass(slots=True)
class Group:
    """Nodes with the same free resources, by name."""

    serial: int
    state: _State
    names: list[NodeName]


class Pool(dict[NodeName, None]):
    """Nodes that a kind of job may use, in groups of like state, with their rankings. Ordered like the cluster's."""

    __slots__ = ("_cursor", "_group_of", "epoch", "groups", "made", "rankings")

    def __init__(self, names: Iterable[NodeName] = ()) -> None:
        super().__init__(dict.fromkeys(names))
        self.groups: dict[_State, Group] = {}
        self.made: list[Group] = []
        """Groups in order of their making, some of them empty by now."""
        self.epoch = 0
        """Rises when `made` begins anew."""
        self.rankings: dict[tuple[object, ...], Ranking] = {}
        self._group_of: dict[NodeName, Group] = {}
        self._cursor = -1

    def follow(self, ledger: Ledger) -> None:
        """Regroup the nodes that were touched since the last call. O(those)."""
        if self._cursor < ledger.changes_from:
            self.groups, self._group_of, self.made = {}, {}, []
            self.epoch += 1
            changed: Iterable[NodeName] = self
        else:
            changed = dict.fromkeys(ledger.changes[self._cursor - ledger.changes_from :])
        self._cursor = ledger.changes_from + len(ledger.changes)
        for name in changed:
            space = ledger.spaces.get(name) if name in self else None
            state = (space.cpu_milli, space.memory_bytes, space.gpu_state()) if space is not None else None
            before = self._group_of.get(name)
            if before is not None:
                if before.state == state:
                    continue
                del before.names[bisect_left(before.names, name)]
                del self._group_of[name]
                if not before.names:
                    del self.groups[before.state]
            if space is not None and state is not None:
                group = self.groups.get(state)
                if group is None:
                    group = self.groups[state] = Group(len(self.made), state, [])
                    self.made.append(group)
                insort(group.names, name)
                self._group_of[name] = group
        if len(self.made) > MADE_KEPT + 2 * len(self.groups):
            self.made = list(self.groups.values())
            for serial, group in enumerate(self.made):
                group.serial = serial
            self.epoch += 1


MADE_KEPT = 20_000
RANKINGS_KEPT = 2_000
_Entry = tuple[int, _State, int, int, Group]
"""(negated value, state, serial, GPU level, group)"""


@dataclass(slots=True)
class Ranking:
    version: int = -1
    epoch: int = -1
    cursor: int = 0
    heap: list[_Entry] = field(default_factory=list)


def best(
    ledger: Ledger, score: NodeScore, role: RoleShape, classes: tuple[GpuClass, ...], among: Iterable[NodeName]
) -> Fit | None:
    """The best rated of these nodes. Amortised O(states new since the last such question) for a `Pool`, else
    O(among)."""
    if not isinstance(among, Pool):
        return _best_of(ledger, score, role, classes, among)
    among.follow(ledger)
    if not score.steady:
        spaces, groups = ledger.spaces, among.groups.values()
        fitting = [group.names for group in groups if _rate(spaces[group.names[0]], score, role, classes)]
        return _best_of(ledger, score, role, classes, chain.from_iterable(fitting))
    key = (id(score), classes, role.gpu_milli, role.cpu_milli, role.memory_bytes)
    ranking = among.rankings.get(key)
    if ranking is None:
        if len(among.rankings) >= RANKINGS_KEPT:
            among.rankings.clear()
        ranking = among.rankings[key] = Ranking()
    heap, made = ranking.heap, among.made
    if ranking.version != score.version or ranking.epoch != among.epoch:
        ranking.version, ranking.epoch, ranking.cursor = score.version, among.epoch, 0
        heap.clear()
    cpu, memory = role.cpu_milli, role.memory_bytes
    for group in made[ranking.cursor :] if ranking.cursor else list(among.groups.values()):
        if group.names and group.state[0] >= cpu:
            rated = _rate(ledger.spaces[group.names[0]], score, role, classes)
            if rated is not None:
                heapq.heappush(heap, (-rated.value, group.state, group.serial, rated.level, group))
    ranking.cursor = len(made)
    aside: list[_Entry] = []
    found: Fit | None = None
    value = 0
    while heap:
        entry = heap[0]
        group = entry[4]
        if not group.names:
            heapq.heappop(heap)
            continue
        if found is not None and entry[0] != value:
            break
        name: NodeName | None = None
        if group.state[1] >= memory:
            for each in group.names:
                if _has_ports(ledger.spaces[each], role):
                    name = each
                    break
        if name is not None and (found is None or name < found.node):
            found, value = Fit(name, 1, entry[3]), entry[0]
        if found is not None and not score.by_name:
            break
        aside.append(heapq.heappop(heap))
    for entry in aside:
        heapq.heappush(heap, entry)
    return found


def _best_of(
    ledger: Ledger, score: NodeScore, role: RoleShape, classes: tuple[GpuClass, ...], among: Iterable[NodeName]
) -> Fit | None:
    seen: dict[_State, Rated | None] = {}
    found: tuple[int, _State | tuple[()], NodeName] | None = None
    fit: Fit | None = None
    for name in among:
        space = ledger.spaces.get(name)
        if space is None or space.memory_bytes < role.memory_bytes or not _has_ports(space, role):
            continue
        state = (space.cpu_milli, space.memory_bytes, space.gpu_state())
        rated = seen.get(state) if state in seen and score.steady else _rate(space, score, role, classes)
        seen[state] = rated
        if rated is not None:
            key = (-rated.value, () if score.by_name else state, name)
            if found is None or key < found:
                found, fit = key, Fit(name, 1, rated.level)
    return fit


def _rate(space: Space, score: NodeScore, role: RoleShape, classes: tuple[GpuClass, ...]) -> Rated | None:
    """The best of the node's classes, the first of equals; None when it has too few CPUs or GPUs for the replica."""
    if space.cpu_milli < role.cpu_milli:
        return None
    gpu = role.gpu_milli
    if not gpu:
        return score.rate(space, classes[0], role)
    whole = space.whole
    found = None
    for cls in classes if len(whole) > 1 else whole:  # most nodes have GPUs of one class
        if cls not in whole or cls not in classes:
            continue
        if whole[cls] * WHOLE_GPU < gpu if gpu >= WHOLE_GPU else space.levels(cls)[-1] < gpu:
            continue
        rated = score.rate(space, cls, role)
        if len(whole) == 1:
            return rated
        if found is None or rated.value > found.value:
            found = rated
    return found


def _has_ports(space: Space, role: RoleShape) -> bool:
    node = space.node
    return not node.port_lo or node.port_hi - node.port_lo + 1 - len(space.ports_used) >= role.ports
