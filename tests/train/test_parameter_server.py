"""The parameter server: one server's answers, and a real job whose members are killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jobsched.train.checkpoint import Fenced, committed
from jobsched.train.context import context
from jobsched.train.data import Plan
from jobsched.train.parameter_server import ENDED, ParameterServer
from jobsched.train.shards import shard_name
from tests.train.gang import Gang

SCRIPT = "jobs/digits_ps/train.py"


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def a_server(gang: Gang, monkeypatch: pytest.MonkeyPatch, restart: int = 0, **options: Any) -> ParameterServer:
    """Server 0 of 1, not serving: its answers are asked for directly."""
    monkeypatch.setattr(context, "_env", gang.env("ps", 0, restart))
    return ParameterServer(a_model(), lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), **options)


def ask(server: ParameterServer, op: str, n: int, worker: str = "a", restart: int = 0, gradient: float = 1.0,
        **more: Any) -> tuple[Any, Any]:
    request = {"token": "job:", "layout": server._digest, "worker": worker, "restart": restart, "op": op, "n": n}
    request |= more
    frames = [np.full(8, gradient, np.float32).tobytes(), np.arange(2).tobytes()]
    return server._answer(request, frames, b"id")


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[Gang]:
    made = Gang(tmp_path, {"ps": 1, "worker": 2})
    yield made
    made.close()


def test_a_push_is_applied_once_however_often_it_is_sent(lone: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    server = a_server(lone, monkeypatch)
    before = ask(server, "pull", 1)[1].copy()
    for _ in range(3):
        answer, values = ask(server, "step", 2)
        assert answer == {"n": 2, "applied": True, "workers": 1}
    np.testing.assert_allclose(values, before - 1)
    assert server.updates == 1


def test_strangers_and_stale_workers_are_refused(lone: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    server = a_server(lone, monkeypatch)
    ask(server, "step", 1, restart=2)
    assert "stale" in ask(server, "step", 9, restart=1)[0]["error"]
    assert "another job" in ask(server, "pull", 1, token="x")[0]["error"]
    assert "differs" in ask(server, "pull", 1, layout="x")[0]["error"]
    assert ask(server, "step", 1, restart=3)[0]["applied"]
    assert server.updates == 2


def test_a_started_again_server_goes_on_from_its_checkpoint(lone: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    server = a_server(lone, monkeypatch)
    ask(server, "step", 1)
    ask(server, "step", 2)
    server._save_now()
    twin = a_server(lone, monkeypatch, restart=1)
    assert twin.updates == 2
    assert ask(twin, "step", 2)[0]["applied"]  # its answer was lost: not applied again
    assert twin.updates == 2
    expected = ask(server, "step", 3)[1].copy()
    np.testing.assert_array_equal(ask(twin, "step", 3)[1], expected)  # momentum was restored too
    with pytest.raises(Fenced):
        server._save_now()


def test_a_worker_too_far_ahead_waits_until_the_slowest_has_caught_up_or_left(
        lone: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    server = a_server(lone, monkeypatch, max_staleness=1)
    sent: list[list[Any]] = []
    socket = type("Socket", (), {"send_multipart": lambda _, frames: sent.append(frames)})()
    ask(server, "pull", 1, worker="slow")
    assert ask(server, "step", 1)[0]["applied"]
    assert ask(server, "step", 2) == (None, None)
    server._unpark(socket)
    assert not sent
    ask(server, "step", 2, worker="slow")
    server._unpark(socket)
    assert json.loads(sent[0][1]) == {"n": 2, "applied": True, "workers": 2}
    assert ask(server, "step", 3) == (None, None)
    ask(server, "bye", 3, worker="slow")
    server._unpark(socket)
    assert len(sent) == 2
    assert ask(server, "step", 1, worker="late")[0]["applied"]  # a newcomer starts at the others' clock
    assert server._workers["late"].clock == 4


def test_a_batch_is_counted_with_its_push_and_passes_on_when_its_worker_starts_anew(
        lone: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    server = a_server(lone, monkeypatch, plan=Plan(2, 2, 2))
    assert ask(server, "lease", 1)[0]["lease"] == 0
    assert ask(server, "lease", 1, worker="b")[0]["lease"] == 1
    assert ask(server, "lease", 2, worker="b", restart=1)[0]["lease"] == 1
    assert ask(server, "step", 2, done=0)[0]["applied"]
    assert not ask(server, "step", 3, done=1)[0]["applied"]  # it is b's
    assert server.updates == 1
    assert ask(server, "step", 3, worker="b", restart=1, done=1)[0]["applied"]
    answer = ask(server, "lease", 4)[0]
    assert (answer["finished"], answer["epochs"], answer["exact"]) == (True, 2, 2)


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    made = Gang(tmp_path, {"ps": 2, "worker": 3})
    yield made
    made.close()


@pytest.mark.e2e
def test_a_worker_and_both_servers_are_killed_and_training_goes_on(gang: Gang) -> None:
    command = [SCRIPT, "--epochs", "6", "--pause-ms", "0", "--accuracy", "0.8", "--checkpoint-s", "0.3"]
    gang.let_on_to(60)
    for role, count in (("ps", 2), ("worker", 3)):
        for index in range(count):
            gang.start(role, index, command)
    gang.wait_report(lambda r: r.body.get("step", 0) >= 60)
    gang.kill("worker", 1)
    gang.start("worker", 1, command, restart=1)
    gang.wait_report(lambda r: r.key.endswith("worker/1/1") and r.body.get("step", 0) >= 60)
    for server in (0, 1):
        gang.told("ps", server, "saved")
        killed = gang.kill("ps", server)
        gang.let_on_to(gang.gate + 60)
        waiting = gang.wait_report(lambda r, s=server: f"waits for ps {s}" in r.body.get("message", ""),
                                   since_s=killed)
        gang.start("ps", server, command, restart=1)
        gang.wait_report(lambda r: "worker" in r.key and r.body.get("step", 0) >= gang.gate, since_s=waiting.at_s)
    gang.let_on_to(float("inf"))
    assert [gang.wait_exit("worker", i) for i in range(3)] == [0, 0, 0], gang.logs()
    for index in range(3):
        assert "6 of 6 epochs exact" in gang.log("worker", index)
    for server in (0, 1):
        assert gang.running["ps", server].exitcode is None  # servers never decide
        ended = gang.kill("ps", server, signal.SIGTERM)
        assert gang.wait_exit("ps", server) == 0
        gang.wait_report(lambda r, s=server: r.key.endswith(f"/ps/{s}/1") and "saved" in r.body, since_s=ended)


@pytest.mark.e2e
def test_a_server_that_moved_is_found(gang: Gang) -> None:
    command = [SCRIPT, "--epochs", "3", "--pause-ms", "0", "--accuracy", "0.5", "--checkpoint-s", "0.3"]
    gang.let_on_to(60)
    for server in range(2):
        gang.start("ps", server, command)
    gang.start("worker", 0, command)
    gang.wait_report(lambda r: r.body.get("step", 0) >= 60)
    gang.kill("ps", 1)
    gang.let_on_to(float("inf"))
    gang.peers = {**gang.peers, "ps": (gang.peers["ps"][0], gang.peers["worker"][2])}
    gang.start("ps", 1, command, restart=1)
    assert gang.wait_exit("worker", 0) == 0, gang.logs()


@pytest.mark.e2e
def test_training_goes_on_with_other_numbers_of_servers(tmp_path: Path) -> None:
    """An orderly end (as of a rescale), then the next attempt: every push is in all shards, no batch is lost or done
    twice, and the new workers find the new servers."""
    command = [SCRIPT, "--epochs", "9", "--pause-ms", "0", "--accuracy", "0.8", "--checkpoint-s", "60"]
    done = 0
    for attempt, servers in enumerate((1, 3, 2), 1):
        gang = Gang(tmp_path, {"ps": servers, "worker": 2}, attempt=attempt)
        try:
            gang.let_on_to(done + 200 if attempt < 3 else float("inf"))
            for role, count in gang.sizes.items():
                for index in range(count):
                    gang.start(role, index, command)
            if attempt < 3:
                for index in range(2):
                    gang.wait_report(lambda r, i=index, g=gang: r.key.endswith(f"/worker/{i}/0")
                                     and r.body.get("step", 0) >= g.gate)
                told = gang.wait_report(lambda r: "step_s" in r.body["metrics"]).body["metrics"]
                assert told["step_s"] > told["sync_s"] > 0
                for role, index in [*gang.running]:
                    gang.kill(role, index, signal.SIGTERM)
                gang.let_on_to(float("inf"))
                assert [gang.wait_exit("worker", i) for i in range(2)] == [ENDED] * 2, gang.logs()
                assert [gang.wait_exit("ps", i) for i in range(servers)] == [0] * servers, gang.logs()
                shards = [committed(tmp_path / "ckpt", shard_name(i, servers))[0] for i in range(servers)]
                assert len({saved.step for saved in shards}) == 1
                lines = (tmp_path / "ckpt" / "ps-leases.jsonl").read_text().splitlines()
                done = sum('"done"' in text for text in lines)
                assert shards[0].step == done
            else:
                assert [gang.wait_exit("worker", i) for i in range(2)] == [0, 0], gang.logs()
                assert "9 of 9 epochs exact" in gang.log("worker", 0)
        finally:
            gang.close()
            (tmp_path / "report.sock").unlink()
