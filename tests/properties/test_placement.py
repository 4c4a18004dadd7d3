"""Placement on tiny clusters against brute force: a gang is placed exactly when it can be, and lawfully."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from jobsched.core.cluster import Cluster
from jobsched.core.events import NodeSeen
from jobsched.core.job import Binding, RoleShape, Shape
from jobsched.core.node import Gpu, Node, domain, kind_matches
from jobsched.core.policies.placement import Gang, Score, place_gang
from jobsched.core.resources import WHOLE_GPU, GpuId, NodeName

EXAMPLES = 10_000 if os.environ.get("BENCH") == "full" else 150
KINDS = ("a100-40gb", "t4")


@st.composite
def nodes(draw: st.DrawFn) -> tuple[Node, ...]:
    found = []
    for index in range(draw(st.integers(1, 4))):
        kinds = draw(st.lists(st.sampled_from(KINDS), max_size=3))
        gpus = tuple(Gpu(GpuId(f"n{index}g{i}"), kind, 16, island=str(i % 2)) for i, kind in enumerate(kinds))
        rack = draw(st.sampled_from(("x", "y")))
        cpus, memory = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        found.append(Node(NodeName(f"n{index}"), cpus, memory, gpus, labels=(("rack", rack),)))
    return tuple(found)


@st.composite
def roles(draw: st.DrawFn, name: str) -> RoleShape:
    count = draw(st.integers(1, 3))
    return RoleShape(
        role=name,
        min=count,
        prefer=count + draw(st.integers(0, 1)),
        cpu_milli=draw(st.integers(0, 3)),
        memory_bytes=draw(st.integers(0, 2)),
        gpu_milli=draw(st.sampled_from((0, 300, 400, 500, 600, 700, 1_000, 1_000, 2_000))),
        gpu_kinds=draw(st.sampled_from(((), (), ("t4",), ("a100", "t4")))),
        ports=0,
    )


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    names = draw(st.sampled_from((("a",), ("a", "b"), ("a", "b", "c"))))
    return Shape(
        roles=tuple(draw(roles(name)) for name in names),
        within=draw(st.sampled_from(("", "", "", "rack", "node"))),
        prefer=draw(st.sampled_from(("", "rack"))),
        spread=draw(st.sampled_from(("", "", "", "rack", "node"))),
    )


class Free:
    """What is left, in the simplest form there is."""

    def __init__(self, cluster: tuple[Node, ...]) -> None:
        self.nodes = {node.name: node for node in cluster}
        self.cpu = {node.name: node.cpu_milli for node in cluster}
        self.memory = {node.name: node.memory_bytes for node in cluster}
        self.gpu = {gpu.id: WHOLE_GPU for node in cluster for gpu in node.gpus}

    def take(self, role: RoleShape, node: NodeName, gpus: tuple[GpuId, ...], sign: int = 1) -> bool:
        self.cpu[node] -= sign * role.cpu_milli
        self.memory[node] -= sign * role.memory_bytes
        for gpu in gpus:
            self.gpu[gpu] -= sign * min(role.gpu_milli, WHOLE_GPU)
        return self.cpu[node] >= 0 and self.memory[node] >= 0 and all(self.gpu[gpu] >= 0 for gpu in gpus)

    def ways(self, role: RoleShape, node: NodeName) -> Iterator[tuple[GpuId, ...]]:
        fitting = [gpu for gpu in self.nodes[node].gpus if kind_matches(gpu.kind, role.gpu_kinds)]
        count = -(-role.gpu_milli // WHOLE_GPU)
        for chosen in combinations(fitting, count):
            if len({gpu.kind for gpu in chosen}) <= 1:
                yield tuple(gpu.id for gpu in chosen)


def lawful(shape: Shape, cluster: tuple[Node, ...], bound: list[tuple[str, NodeName]]) -> bool:
    by_name = {node.name: node for node in cluster}
    if shape.within and len({domain(by_name[node], shape.within) for _, node in bound}) > 1:
        return False
    if shape.spread:
        places = [(role, domain(by_name[node], shape.spread)) for role, node in bound]
        return len(places) == len(set(places))
    return True


def can_be_placed(shape: Shape, cluster: tuple[Node, ...]) -> bool:
    free = Free(cluster)
    todo = [role for role in shape.roles for _ in range(role.min)]
    bound: list[tuple[str, NodeName]] = []

    def descend(at: int) -> bool:
        if at == len(todo):
            return True
        role = todo[at]
        for node in free.nodes:
            bound.append((role.role, node))
            if lawful(shape, cluster, bound) and not (at and todo[at - 1] is role and bound[-2][1] > node):
                for gpus in free.ways(role, node):
                    fits = free.take(role, node, gpus)
                    if fits and descend(at + 1):
                        return True
                    free.take(role, node, gpus, -1)
            bound.pop()
        return False

    return descend(0)


def check(shape: Shape, cluster: tuple[Node, ...], bindings: tuple[Binding, ...]) -> None:
    free = Free(cluster)
    by_name = {role.role: role for role in shape.roles}
    for binding in bindings:
        role = by_name[binding.role]
        gpus = tuple(share.gpu for share in binding.gpus)
        assert free.take(role, binding.node, gpus)
        assert gpus in list(free.ways(role, binding.node))
        assert sum(share.milli for share in binding.gpus) == role.gpu_milli
    assert lawful(shape, cluster, [(b.role, b.node) for b in bindings])
    for role in shape.roles:
        indices = sorted(b.index for b in bindings if b.role == role.role)
        assert indices == list(range(len(indices)))
        assert role.min <= len(indices) <= role.prefer


@settings(max_examples=EXAMPLES, deadline=None)
@given(cluster=nodes(), shape=shapes(), score=st.sampled_from(list(Score)))
def test_a_gang_is_placed_exactly_when_brute_force_can(cluster: tuple[Node, ...], shape: Shape, score: Score) -> None:
    made = Cluster()
    for node in cluster:
        made.evolve(NodeSeen(0, node))
    made.mix.learn(shape)
    before = {name: (s.cpu_milli, s.memory_bytes, dict(s.gpu_free)) for name, s in made.ledger.spaces.items()}
    with made.ledger.trial():
        gang = place_gang(made, shape, (), score)
        if isinstance(gang, Gang):
            check(shape, cluster, gang.bindings)
    assert isinstance(gang, Gang) == can_be_placed(shape, cluster)
    assert {n: (s.cpu_milli, s.memory_bytes, dict(s.gpu_free)) for n, s in made.ledger.spaces.items()} == before
    with made.ledger.trial():
        assert place_gang(made, shape, (), score) == gang


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    cluster=nodes(),
    wanted=st.lists(st.tuples(shapes(), st.booleans()), max_size=6),
    score=st.sampled_from(list(Score)),
)
def test_a_ranking_that_was_kept_up_says_what_a_new_one_does(
    cluster: tuple[Node, ...], wanted: list[tuple[Shape, bool]], score: Score
) -> None:
    """Whatever was placed and given back before, the next gang goes where it would on a ledger built from scratch."""
    made = Cluster()
    for node in cluster:
        made.evolve(NodeSeen(0, node))
    held: list[tuple[Binding, RoleShape]] = []
    for shape, keeps in wanted:
        made.mix.learn(shape)
        fresh = Cluster(mix=made.mix)
        for node in cluster:
            fresh.evolve(NodeSeen(0, node))
        for binding, role in held:
            fresh.ledger.take(binding, role)
        with made.ledger.trial(), fresh.ledger.trial():
            gang = place_gang(made, shape, (), score)
            assert place_gang(fresh, shape, (), score) == gang
        if isinstance(gang, Gang):
            by_name = {role.role: role for role in shape.roles}
            for binding in gang.bindings:
                made.ledger.take(binding, by_name[binding.role])
                held.append((binding, by_name[binding.role]))
        if not keeps and held:
            made.ledger.give(*held.pop(0))
