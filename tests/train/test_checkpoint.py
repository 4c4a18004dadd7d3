"""Checkpoints against crashes, damage and stale writers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobsched.train.checkpoint import Checkpointer, Fenced


def a_writer(directory: Path, attempt: int = 1, restart: int = 0, **more: object) -> Checkpointer:
    return Checkpointer(directory, order=(attempt, restart), **more)


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    writer = a_writer(tmp_path)
    assert writer.load() is None
    writer.save({"w": torch.arange(3.0), "epoch": 2}, 10)
    state, step = writer.load()
    assert step == 10
    assert state["epoch"] == 2
    assert torch.equal(state["w"], torch.arange(3.0))


def test_bytes_come_back_as_bytes(tmp_path: Path) -> None:
    writer = a_writer(tmp_path)
    writer.save(b"anything", 1)
    assert writer.load() == (b"anything", 1)


def test_the_newest_are_kept_and_the_rest_removed(tmp_path: Path) -> None:
    writer = a_writer(tmp_path, keep=2)
    for step in range(5):
        writer.save(b"x", step)
    assert [saved.step for saved in writer.list()] == [4, 3]
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_manifest_missing(path: Path) -> None:
    path.with_suffix(".json").unlink()


def damage_manifest_text(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


def damage_data_missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_manifest_missing, damage_manifest_text,
                                    damage_data_missing])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: object) -> None:
    writer = a_writer(tmp_path)
    writer.save(b"good", 1)
    damage(writer.save(b"bad soon", 2))
    assert writer.load() == (b"good", 1)


def test_a_crash_before_the_commit_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = a_writer(tmp_path)
    writer.save(b"good", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            writer.save(b"half", 2)
    assert a_writer(tmp_path).load() == (b"good", 1)
    for step in (3, 4, 5):
        writer.save(b"x", step)
    assert not list(tmp_path.glob("*000002.*"))  # half-written files do not pile up


def test_an_older_attempt_can_neither_overwrite_nor_outrank(tmp_path: Path) -> None:
    stale = a_writer(tmp_path, attempt=1)
    stale.save(b"old", 100)
    fresh = a_writer(tmp_path, attempt=2)
    with pytest.raises(Fenced):
        stale.save(b"late", 200)
    with pytest.raises(Fenced):
        a_writer(tmp_path, attempt=1)
    assert fresh.load() == (b"old", 100)
    fresh.save(b"new", 50)  # it could not read step 100, say: what it writes is still the newer truth
    assert fresh.load() == (b"new", 50)
    assert not list(tmp_path.glob("*.part"))


def test_an_older_restart_of_the_same_replica_is_refused(tmp_path: Path) -> None:
    stale = a_writer(tmp_path, restart=0)
    a_writer(tmp_path, restart=1)
    with pytest.raises(Fenced):
        stale.save(b"late", 1)


def test_an_old_checkpoint_is_removed_but_never_a_newer_ones(tmp_path: Path) -> None:
    old = a_writer(tmp_path, attempt=1, keep=1)
    old.save(b"1", 1)
    new = a_writer(tmp_path, attempt=10, keep=1)
    new.save(b"2", 2)
    assert [saved.attempt for saved in new.list()] == [10]


def test_writers_that_take_turns(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, shared=True, order=(1, 0))
    first.take_over()
    first.save(b"first", 1)
    second = Checkpointer(tmp_path, shared=True, order=(1, 3))
    first.save(b"still first", 2)
    second.take_over()
    second.save(b"second", 2)
    with pytest.raises(Fenced):
        first.save(b"late", 3)
    assert second.load() == (b"second", 2)


def test_names_do_not_mix(tmp_path: Path) -> None:
    Checkpointer(tmp_path, name="ps-1").save(b"one", 1)
    assert Checkpointer(tmp_path, name="ps").load() is None
    assert Checkpointer(tmp_path, name="ps-1").load() == (b"one", 1)
    with pytest.raises(ValueError, match="cannot name"):
        Checkpointer(tmp_path, name="../x")


def test_a_note_of_a_stale_writer_is_refused(tmp_path: Path) -> None:
    stale = a_writer(tmp_path)
    a_writer(tmp_path, restart=1).note("address", "new:1")
    with pytest.raises(Fenced):
        stale.note("address", "old:1")
    assert (tmp_path / "model.address").read_text() == "new:1"
