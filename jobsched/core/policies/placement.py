"""Where the replicas of a gang go: plain functions from a ledger and a shape to bindings.

Best fit by free GPUs (the "pack" of every GPU scheduler; Tetris, SIGCOMM'14, calls it alignment): a replica goes to the
feasible node that is left fullest, so that whole nodes stay free for large gangs. Topology and fragmentation scores
belong here too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding, RoleShape, Shape
from jobsched.core.ledger import GpuClass
from jobsched.core.node import Node
from jobsched.core.resources import NodeName

Allowed = Callable[[Node], bool]


@dataclass(frozen=True, slots=True)
class Gang:
    """Bindings of a whole gang, and one more port on rank 0's node for the coordinator."""

    bindings: tuple[Binding, ...]
    coordinator_port: int


@dataclass(frozen=True, slots=True)
class Short:
    """Why a gang did not fit: the first role that fell short, and how many of its replicas found a place."""

    role: RoleShape
    placed: int


class Score(StrEnum):
    """Which of several feasible nodes is taken."""

    PACK = "pack"
    """The one that is left fullest: whole nodes stay free for large gangs."""
    SPREAD = "spread"
    """The emptiest, and then on there while it lasts: fewest nodes per gang, least shared (Tiresias, Pollux)."""


def place_gang(
    cluster: Cluster, shape: Shape, avoid: Collection[NodeName] = (), score: Score = Score.PACK
) -> Gang | Short:
    """Place every role at its `min`, then grow elastic roles towards `prefer`; all or nothing. Must run inside
    `ledger.trial()`; what was taken for the gang stays taken when it fits.

    Tries without the nodes in `avoid` first, and the preferred domain before the whole cluster.
    """
    best: Short | None = None
    for allowed in _candidates(cluster, shape, avoid):
        mark = cluster.ledger.mark()
        result = _place(cluster, shape, allowed, score)
        if isinstance(result, Gang):
            return result
        cluster.ledger.rollback(mark)
        if best is None or result.placed > best.placed:
            best = result
    assert best is not None
    return best


def place_more(
    cluster: Cluster, shape: Shape, role: RoleShape, indices: Collection[int], taken: Collection[Binding]
) -> tuple[Binding, ...]:
    """Bindings for as many more replicas of a running gang as fit, in the GPU class that its role already uses."""
    ledger = cluster.ledger
    classes = ledger.matching(role)
    for sibling in taken:
        space = ledger.spaces.get(sibling.node)
        if sibling.role == role.role and sibling.gpus and space is not None and sibling.gpus[0].gpu in space.gpu_class:
            classes = (space.gpu_class[sibling.gpus[0].gpu],)
            break
    base = _allowed(cluster, shape)
    if shape.within and taken:
        names = {domain(cluster.nodes[b.node], shape.within) for b in taken if b.node in cluster.nodes}
        base = _both(base, _inside(shape.within, names))
    found: list[Binding] = []
    for index in indices:
        binding = _place_one(cluster, shape, role, index, classes, base)
        if binding is None:
            break
        found.append(binding)
    return tuple(found)


def domain(node: Node, level: str) -> str:
    """Name of the node's domain at a level; a node without the label is a domain of its own."""
    return str(node.name) if level == "node" else node.label(level) or f"node {node.name}"


def _allowed(cluster: Cluster, shape: Shape) -> Allowed:
    pool = cluster.pool(shape)
    return lambda node: node.name in pool


def _both(first: Allowed, second: Allowed) -> Allowed:
    return lambda node: first(node) and second(node)


def _inside(level: str, names: Collection[str]) -> Allowed:
    return lambda node: domain(node, level) in names


def _candidates(cluster: Cluster, shape: Shape, avoid: Collection[NodeName]) -> Iterator[Allowed]:
    base = _allowed(cluster, shape)
    filters = [_both(base, lambda node: node.name not in avoid), base] if avoid else [base]
    for allowed in filters:
        level = shape.within or shape.prefer
        if level:
            for name in _domains(cluster, level, allowed):
                yield _both(allowed, _inside(level, {name}))
        if not shape.within:
            yield allowed
    if shape.within and not cluster.nodes:
        yield base


def _domains(cluster: Cluster, level: str, allowed: Allowed) -> list[str]:
    """Domains of a level, fullest first, so that the smallest hole that holds the gang is used."""
    free: dict[str, int] = {}
    for name, space in cluster.ledger.spaces.items():
        node = cluster.nodes[name]
        if allowed(node):
            key = domain(node, level)
            free[key] = free.get(key, 0) + space.whole_total
    return sorted(free, key=lambda key: (free[key], key)) or [""]


def _place(cluster: Cluster, shape: Shape, allowed: Allowed, score: Score) -> Gang | Short:
    ledger = cluster.ledger
    bindings: list[Binding] = []
    used: dict[str, GpuClass] = {}
    for role in shape.roles:
        classes = ledger.matching(role) if role.gpu_milli else ()
        tries: list[tuple[GpuClass, ...]] = [(c,) for c in classes]
        if len(classes) != 1:
            tries.append(classes)
        placed: list[Binding] = []
        most = 0
        for attempt in tries:
            mark = ledger.mark()
            placed = _place_role(cluster, shape, role, attempt, allowed, 0, role.min, score)
            if len(placed) == role.min:
                if len(attempt) == 1:
                    used[role.role] = attempt[0]
                break
            most = max(most, len(placed))
            ledger.rollback(mark)
            placed = []
        if not placed:
            return Short(role, most)
        bindings += placed
    coordinator = ledger.ports(bindings[0].node, 1)
    if coordinator is None:
        return Short(shape.roles[0], 0)
    if coordinator:
        first = bindings[0]
        with_port = Binding(first.role, first.index, first.node, first.gpus, first.ports + coordinator)
        ledger.take(Binding(first.role, first.index, first.node, (), coordinator), _NOTHING)
        bindings[0] = with_port
    for role in shape.roles:
        if role.prefer > role.min:
            classes = (used[role.role],) if role.role in used else ledger.matching(role)
            bindings += _place_role(cluster, shape, role, classes, allowed, role.min, role.prefer, score)
    return Gang(tuple(bindings), coordinator[0] if coordinator else 0)


_NOTHING = RoleShape("", 0, 0, 0, 0, 0)


def _place_role(
    cluster: Cluster,
    shape: Shape,
    role: RoleShape,
    classes: tuple[GpuClass, ...],
    allowed: Allowed,
    low: int,
    high: int,
    score: Score,
) -> list[Binding]:
    """Replicas low..high-1 of a role, as many as fit. Stops at the first that does not."""
    placed: list[Binding] = []
    seen: set[str] = set()
    for index in range(low, high):
        fresh = allowed
        if shape.spread:
            fresh = _both(allowed, lambda node: domain(node, shape.spread) not in seen)
        binding = None
        if score is Score.SPREAD and placed and not shape.spread:
            here = placed[-1].node
            binding = _place_one(cluster, shape, role, index, classes, lambda node: node.name == here, (here,))  # noqa: B023
        if binding is None:
            binding = _place_one(cluster, shape, role, index, classes, fresh, None, score)
        if binding is None:
            break
        if shape.spread:
            seen.add(domain(cluster.nodes[binding.node], shape.spread))
        placed.append(binding)
    return placed


def _place_one(
    cluster: Cluster,
    shape: Shape,
    role: RoleShape,
    index: int,
    classes: tuple[GpuClass, ...],
    allowed: Allowed,
    among: Collection[NodeName] | None = None,
    score: Score = Score.PACK,
) -> Binding | None:
    ledger = cluster.ledger
    found = ledger.best_fit(role, classes, allowed, among or cluster.pool(shape), score is Score.SPREAD)
    if found is None:
        return None
    node, gpus = found
    ports = ledger.ports(node, role.ports)
    if ports is None:
        return None
    binding = Binding(role.role, index, node, gpus, ports)
    ledger.take(binding, role)
    return binding
