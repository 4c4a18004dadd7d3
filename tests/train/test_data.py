"""Data plans and the ledger of leases: each sample once an epoch, whatever happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsched.train.data import Ledger, Plan

PLAN = Plan(size=10, batch=4, epochs=2, seed=3)


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    epochs = [np.concatenate([PLAN.indices(p) for p in range(e * 3, e * 3 + 3)]) for e in range(2)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert list(epochs[0]) != list(epochs[1])
    assert (PLAN.per_epoch, PLAN.total) == (3, 6)


@given(st.integers(1, 9), st.integers(0, 5))
def test_the_shares_of_all_ranks_make_up_the_batch(world: int, position: int) -> None:
    shares = np.concatenate([PLAN.share(position, rank, world) for rank in range(world)])
    assert list(shares) == list(PLAN.indices(position))


@settings(max_examples=60)
@given(st.data())
def test_every_batch_is_done_once_however_workers_come_and_go(data: st.DataObject) -> None:
    """Workers lease, finish, die, fall silent and come back late; time passes."""
    ledger, now = Ledger(PLAN, lease_s=5), 0.0
    held: dict[str, int] = {}
    for _ in range(200):
        if ledger.finished:
            break
        worker = data.draw(st.sampled_from("abc"))
        match data.draw(st.sampled_from(["lease", "lease", "finish", "finish", "release", "wait"])):
            case "lease":
                position = ledger.lease(worker, now)
                if position is not None:
                    held[worker] = position
            case "finish" if worker in held:
                position = held.pop(worker)
                if ledger.holds(worker, position):
                    ledger.finish(position, PLAN.indices(position))
            case "release":
                ledger.release(worker)
            case "wait":
                now += data.draw(st.sampled_from([1, 6]))
    while not ledger.finished:
        now += 6
        position = ledger.lease("z", now)
        assert position is not None
        ledger.finish(position, PLAN.indices(position))
    assert (ledger.complete_epochs, ledger.exact_epochs) == (2, 2)


def test_asking_twice_gives_the_same_lease() -> None:
    ledger = Ledger(PLAN)
    assert ledger.lease("a", 0) == ledger.lease("a", 1) == 0
    assert ledger.lease("b", 1) == 1


def test_a_batch_leased_on_is_refused_from_its_first_holder() -> None:
    ledger = Ledger(PLAN, lease_s=5)
    assert ledger.lease("slow", 0) == 0
    assert ledger.lease("fast", 6) == 0
    assert not ledger.holds("slow", 0)
    assert ledger.holds("fast", 0)


def test_renewing_keeps_a_lease() -> None:
    ledger = Ledger(PLAN, lease_s=5)
    ledger.lease("a", 0)
    ledger.renew("a", 4)
    assert ledger.lease("b", 6) == 1


def test_samples_that_were_not_loaded_are_found_out() -> None:
    ledger = Ledger(PLAN)
    for position in range(3):
        ledger.finish(position, PLAN.indices(0))
    assert (ledger.complete_epochs, ledger.exact_epochs) == (1, 0)


def test_the_journal_outlives_a_kill_even_with_its_last_line_cut(tmp_path: Path) -> None:
    journal = tmp_path / "leases.jsonl"
    first = Ledger(PLAN, journal)
    for position in (0, 2, 4):
        first.finish(position, PLAN.indices(position))
    journal.write_bytes(journal.read_bytes()[:-3])
    second = Ledger(PLAN, journal)
    assert second.done == {0, 2}
    second.finish(1, PLAN.indices(1))
    third = Ledger(PLAN, journal)
    assert third.done == {0, 1, 2}
    assert third.exact_epochs == 1
    assert [third.lease(w, 0) for w in "abcd"] == [3, 4, 5, None]


def test_a_journal_of_another_plan_is_set_aside(tmp_path: Path) -> None:
    journal = tmp_path / "leases.jsonl"
    Ledger(PLAN, journal).finish(0, PLAN.indices(0))
    assert Ledger(Plan(10, 5, 2), journal).done == set()
    assert (tmp_path / "leases.old").exists()
