"""How large a batch pays: on its own, in one process, and in a real gang whose model must be as good."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from jobsched.core.policies.goodput import Report
from jobsched.train import ddp
from jobsched.train.batch_size import SETTLE, BatchSize, gain
from jobsched.train.data import Plan
from tests.train.gang import Gang

SCRIPT = "jobs/digits_ddp/train.py"


def after(size: BatchSize, square: float, variance: float, steps: int = 200) -> int:
    """What it comes to when computing takes 20 ms and 5 ms a batch, and the all-reduce 30 ms."""
    for _ in range(steps):
        size.note(0.05 + 0.005 * size.multiple, 0.03)
        size.became(*size.choose(square, variance))
    return size.multiple


def test_noisy_gradients_get_large_batches_and_clean_ones_do_not() -> None:
    assert after(BatchSize(16), 0.01, 10.0) == 16
    assert after(BatchSize(16), 10.0, 0.01) == 1
    middle = after(BatchSize(64), 1.0, 4.0)
    best = max(range(1, 65), key=lambda k: gain(1.0, 4.0, k) / (0.05 + 0.005 * k))
    assert gain(1.0, 4.0, middle) / (0.05 + 0.005 * middle) > 0.95 * gain(1.0, 4.0, best) / (0.05 + 0.005 * best)


@pytest.mark.parametrize("held_up", [1, 5, 25, 45])
def test_a_step_in_which_somebody_was_held_up_changes_nothing(held_up: int) -> None:
    size = BatchSize(16)
    after(size, 0.01, 10.0, steps=held_up)
    size.note(10.0, 9.9)
    assert after(size, 0.01, 10.0) == 16


def test_it_changes_seldom_and_never_more_than_doubles_what_was_tried() -> None:
    size, seen = BatchSize(16), [1]
    for step in range(1, 100):
        before = size.multiple
        after(size, 0.01, 10.0, steps=1)
        if size.multiple != before:
            assert size.multiple <= 2 * max(seen)
            assert step >= SETTLE * len(seen)
            seen.append(size.multiple)
    assert seen == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(("rule", "factor"), [("adascale", gain(1.0, 3.0, 4)), ("sqrt", 2.0), ("linear", 4.0)])
def test_the_learning_rate_follows_the_rule(rule: str, factor: float) -> None:
    size = BatchSize(4, rule)  # type: ignore[arg-type]
    size.became(4, 1.0)
    assert size.choose(1.0, 3.0) == (4, pytest.approx(factor))


def test_every_sample_is_used_once_an_epoch_and_the_rate_is_put_back(tmp_path: Path) -> None:
    """Ten samples in batches of two, three of which make a step: 3 + 2 an epoch."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ddp.Elastic(model, optimizer, plan=Plan(10, 2, 3), state={"used": torch.zeros(10)},
                          checkpoint_dir=str(tmp_path), max_batch=6, lr_rule="linear")
    trainer.batch_size.became(3, 3.0)
    sizes, moved = [], []
    for batch in trainer.batches():
        rows = torch.from_numpy(batch.indices)
        before = model.weight.detach().clone()
        used = torch.zeros(10).index_add_(0, rows, torch.ones(len(rows)))
        trainer.state["used"] += trainer.step(model(torch.ones(len(rows), 1)).mean(), used=used)["used"]
        sizes.append((len(rows), batch.batches, batch.last))
        moved.append(float(before - model.weight.detach()))
        assert optimizer.param_groups[0]["lr"] == 0.1
        if trainer.position == 10:
            trainer._save()
    assert sizes == [(6, 3, False), (4, 2, True)] * 3
    assert moved == pytest.approx([0.3, 0.2] * 3, abs=1e-6)
    assert (trainer.state["used"] == 3).all()


def test_what_was_decided_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)

    def trainer() -> ddp.Elastic:
        return ddp.Elastic(model, torch.optim.SGD(model.parameters(), lr=0.1), plan=Plan(10, 2, 3),
                           checkpoint_dir=str(tmp_path), max_batch=8)

    first = trainer()
    first.batch_size.became(4, 1.5)
    first.position = 5
    first._save()
    again = trainer()
    assert (again.position, again.batch_size.multiple, again.batch_size.factor) == (5, 4, 1.5)


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    made = Gang(tmp_path, {"worker": 3}, min_replicas=2)
    yield made
    made.close()


@pytest.mark.e2e
def test_digits_take_far_fewer_steps_with_larger_batches_and_are_as_good(gang: Gang) -> None:
    command = [SCRIPT, "--epochs", "30", "--batch", "24", "--max-batch", "192", "--pause-ms", "3"]
    for index in range(3):
        gang.start("worker", index, command)
    assert [gang.wait_exit("worker", index) for index in range(3)] == [0, 0, 0], gang.logs()
    assert "30 of 30 epochs exact" in gang.log("worker", 0)
    metrics = gang.told("worker", 0, "steps")["metrics"]
    accuracy = re.search(r"accuracy (\d\.\d+)", gang.log("worker", 0))
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.95
    assert metrics["steps"] < 0.7 * 30 * 60  # batches of the plan
    report = Report.of(metrics, 1, 3)
    assert report is not None
    assert (report.batches.initial, report.batches.largest) == (24.0, 192.0)
    assert report.noise[1] > 0.0
