"""Where the replicas of a gang go: plain functions from a ledger and a shape to bindings.

Whole GPUs are packed (the "pack" of every GPU scheduler; Tetris, SIGCOMM'14, calls it alignment): a gang goes to the
fullest node that holds all of it, else to the fewest nodes, so that whole nodes stay free for large gangs and peers are
near each other. Shares and CPU-only replicas among them go where they fragment least (`fragmentation`).

Replicas of one role are alike, so for a gang of one role greedy placement fits whenever anything does. Roles of
different shapes may be in each other's way: when greedy placement falls short although each role would fit by itself,
`_rearrange` tries other arrangements, within limits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import permutations

from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding, RoleShape, Shape
from jobsched.core.ledger import ANY, Fit, GpuClass, Short
from jobsched.core.node import domain
from jobsched.core.policies.ranking import NodeScore, best
from jobsched.core.resources import WHOLE_GPU, GpuShare, NodeName
from jobsched.core.values import dataclass

SEARCH_NODES = 64
SEARCH_STEPS = 1_000
"""The search behind greedy placement is for so many nodes at most, and tries so many bindings. Larger clusters only get
the roles in other orders."""


@dataclass(frozen=True, slots=True)
class Gang:
    """Bindings of a whole gang, and one more port on rank 0's node for the coordinator."""

    bindings: tuple[Binding, ...]
    coordinator_port: int


class Score(StrEnum):
    """Which of several feasible nodes is taken."""

    AUTO = "auto"
    """`fragmentation` once anybody has asked for part of a GPU, else `pack`."""
    PACK = "pack"
    """The one that is left fullest: whole nodes stay free for large gangs."""
    SPREAD = "spread"
    """The emptiest, and then on there while it lasts: fewest nodes per gang, least shared (Tiresias, Pollux)."""
    FRAGMENTATION = "fragmentation"
    """Where the free GPUs stay most useful to what is usually submitted; gangs of whole GPUs are packed."""


Choice = Score | NodeScore


def place_gang(
    cluster: Cluster, shape: Shape, avoid: Collection[NodeName] = (), score: Choice = Score.AUTO, count: bool = False
) -> Gang | Short:
    """Place every role at its `min`, then grow elastic roles towards `prefer`; all or nothing. Must run inside
    `ledger.trial()`; what was taken for the gang stays taken when it fits.

    Tries without the nodes in `avoid` first, and the preferred domain before the whole cluster. What cannot fit is
    often found out without trying; `count`: try nevertheless, so that `Short.placed` tells how near it came.
    """
    ledger = cluster.ledger
    known = ledger.misfits.get(id(shape))
    if known is not None and not count:
        return known[1]
    best_short: Short | None = None
    if not count and shape.least_gpu_milli > ledger.free_gpu_milli:
        return Short(shape.roles[0], 0)
    how = _resolve(cluster, score)
    for among in _candidates(cluster, shape, avoid):
        mark = ledger.mark()
        result = _place(cluster, shape, among, how)
        if isinstance(result, Gang):
            return result
        ledger.rollback(mark)
        if best_short is None or result.placed > best_short.placed:
            best_short = result
    best_short = best_short or Short(shape.roles[0], 0)
    ledger.note_misfit(shape, best_short)
    return best_short


def place_more(
    cluster: Cluster,
    shape: Shape,
    role: RoleShape,
    indices: Collection[int],
    taken: Collection[Binding],
    score: Choice = Score.AUTO,
) -> tuple[Binding, ...]:
    """Bindings for as many more replicas of a running gang as fit, in the GPU class that its role already uses, on the
    nodes that it already has if they have room."""
    ledger, nodes = cluster.ledger, cluster.fleet.nodes
    classes = ledger.matching(role) if role.gpu_milli else (ANY,)
    siblings = [b for b in taken if b.role == role.role]
    for sibling in siblings:
        space = ledger.spaces.get(sibling.node)
        if sibling.gpus and space is not None and sibling.gpus[0].gpu in space.gpu_class:
            classes = (space.gpu_class[sibling.gpus[0].gpu],)
            break
    among: Collection[NodeName] = cluster.fleet.pool(shape)
    if shape.within and taken:
        names = {domain(nodes[b.node], shape.within) for b in taken if b.node in nodes}
        among = dict.fromkeys([name for name in among if domain(nodes[name], shape.within) in names])
    seen = [domain(nodes[b.node], shape.spread) for b in siblings if shape.spread and b.node in nodes]
    near = dict.fromkeys(b.node for b in siblings if b.node in among)
    return tuple(_place_role(cluster, shape, role, list(indices), classes, among, _resolve(cluster, score), near, seen))


def _resolve(cluster: Cluster, score: Choice) -> Choice:
    if score is Score.AUTO:
        score = Score.FRAGMENTATION if cluster.mix.shares else Score.PACK
    return cluster.learned if score is Score.FRAGMENTATION else score


def _candidates(cluster: Cluster, shape: Shape, avoid: Collection[NodeName]) -> Iterator[Collection[NodeName]]:
    """Sets of nodes to try in turn."""
    pool = cluster.fleet.pool(shape)
    pools: list[Collection[NodeName]] = [pool]
    if any(name in pool for name in avoid):
        pools.insert(0, dict.fromkeys([name for name in pool if name not in avoid]))
    level = shape.within or shape.prefer
    for among in pools:
        if level:
            yield from _domains(cluster, level, shape, among)
        if not shape.within:
            yield among


def _domains(
    cluster: Cluster, level: str, shape: Shape, among: Collection[NodeName]
) -> Iterator[Collection[NodeName]]:
    """Domains of a level that have enough wholly free GPUs, fullest first: the smallest hole that holds the gang."""
    ledger = cluster.ledger
    need = sum(role.min * (role.gpu_milli // WHOLE_GPU) for role in shape.roles)
    if level == "node":
        for name in ledger.by_free(among, need):
            yield {name: None}
        return
    known = ledger.level(level)
    for _, key in sorted([(free, key) for key, free in known.free.items() if free >= need]):
        names = dict.fromkeys([name for name in known.members[key] if name in among])
        if names:
            yield names


def _place(cluster: Cluster, shape: Shape, among: Collection[NodeName], how: Choice) -> Gang | Short:
    ledger = cluster.ledger
    mark = ledger.mark()
    bindings, short = _place_minimum(cluster, shape, among, how)
    if short is not None:
        if len(shape.roles) == 1:
            return short
        ledger.rollback(mark)
        found = _rearrange(cluster, shape, among, how)
        if found is None:
            return short
        bindings = found
    coordinator = ledger.ports(bindings[0].node, 1)
    if coordinator is None:
        return Short(shape.roles[0], 0)
    if coordinator:
        first = bindings[0]
        ledger.take(Binding(first.role, first.index, first.node, (), coordinator), _NOTHING)
        bindings[0] = Binding(first.role, first.index, first.node, first.gpus, first.ports + coordinator)
    for role in shape.roles:
        if role.prefer > role.min:
            mine = [b for b in bindings if b.role == role.role]
            classes = _used(cluster, mine) or ledger.matching(role) if role.gpu_milli else (ANY,)
            near = dict.fromkeys(b.node for b in mine)
            seen = [domain(cluster.fleet.nodes[b.node], shape.spread) for b in mine] if shape.spread else []
            more = list(range(role.min, role.prefer))
            bindings += _place_role(cluster, shape, role, more, classes, among, how, near, seen)
    return Gang(tuple(bindings), coordinator[0] if coordinator else 0)


def _used(cluster: Cluster, bindings: Sequence[Binding]) -> tuple[GpuClass, ...]:
    """GPU classes that these replicas have, in order of first use."""
    spaces = cluster.ledger.spaces
    return tuple(dict.fromkeys([spaces[b.node].gpu_class[share.gpu] for b in bindings for share in b.gpus]))


def _place_minimum(
    cluster: Cluster, shape: Shape, among: Collection[NodeName], how: Choice
) -> tuple[list[Binding], Short | None]:
    """Every role at its `min`, greedily, in order. A role's replicas share a GPU class if any single one holds them."""
    ledger = cluster.ledger
    bindings: list[Binding] = []
    for role in shape.roles:
        placed: list[Binding] = []
        most = 0
        for classes in _class_choices(cluster, role, how):
            mark = ledger.mark()
            placed = _place_role(cluster, shape, role, list(range(role.min)), classes, among, how, (), ())
            if len(placed) == role.min:
                break
            most = max(most, len(placed))
            ledger.rollback(mark)
            placed = []
        if len(placed) < role.min:
            return bindings, Short(role, most)
        bindings += placed
    return bindings, None


def _class_choices(cluster: Cluster, role: RoleShape, how: Choice) -> list[tuple[GpuClass, ...]]:
    """GPU classes to try for a role, in turn: each alone, best first, then all together. A score compares the classes
    between which the role's order of kinds does not decide, for replicas that have no peer to be alike with."""
    if not role.gpu_milli:
        return [(ANY,)]
    if not isinstance(how, Score) and role.min == 1:
        return list(cluster.ledger.tiers(role))
    classes = cluster.ledger.matching(role)
    return [*((cls,) for cls in classes), *([classes] if len(classes) != 1 else [])]


_NOTHING = RoleShape("", 0, 0, 0, 0, 0)


def _place_role(
    cluster: Cluster,
    shape: Shape,
    role: RoleShape,
    indices: Sequence[int],
    classes: tuple[GpuClass, ...],
    among: Collection[NodeName],
    how: Choice,
    near: Collection[NodeName],
    seen: Collection[str],
) -> list[Binding]:
    """Replicas of a role, as many as fit: on the nodes `near` first, in no domain that was `seen` where the shape
    spreads. Stops at the first that does not fit."""
    placed: list[Binding] = []
    met = dict.fromkeys(seen)
    while len(placed) < len(indices):
        left = len(indices) - len(placed)
        where = among
        if shape.spread:
            left = 1
            if met:
                nodes = cluster.fleet.nodes
                where = dict.fromkeys([name for name in among if domain(nodes[name], shape.spread) not in met])
        found = _find(cluster, role, classes, near, left, Score.PACK) if near and not shape.spread else None
        near = near if found is not None else ()
        if found is None:
            found = _find(cluster, role, classes, where, left, how)
        if found is None:
            break
        fit, cls = found
        for index in indices[len(placed) : len(placed) + fit.count]:
            placed.append(_bind(cluster, role, index, cls, fit))
        if shape.spread:
            met[domain(cluster.fleet.nodes[fit.node], shape.spread)] = None
    return placed


def _find(
    cluster: Cluster,
    role: RoleShape,
    classes: tuple[GpuClass, ...],
    among: Collection[NodeName],
    wanted: int,
    how: Choice,
) -> tuple[Fit, GpuClass] | None:
    """A node for as many of `wanted` like replicas as go together there."""
    ledger = cluster.ledger
    if not isinstance(how, Score) and (wanted == 1 or 0 < role.gpu_milli < WHOLE_GPU):
        fit = best(ledger, how, role, classes, among)
        return None if fit is None else (fit, _class_at(cluster, fit, role, classes))
    look = ledger.emptiest if how is Score.SPREAD else ledger.best_fit
    for cls in classes:
        fit = look(role, cls, among, wanted)
        if fit is not None:
            return fit, cls
    return None


def _class_at(cluster: Cluster, fit: Fit, role: RoleShape, classes: tuple[GpuClass, ...]) -> GpuClass:
    space = cluster.ledger.spaces[fit.node]
    if len(classes) == 1:
        return classes[0]
    whole = role.gpu_milli // WHOLE_GPU
    return next(c for c in classes if (space.whole.get(c, 0) >= whole if whole else fit.level in space.levels(c)))


def _bind(cluster: Cluster, role: RoleShape, index: int, cls: GpuClass, fit: Fit) -> Binding:
    ledger = cluster.ledger
    space = ledger.spaces[fit.node]
    gpus: tuple[GpuShare, ...] = ()
    if role.gpu_milli >= WHOLE_GPU:
        gpus = space.pick(cls, role.gpu_milli // WHOLE_GPU)
    elif role.gpu_milli:
        gpus = space.pick_share(cls, role.gpu_milli, fit.level)
    ports = ledger.ports(fit.node, role.ports)
    assert ports is not None, "a node's capacity counts its ports"
    binding = Binding(role.role, index, fit.node, gpus, ports)
    ledger.take(binding, role)
    return binding


# ---- behind greedy placement ----


def _rearrange(cluster: Cluster, shape: Shape, among: Collection[NodeName], how: Choice) -> list[Binding] | None:
    """Bindings of a gang of several roles that greedy placement in their own order did not find. When there are none
    the ledger is left as it was."""
    ledger = cluster.ledger
    mark = ledger.mark()
    for role in shape.roles:  # each by itself: does not fit alone, does not fit at all
        _, short = _place_minimum(cluster, replace(shape, roles=(role,)), among, how)
        ledger.rollback(mark)
        if short is not None:
            return None
    if len(among) <= SEARCH_NODES:
        return _search(cluster, shape, among)
    if len(shape.roles) > 3:
        return None
    for roles in permutations(shape.roles):
        bindings, short = _place_minimum(cluster, replace(shape, roles=roles), among, how)
        if short is None:
            return _in_order(shape, bindings)
        ledger.rollback(mark)
    return None


def _in_order(shape: Shape, bindings: list[Binding]) -> list[Binding]:
    places = {role.role: place for place, role in enumerate(shape.roles)}
    return sorted(bindings, key=lambda b: (places[b.role], b.index))


def _search(cluster: Cluster, shape: Shape, among: Collection[NodeName]) -> list[Binding] | None:
    """Depth first over replicas, biggest first, and nodes of distinct state; None when nothing fits or the steps ran
    out. Leaves the ledger as it was in that case."""
    ledger = cluster.ledger
    order = sorted(shape.roles, key=lambda r: (-r.gpu_milli, -r.cpu_milli, -r.memory_bytes, r.role))
    todo = [(role, index) for role in order for index in range(role.min)]
    names = sorted([name for name in among if name in ledger.spaces])
    placed: list[Binding] = []
    steps = 0

    def descend(at: int) -> bool:
        nonlocal steps
        if at == len(todo):
            return True
        role, index = todo[at]
        last = placed[-1].node if at and todo[at - 1][0] is role else NodeName("")
        for fit, cls in _distinct(cluster, shape, role, names, last, placed):
            steps += 1
            if steps > SEARCH_STEPS:
                return False
            mark = ledger.mark()
            placed.append(_bind(cluster, role, index, cls, fit))
            if descend(at + 1):
                return True
            placed.pop()
            ledger.rollback(mark)
        return False

    if not descend(0):
        return None
    return _in_order(shape, placed)


def _distinct(
    cluster: Cluster, shape: Shape, role: RoleShape, names: Sequence[NodeName], last: NodeName, placed: list[Binding]
) -> list[tuple[Fit, GpuClass]]:
    """Every place for one replica, one of those that are alike. Replicas of a role are alike too, so they go in the
    order of nodes, from the `last` on."""
    ledger, nodes = cluster.ledger, cluster.fleet.nodes
    met = [domain(nodes[b.node], shape.spread) for b in placed if b.role == role.role] if shape.spread else []
    found: dict[object, tuple[Fit, GpuClass]] = {}
    for name in names:
        space = ledger.spaces[name]
        own = domain(space.node, shape.spread) if shape.spread else ""
        if name < last or (own and own in met):
            continue
        free_ports = space.node.port_hi - space.node.port_lo - len(space.ports_used) if space.node.port_lo else 0
        state = (own, space.cpu_milli, space.memory_bytes, free_ports, space.gpu_state(), name == last)
        for cls in ledger.matching(role) if role.gpu_milli else (ANY,):
            if space.capacity(role, cls, 1):
                share = 0 < role.gpu_milli < WHOLE_GPU
                for level in dict.fromkeys(space.levels(cls)) if share else (WHOLE_GPU,):
                    if level >= role.gpu_milli or not share:
                        found.setdefault((state, cls, level), (Fit(name, 1, level), cls))
    return list(found.values())
