"""`Elastic` alone, and as a real gang of processes that lose members and get them back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from jobsched.train import ddp
from jobsched.train.context import context
from jobsched.train.data import Plan
from tests.train.gang import AT_ONCE_S, Gang

SCRIPT = "jobs/digits_ddp/train.py"


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    made = Gang(tmp_path, {"worker": 4}, wanted={"worker": 3}, min_replicas=2)
    yield made
    made.close()


def a_trainer(directory: Path | str = "", epochs: int = 2) -> ddp.Elastic:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return ddp.Elastic(model, torch.optim.SGD(model.parameters(), lr=0.1), plan=Plan(10, 4, epochs),
                       state={"used": torch.zeros(10)}, checkpoint_dir=str(directory))


def train(trainer: ddp.Elastic, stop_at: int | None = None) -> None:
    inputs = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    for batch in trainer.batches():
        rows = torch.from_numpy(batch.indices)
        used = torch.zeros(10).index_add_(0, rows, torch.ones(len(rows)))
        trainer.state["used"] += trainer.step(trainer.model(inputs[rows]).square().mean(), used=used)["used"]
        if trainer.position == stop_at:
            return


def test_a_single_process_trains_outside_jobsched() -> None:
    trainer = a_trainer()
    before = trainer.model.weight.detach().clone()
    train(trainer)
    assert trainer.position == 6
    assert (trainer.state["used"] == 2).all()
    assert not torch.equal(before, trainer.model.weight)


def test_it_goes_on_exactly_where_the_checkpoint_was(tmp_path: Path) -> None:
    whole = a_trainer()
    train(whole)
    first = a_trainer(tmp_path)
    train(first, stop_at=3)
    first._save()
    second = a_trainer(tmp_path)
    assert second.position == 3
    train(second)
    assert torch.equal(whole.model.weight, second.model.weight)
    assert torch.equal(whole.state["used"], second.state["used"])


def test_a_request_for_a_checkpoint_is_acknowledged(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    context._checkpoint_wanted = True
    train(trainer, stop_at=2)
    assert not context.should_checkpoint()
    assert [s.step for s in trainer._checkpoints.list()] == [1]


def test_a_finished_training_yields_nothing_more(tmp_path: Path) -> None:
    train(a_trainer(tmp_path))
    again = a_trainer(tmp_path)
    assert list(again.batches()) == []
    assert (again.state["used"] == 2).all()


def start(gang: Gang, epochs: int, *more: str) -> list[str]:
    """Three replicas, all at the gate: step 40, a good epoch."""
    command = [SCRIPT, "--epochs", str(epochs), "--accuracy", "0.8", *more]
    gang.let_on_to(40)
    for index in range(3):
        gang.start("worker", index, command)
    for index in range(3):
        gang.wait_report(lambda r, i=index: r.body.get("world") == 3 and r.body["step"] == 40
                         and r.key.startswith(f"job/1/worker/{i}/"))
    return command


def joins(message: str) -> bool:
    """Whether somebody waits for a group that runs."""
    return message.startswith("waits for replica") and message.endswith((" to join", " to open the next round"))


@pytest.mark.e2e
@pytest.mark.parametrize("victim", [0, 2], ids=["leader", "member"])
def test_the_world_goes_3_2_3_and_every_epoch_is_exact(gang: Gang, victim: int) -> None:
    command = start(gang, epochs=8)
    killed = gang.kill("worker", victim)
    gang.let_on_to(80)
    useful = gang.wait_report(lambda r: r.body.get("world") == 2 and r.body["step"] == 80, since_s=killed)
    assert useful.at_s - killed < AT_ONCE_S  # about 0.15 s on a quiet machine, the steps included
    gang.start("worker", victim, command, restart=1)
    back = gang.wait_report(lambda r: r.key.endswith(f"worker/{victim}/1") and joins(r.body.get("message", "")))
    gang.creep(lambda r: r.body.get("world") == 3, since_s=back.at_s)
    gang.let_on_to(float("inf"))
    assert [gang.wait_exit("worker", i) for i in range(3)] == [0, 0, 0], gang.logs()
    for index in range(3):
        assert "8 of 8 epochs exact" in gang.log("worker", index)
    assert gang.told("worker", 1, "epoch_exact")["metrics"]["epoch_exact"] == 1


@pytest.mark.e2e
def test_a_fourth_replica_is_let_in_though_the_others_were_not_told_its_address(gang: Gang) -> None:
    full = gang.peers
    gang.peers = {"worker": (*full["worker"][:3], "")}
    command = start(gang, epochs=8)
    gang.peers = full
    gang.start("worker", 3, command)
    gang.wait_report(lambda r: r.key.endswith("worker/3/0") and joins(r.body.get("message", "")))
    gang.creep(lambda r: r.body.get("world") == 4)
    gang.let_on_to(float("inf"))
    assert [gang.wait_exit("worker", i) for i in range(4)] == [0] * 4, gang.logs()
    assert "8 of 8 epochs exact" in gang.log("worker", 3)


@pytest.mark.e2e
def test_all_killed_at_once_go_on_from_the_checkpoint_in_a_new_attempt(gang: Gang) -> None:
    start(gang, epochs=8)
    gang.kill("worker", 1, signal.SIGUSR1)  # please save
    saved = gang.creep(lambda r: r.body.get("saved", {"step": 0})["step"] > 40).body["saved"]
    for index in range(3):
        gang.kill("worker", index)
    gang.attempt = 2
    for index in range(3):
        gang.start("worker", index, [SCRIPT, "--epochs", "8", "--accuracy", "0.8"])
    first = gang.wait_report(lambda r: r.key.startswith("job/2/") and r.body.get("world") == 3)
    assert first.body["step"] >= saved["step"]
    gang.let_on_to(float("inf"))
    assert [gang.wait_exit("worker", i) for i in range(3)] == [0, 0, 0], gang.logs()
    assert "8 of 8 epochs exact" in gang.log("worker", 0)


@pytest.mark.e2e
def test_who_comes_back_after_the_end_finishes_too(gang: Gang) -> None:
    command = start(gang, epochs=4)
    gang.kill("worker", 2)
    gang.let_on_to(float("inf"))
    assert [gang.wait_exit("worker", i) for i in range(2)] == [0, 0]
    gang.start("worker", 2, command, restart=1)
    assert gang.wait_exit("worker", 2) == 0, gang.logs()


@pytest.mark.e2e
def test_a_stopped_member_is_not_dead_at_the_first_missed_signal(gang: Gang) -> None:
    """It is only stopped: the others wait for it, nobody forms a smaller group, and all go on together."""
    start(gang, 6, "--timeout-s", "2")
    stopped = gang.kill("worker", 1, signal.SIGSTOP)
    gang.let_on_to(float("inf"))
    gang.wait_report(lambda r: "do not answer" in r.body.get("message", ""), since_s=stopped)
    gang.kill("worker", 1, signal.SIGCONT)
    assert [gang.wait_exit("worker", i) for i in range(3)] == [0, 0, 0], gang.logs()
    assert not [r for r in gang.reports if r.body.get("world", 3) < 3]
    assert "6 of 6 epochs exact" in gang.log("worker", 0)
