"""Shards: a model is divided among any number of servers and divided anew without changing a bit of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jobsched.contract import ReplicaEnv
from jobsched.train.checkpoint import committed
from jobsched.train.context import context
from jobsched.train.parameter_server import ParameterServer
from jobsched.train.shards import digest_of, forget_others, layout_of, overlaps, recover, shard_name

SIZES = (3_000, 7, 5_000)


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=12), st.integers(1, 5))
def test_every_element_is_on_exactly_one_server_and_loads_are_even(sizes: list[int], servers: int) -> None:
    layout = layout_of(sizes, servers)
    held = [np.zeros(size, int) for size in sizes]
    for shard in layout:
        for piece in shard:
            held[piece.tensor][piece.start:piece.start + piece.length] += 1
    assert all((counts == 1).all() for counts in held)
    loads = [sum(p.length for p in shard) for shard in layout]
    assert max(loads) - min(loads) <= max(1_024, -(-sum(sizes) // (servers * 8)))
    assert digest_of(layout_of(sizes, servers)) == digest_of(layout)
    assert digest_of(layout_of([*sizes, 1], servers)) != digest_of(layout)


@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 5))
def test_what_two_shards_share_is_found_whole_and_in_place(sizes: list[int], before: int, after: int) -> None:
    starts = np.cumsum([0, *sizes])

    def numbers(shard: tuple) -> np.ndarray:  # type: ignore[type-arg]
        """Each element's number in the whole model, in the order of the shard's flat array."""
        return np.concatenate([[], *(starts[s.tensor] + s.start + np.arange(s.length) for s in shard)])

    for mine in layout_of(sizes, after):
        found = np.full(sum(s.length for s in mine), -1.0)
        for theirs in layout_of(sizes, before):
            flat = numbers(theirs)
            for at, there, length in overlaps(mine, theirs):
                assert (found[at:at + length] == -1).all()
                found[at:at + length] = flat[there:there + length]
        np.testing.assert_array_equal(found, numbers(mine))


def a_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    for i, size in enumerate(SIZES):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(size)))
    return model


class Attempt:
    """All servers of one attempt, not serving: pushes are applied directly."""

    def __init__(self, directory: Path, attempt: int, servers: int, optimizer: Callable[..., torch.optim.Optimizer],
                 monkeypatch: pytest.MonkeyPatch) -> None:
        peers = {"ps": tuple(f"127.0.0.1:{2_000 + i}" for i in range(servers))}
        self.layout, self.servers = layout_of(SIZES, servers), []
        self.monkeypatch = monkeypatch
        self.envs = [ReplicaEnv("job", "job", attempt, "ps", i, peers=peers, checkpoint_dir=str(directory))
                     for i in range(servers)]
        for env in self.envs:
            monkeypatch.setattr(context, "_env", env)
            self.servers.append(ParameterServer(a_model(), optimizer))

    def push(self, seed: int, only: int | None = None) -> None:
        """The same gradient of the whole model, whatever the number of servers."""
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(size, generator=generator) for size in SIZES]
        for i, server in enumerate(self.servers):
            if only in (None, i):
                flat = torch.cat([gradients[s.tensor][s.start:s.start + s.length] for s in self.layout[i]])
                request = {"n": server.updates + 1}
                assert server._apply("worker-0", request, [flat.numpy().tobytes()])

    def save(self, *only: int) -> None:
        for i, (env, server) in enumerate(zip(self.envs, self.servers, strict=True)):
            if not only or i in only:
                self.monkeypatch.setattr(context, "_env", env)
                server._save_now()

    def model(self) -> list[np.ndarray]:  # type: ignore[type-arg]
        tensors = [torch.zeros(size) for size in SIZES]
        for server, shard in zip(self.servers, self.layout, strict=True):
            at = 0
            for s in shard:
                tensors[s.tensor][s.start:s.start + s.length] = torch.from_numpy(server._values[at:at + s.length])
                at += s.length
        return [tensor.numpy() for tensor in tensors]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_training_with_1_3_2_servers_is_bit_for_bit_training_with_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    """Momentum, Adam's averages and Adam's count of steps go along."""
    alone = Attempt(tmp_path / "alone", 1, 1, optimizer, monkeypatch)
    for seed in range(9):
        alone.push(seed)
    for attempt, servers in enumerate((1, 3, 2), 1):
        many = Attempt(tmp_path / "many", attempt, servers, optimizer, monkeypatch)
        assert all(server.updates == 3 * (attempt - 1) for server in many.servers)
        for seed in range(3 * (attempt - 1), 3 * attempt):
            many.push(seed)
        many.save()
    for ours, theirs in zip(many.model(), alone.model(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_each_value_comes_from_the_newest_checkpoint_that_holds_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempt 3 has two servers again, and one of them dies before it saves: what attempt 1 saved is older than what
    attempt 2 did."""
    first = Attempt(tmp_path, 1, 2, sgd, monkeypatch)
    first.push(1)
    first.save()
    second = Attempt(tmp_path, 2, 3, sgd, monkeypatch)
    second.push(2)
    second.save(0, 1, 2)
    kept = second.model()
    third = Attempt(tmp_path, 3, 2, sgd, monkeypatch)
    third.push(3)
    third.save(0)
    fourth = Attempt(tmp_path, 4, 2, sgd, monkeypatch)
    np.testing.assert_array_equal(fourth.servers[0]._values, third.servers[0]._values)
    of_second = np.concatenate([kept[s.tensor][s.start:s.start + s.length] for s in fourth.layout[1]])
    np.testing.assert_array_equal(fourth.servers[1]._values, of_second)


def test_a_damaged_shard_is_made_good_by_an_older_one_and_what_is_nowhere_is_said(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = Attempt(tmp_path, 1, 2, sgd, monkeypatch)
    first.push(1)
    first.save()
    first.push(2)
    first.save()
    newest = committed(tmp_path, "ps-1-of-2")[0]
    newest.path.write_bytes(b"x" * newest.size)
    one = Attempt(tmp_path, 2, 1, sgd, monkeypatch)
    assert one.servers[0].updates == 2
    assert capsys.readouterr().err == ""
    for saved in committed(tmp_path, "ps-1-of-2"):
        saved.path.unlink()
    Attempt(tmp_path, 2, 1, sgd, monkeypatch)
    lost = sum(s.length for s in first.layout[1])
    assert f"{lost:,} of 8,007 values begin anew" in capsys.readouterr().err


def test_shards_of_other_numbers_go_once_all_new_ones_are_saved(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Attempt(tmp_path, 1, 3, sgd, monkeypatch)
    first.push(1)
    first.save()
    second = Attempt(tmp_path, 2, 2, sgd, monkeypatch)
    second.push(2)
    second.save(0)
    assert committed(tmp_path, shard_name(2, 3))
    assert not forget_others(tmp_path, 2, 2)
    second.save(1)
    assert forget_others(tmp_path, 2, 2)
    assert not any(committed(tmp_path, shard_name(i, 3)) for i in range(3))
    found = recover(tmp_path, SIZES, 0, 1)
    assert found is not None
    assert found.known.all()


def test_another_model_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Attempt(tmp_path, 1, 1, sgd, monkeypatch).save()
    assert recover(tmp_path, (*SIZES, 5), 0, 2) is None
