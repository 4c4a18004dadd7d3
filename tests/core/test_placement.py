from __future__ import annotations

from jobsched.core.cluster import Cluster
from jobsched.core.events import NodeCordoned, NodeLost, NodeSeen, NodeUncordoned
from jobsched.core.job import Binding, RoleShape, Shape
from jobsched.core.ledger import Short
from jobsched.core.node import Gpu, Node
from jobsched.core.policies.placement import Choice, Gang, Score, place_gang, place_more
from jobsched.core.resources import GpuId, GpuShare, NodeName, Resources
from tests.world import a_gpu_node

GIB = 2**30


def cluster_of(*nodes: Node) -> Cluster:
    made = Cluster()
    for node in nodes:
        made.evolve(NodeSeen(0, node))
    return made


def a_role(count: int = 1, gpu_milli: int = 1_000, cpu_milli: int = 1_000, **fields: object) -> RoleShape:
    name = str(fields.pop("role", "worker"))
    return RoleShape(name, count, int(str(fields.pop("prefer", count))), cpu_milli, 0, gpu_milli, **fields)  # type: ignore[arg-type]


def a_shape(*roles: RoleShape, **fields: object) -> Shape:
    return Shape(roles or (a_role(),), **fields)  # type: ignore[arg-type]


def nodes_of(bindings: tuple[Binding, ...]) -> list[str]:
    return [str(b.node) for b in bindings]


def placed(cluster: Cluster, shape: Shape, score: Choice = Score.PACK, avoid: tuple[str, ...] = ()) -> list[str] | None:
    """The nodes of a gang, which stays placed; None when it does not fit."""
    with cluster.ledger.trial():
        gang = place_gang(cluster, shape, [NodeName(name) for name in avoid], score)
    if isinstance(gang, Short):
        return None
    roles = {role.role: role for role in shape.roles}
    for binding in gang.bindings:
        cluster.ledger.take(binding, roles[binding.role])
    return nodes_of(gang.bindings)


def test_a_gang_goes_to_the_fullest_node_that_holds_all_of_it() -> None:
    cluster = cluster_of(a_gpu_node("a", 8), a_gpu_node("b", 4), a_gpu_node("c", 2))
    assert placed(cluster, a_shape(a_role(3))) == ["b"] * 3
    assert placed(cluster, a_shape(a_role(1))) == ["b"]
    assert placed(cluster, a_shape(a_role(9))) == ["a"] * 8 + ["c"]
    assert placed(cluster, a_shape(a_role(2))) is None


def test_cpus_of_a_node_bound_how_much_of_a_gang_it_holds() -> None:
    cluster = cluster_of(a_gpu_node("a", 8, cpus=4), a_gpu_node("b", 8, cpus=64))
    assert placed(cluster, a_shape(a_role(6, cpu_milli=2_000))) == ["b"] * 6
    assert placed(cluster, a_shape(a_role(4, cpu_milli=2_000))) == ["a", "a", "b", "b"]


def test_spread_score_takes_the_emptiest_node_and_stays_there() -> None:
    cluster = cluster_of(a_gpu_node("a", 2), a_gpu_node("b", 4))
    assert placed(cluster, a_shape(a_role(5)), Score.SPREAD) == ["b"] * 4 + ["a"]


def test_elastic_roles_grow_beside_their_peers() -> None:
    cluster = cluster_of(a_gpu_node("a", 4), a_gpu_node("b", 8))
    assert placed(cluster, a_shape(a_role(2, prefer=6))) == ["a"] * 4 + ["b"] * 2


def test_more_replicas_go_where_their_peers_are_and_keep_their_kind() -> None:
    cluster = cluster_of(a_gpu_node("a", 1, "t4"), a_gpu_node("b", 4, "v100"), a_gpu_node("c", 2, "v100"))
    role = a_role(1)
    taken = Binding("worker", 0, NodeName("b"), (GpuShare(GpuId("b-g0")),))
    cluster.ledger.take(taken, role)
    with cluster.ledger.trial():
        more = place_more(cluster, a_shape(role), role, range(1, 9), [taken])
    assert nodes_of(more) == ["b"] * 3 + ["c"] * 2


def test_kinds_in_order_and_one_kind_per_role_if_any_has_enough() -> None:
    cluster = cluster_of(a_gpu_node("a", 2, "h100-80gb"), a_gpu_node("b", 4, "a100-80gb"))
    kinds = ("h100", "a100")
    assert placed(cluster, a_shape(a_role(1, gpu_kinds=kinds))) == ["a"]
    assert placed(cluster, a_shape(a_role(2, gpu_kinds=kinds))) == ["b", "b"]
    assert placed(cluster, a_shape(a_role(3, gpu_kinds=kinds))) == ["a", "b", "b"]


def test_mig_slices_are_a_kind_of_their_own() -> None:
    slices = tuple(Gpu(GpuId(f"m{i}"), "h100-80gb:1g.10gb", 10 * GIB) for i in range(7))
    cluster = cluster_of(Node(NodeName("a"), 64_000, 256 * GIB, slices))
    assert placed(cluster, a_shape(a_role(1))) is None
    assert placed(cluster, a_shape(a_role(1, gpu_kinds=("h100",)))) is None
    assert placed(cluster, a_shape(a_role(7, gpu_kinds=("h100-80gb:1g.10gb",)))) == ["a"] * 7


def test_shares_fill_started_gpus() -> None:
    for score in (Score.PACK, Score.FRAGMENTATION):
        cluster = cluster_of(a_gpu_node("a", 2), a_gpu_node("b", 2))
        for milli in (500, 250, 300):
            for _ in range(20):
                cluster.mix.learn(a_shape(a_role(gpu_milli=milli)))
        with cluster.ledger.trial():
            gang = place_gang(cluster, a_shape(a_role(4, gpu_milli=500)), (), score)
            assert isinstance(gang, Gang)
            assert len({(b.node, b.gpus[0].gpu) for b in gang.bindings}) == 2, score
    assert placed(cluster, a_shape(a_role(8, gpu_milli=500))) is not None
    assert placed(cluster, a_shape(a_role(1, gpu_milli=100))) is None


def test_taints_labels_cordons_and_losses_keep_nodes_out() -> None:
    cluster = cluster_of(
        a_gpu_node("a", 8, labels=(("zone", "x"),)), a_gpu_node("b", 8, taints=("gpu=a",)), a_gpu_node("c", 8)
    )
    eight = a_role(8)
    assert placed(cluster, a_shape(eight, node_labels=(("zone", "x"),))) == ["a"] * 8
    assert placed(cluster, a_shape(eight, node_labels=(("zone", "x"),))) is None
    cluster.evolve(NodeCordoned(0, NodeName("c"), "ops"))
    assert placed(cluster, a_shape(eight)) is None
    assert placed(cluster, a_shape(eight, tolerate=("gpu",), avoid=("b",))) is None
    assert placed(cluster, a_shape(eight, tolerate=("gpu",))) == ["b"] * 8
    cluster.evolve(NodeUncordoned(0, NodeName("c"), "ops"))
    cluster.evolve(NodeLost(0, NodeName("c")))
    assert placed(cluster, a_shape(eight)) is None
    cluster.evolve(NodeSeen(0, a_gpu_node("c", 8)))
    assert placed(cluster, a_shape(eight)) == ["c"] * 8


def test_nodes_that_failed_a_job_are_tried_last() -> None:
    cluster = cluster_of(a_gpu_node("a", 1), a_gpu_node("b", 8))
    assert placed(cluster, a_shape(), avoid=("a",)) == ["b"] != ["a"]
    assert placed(cluster, a_shape(a_role(8)), avoid=("b",)) == ["b"] * 7 + ["a"]


def test_foreign_use_is_not_offered() -> None:
    node = a_gpu_node("a", 2, foreign=Resources(63_000), foreign_gpus=(GpuShare(GpuId("a-g0"), 400),))
    cluster = cluster_of(node)
    assert placed(cluster, a_shape(a_role(1, gpu_milli=600, cpu_milli=0))) == ["a"]
    assert placed(cluster, a_shape(a_role(2))) is None
    assert placed(cluster, a_shape(a_role(1))) == ["a"]


def racks(*free: int) -> Cluster:
    """Two nodes a rack, so many GPUs each."""
    return cluster_of(*(a_gpu_node(f"n{i}", gpus, labels=(("rack", f"r{i // 2}"),)) for i, gpus in enumerate(free)))


def test_within_one_domain_the_smallest_hole() -> None:
    cluster = racks(8, 8, 4, 4, 2, 2)
    assert placed(cluster, a_shape(a_role(6), within="rack")) == ["n2"] * 4 + ["n3"] * 2
    assert placed(cluster, a_shape(a_role(16), within="rack")) == ["n0"] * 8 + ["n1"] * 8
    assert placed(cluster, a_shape(a_role(5), within="rack")) is None
    assert placed(cluster, a_shape(a_role(5), prefer="rack")) is not None


def test_within_one_node() -> None:
    cluster = racks(2, 4)
    assert placed(cluster, a_shape(a_role(2), a_role(1, role="chief"), within="node")) == ["n1"] * 3
    assert placed(cluster, a_shape(a_role(3), within="node")) is None


def test_spread_over_domains() -> None:
    cluster = racks(8, 8, 8, 8)
    found = placed(cluster, a_shape(a_role(2), spread="rack"))
    assert found is not None
    assert {name in ("n0", "n1") for name in found} == {True, False}
    assert placed(cluster, a_shape(a_role(3), spread="rack")) is None
    assert placed(cluster, a_shape(a_role(4), spread="node")) is not None


def test_gpus_of_one_replica_share_an_nvlink_island() -> None:
    gpus = tuple(Gpu(GpuId(f"g{i}"), "v100", 16 * GIB, island="left" if i % 2 else "right") for i in range(8))
    cluster = cluster_of(Node(NodeName("a"), 64_000, 256 * GIB, gpus))
    role = a_role(1, gpu_milli=4_000)
    with cluster.ledger.trial():
        first = place_gang(cluster, a_shape(a_role(1, gpu_milli=1_000), role_of("pair", 2), role_of("four", 4)))
        assert isinstance(first, Gang)
        one, pair, four = ({share.gpu for share in b.gpus} for b in first.bindings)
        assert len({int(g[1:]) % 2 for g in pair | one}) == 1
        assert len({int(g[1:]) % 2 for g in four}) == 1
        assert isinstance(place_gang(cluster, a_shape(role)), Short)


def role_of(name: str, gpus: int) -> RoleShape:
    return a_role(1, gpu_milli=1_000 * gpus, role=name)


def test_roles_that_are_in_each_others_way_are_rearranged() -> None:
    """Greedily the evaluator takes the only node on which the workers' CPUs would be."""
    cluster = cluster_of(a_gpu_node("a", 1, cpus=8), a_gpu_node("b", 2, cpus=2))
    shape = a_shape(a_role(1, role="evaluator", gpu_milli=1_000, cpu_milli=1_000), a_role(1, cpu_milli=8_000))
    assert placed(cluster, shape) == ["b", "a"]


def test_auto_packs_until_somebody_asks_for_part_of_a_gpu() -> None:
    cluster = cluster_of(a_gpu_node("a", 8), a_gpu_node("b", 8))
    cluster.mix.learn(a_shape(a_role(4)))
    assert placed(cluster, a_shape(a_role(4)), Score.AUTO) == ["a"] * 4
    assert not cluster.mix.shares
    cluster.mix.learn(a_shape(a_role(1, gpu_milli=500)))
    assert cluster.mix.shares
    assert placed(cluster, a_shape(a_role(4)), Score.AUTO) == ["a"] * 4


def test_what_did_not_fit_is_tried_again_once_something_is_free() -> None:
    cluster = cluster_of(a_gpu_node("a", 2))
    role, shape = a_role(2), a_shape(a_role(2))
    with cluster.ledger.trial() as ledger:
        gang = place_gang(cluster, a_shape(a_role(1)))
        assert isinstance(gang, Gang)
        mark = ledger.mark()
        assert isinstance(place_gang(cluster, shape), Short)
        assert isinstance(place_gang(cluster, shape), Short)
        ledger.lend(gang.bindings[0], role)
        assert isinstance(place_gang(cluster, shape), Gang)
        ledger.rollback(mark)
        assert isinstance(place_gang(cluster, shape), Short)
        ledger.rollback(0)
        assert isinstance(place_gang(cluster, shape), Gang)
