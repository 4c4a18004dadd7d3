from __future__ import annotations

import pytest

from jobsched.core.job import Binding, RoleShape
from jobsched.core.ledger import STOCKS_KEPT, Ledger
from jobsched.core.node import Node, kind_matches
from jobsched.core.resources import GpuId, GpuShare, NodeName, Resources
from tests.world import a_gpu_node


def role(gpu_milli: int = 1_000, cpu_milli: int = 1_000, **fields: object) -> RoleShape:
    return RoleShape("worker", 1, 1, cpu_milli, 0, gpu_milli, **fields)  # type: ignore[arg-type]


def ledger(*nodes: Node) -> Ledger:
    made = Ledger()
    for node in nodes:
        made.put_node(node)
    return made


def bind(book: Ledger, shape: RoleShape) -> Binding | None:
    for cls in book.matching(shape):
        fit = book.best_fit(shape, cls, book.spaces, 1)
        if fit is not None:
            space, milli = book.spaces[fit.node], shape.gpu_milli
            gpus = space.pick_share(cls, milli, fit.level) if milli < 1_000 else space.pick(cls, milli // 1_000)
            binding = Binding("worker", 0, fit.node, gpus, book.ports(fit.node, 1) or ())
            book.take(binding, shape)
            return binding
    return None


def test_best_fit_leaves_whole_nodes_free() -> None:
    book = ledger(a_gpu_node("a", 8), a_gpu_node("b", 4), a_gpu_node("c", 2))
    assert [b.node for b in (bind(book, role()), bind(book, role()), bind(book, role(4_000))) if b] == ["c", "c", "b"]
    assert bind(book, role(8_000)) is not None
    assert bind(book, role()) is None


def test_shares_fill_a_started_gpu_before_opening_another() -> None:
    book = ledger(a_gpu_node("a", 2))
    shares = [bind(book, role(milli)) for milli in (500, 250, 250, 600)]
    gpus = [b.gpus[0].gpu for b in shares if b]
    assert gpus[0] == gpus[1] == gpus[2] != gpus[3]
    assert bind(book, role(500)) is None
    assert bind(book, role(400)) is not None


@pytest.mark.parametrize(
    ("kind", "wanted", "matches"),
    [
        ("h100-80gb", ("h100",), True),
        ("h100-80gb", (), True),
        ("h100-80gb:1g.10gb", ("h100",), False),
        ("h100-80gb:1g.10gb", (), False),
        ("h100-80gb:1g.10gb", ("h100-80gb:1g.10gb",), True),
        ("h1000", ("h100",), False),
        ("a100-40gb", ("h100", "A100"), True),
    ],
)
def test_kinds(kind: str, wanted: tuple[str, ...], matches: bool) -> None:
    assert kind_matches(kind, wanted) is matches


def test_kinds_in_order_of_preference_and_memory_bounds() -> None:
    book = ledger(a_gpu_node("a", 1, "a100-40gb"), a_gpu_node("h", 1, "h100-80gb"))
    first = bind(book, role(gpu_kinds=("h100", "a100")))
    assert first is not None
    assert first.node == "h"
    assert book.matching(role(gpu_memory_min_bytes=17 * 2**30)) == ()
    assert len(book.matching(role(gpu_memory_min_bytes=8 * 2**30))) == 2


def test_a_trial_puts_everything_back() -> None:
    book = ledger(a_gpu_node("a", 8), a_gpu_node("b", 8))
    before = [(s.whole_total, s.cpu_milli, sorted(s.ports_used), s.next_port) for s in book.spaces.values()]
    freed = book.freed
    with book.trial():
        assert bind(book, role(8_000))
        mark = book.mark()
        assert bind(book, role(3_500 // 1_000 * 1_000))
        assert bind(book, role(500))
        book.rollback(mark)
        assert bind(book, role(8_000))
    assert [(s.whole_total, s.cpu_milli, sorted(s.ports_used), s.next_port) for s in book.spaces.values()] == before
    assert book.freed == freed


def test_trials_alone_do_not_make_the_list_of_changes_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobsched.core.ledger.CHANGES_KEPT", 10)
    book = ledger(a_gpu_node("a", 8))
    joined = len(book.changes)
    for _ in range(100):
        with book.trial():
            assert bind(book, role())
    assert len(book.changes) <= 12
    assert book.changes_from + len(book.changes) == joined + 200  # taken and put back: who follows loses no place


def test_what_a_trial_decides_on_stays_taken_until_it_comes_to_be_or_anything_else_happens() -> None:
    def decided() -> tuple[Ledger, list[Binding]]:
        book = ledger(a_gpu_node("a", 4, port_lo=7_000, port_hi=7_003))
        with book.trial():
            found = [bind(book, role()), bind(book, role())]
            book.stay([b for b in found if b])
        assert book.free_gpu_milli == 2_000
        return book, [b for b in found if b]

    book, (first, second) = decided()
    book.take(first, role())
    book.take(second, role())
    assert (book.free_gpu_milli, book.spaces[NodeName("a")].bound) == (2_000, 2)  # they came to be, and count once
    book.give(first, role())
    assert book.free_gpu_milli == 3_000

    book, (first, second) = decided()
    book.take(first, role())
    book.unblock()  # the other was refused
    assert (book.free_gpu_milli, book.spaces[NodeName("a")].ports_used) == (3_000, {*first.ports})

    book, (first, second) = decided()
    with book.trial():  # somebody asks before it is written
        assert book.free_gpu_milli == 4_000
    book.take(first, role())
    assert book.free_gpu_milli == 3_000

    book, (first, second) = decided()
    book.put_node(a_gpu_node("a", 4))
    book.take(first, role())
    assert book.free_gpu_milli == 3_000

    book, (first, second) = decided()
    book.take(Binding("worker", 0, NodeName("a"), first.gpus, first.ports), role())  # the same, read from a log
    book.take(Binding("worker", 1, NodeName("a"), second.gpus, second.ports), role())
    assert (book.free_gpu_milli, book.spaces[NodeName("a")].bound) == (2_000, 2)

    with book.trial():  # who leaves is only lent, so nothing stays
        book.lend(first, role())
        third = bind(book, role())
        assert third is not None
        book.stay([third])
    assert (book.free_gpu_milli, book.spaces[NodeName("a")].bound) == (2_000, 2)


def test_foreign_use_and_unhealthy_gpus_are_not_offered() -> None:
    node = a_gpu_node("a", 3, foreign=Resources(cpu_milli=63_500), foreign_gpus=(GpuShare(GpuId("a-g0")),))
    book = ledger(node)
    assert bind(book, role()) is None
    assert bind(book, role(cpu_milli=100)) is not None
    assert bind(book, role(cpu_milli=100)) is not None
    assert bind(book, role(cpu_milli=100)) is None


def test_ports_roll_forward_and_are_never_handed_out_twice() -> None:
    book = ledger(a_gpu_node("a", 8, port_lo=100, port_hi=103))
    shape = role(cpu_milli=10)
    bindings = [bind(book, shape) for _ in range(4)]
    assert [b.ports for b in bindings if b] == [(100,), (101,), (102,), (103,)]
    assert book.ports(NodeName("a"), 1) is None
    assert bindings[0]
    book.give(bindings[0], shape)
    assert book.ports(NodeName("a"), 1) == (100,)
    assert bindings[2]
    book.give(bindings[2], shape)
    again = bind(book, shape)
    assert again
    assert again.ports == (100,)
    assert book.ports(NodeName("a"), 1) == (102,)


def test_the_stock_of_nodes_with_a_label_follows_what_is_taken_freed_joins_and_leaves() -> None:
    blue = (("team", "blue"),)
    book = ledger(a_gpu_node("a", 2, labels=blue), a_gpu_node("b", 4, labels=(("team", "red"),)))
    stock = book.stock(blue)
    assert (stock.free_milli, book.stock((*blue, ("zone", "z"))).free_milli, book.free_gpu_milli) == (2_000, 0, 6_000)
    binding = bind(book, role())
    assert binding is not None
    assert binding.node == "a"
    assert (stock.free_milli, book.free_gpu_milli) == (1_000, 5_000)
    freed = stock.freed
    book.give(binding, role())
    assert (stock.free_milli, book.free_gpu_milli) == (2_000, 6_000)
    assert stock.freed > freed
    freed = stock.freed
    other = bind(book, role(4_000))
    assert other is not None
    book.give(other, role(4_000))
    assert stock.freed == freed, "what is freed elsewhere makes nothing here worth a try"
    book.unblock()
    assert stock.freed > freed
    book.put_node(a_gpu_node("c", 8, labels=(*blue, ("zone", "z"))))
    assert (stock.free_milli, book.stock((*blue, ("zone", "z"))).free_milli) == (10_000, 8_000)
    with book.trial():
        assert bind(book, role(8_000)) is not None
        assert stock.free_milli == 2_000
    assert stock.free_milli == 10_000
    book.drop_node(NodeName("c"))
    assert stock.free_milli == 2_000


def test_beyond_so_many_labels_all_nodes_are_looked_at() -> None:
    book = ledger(a_gpu_node("a", 2))
    stocks = [book.stock((("job", str(number)),)) for number in range(STOCKS_KEPT + 1)]
    assert stocks[0].free_milli == 0
    assert stocks[-1] is book.everywhere
