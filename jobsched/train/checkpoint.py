"""Checkpoints that a crash, a flipped bit or a stale replica cannot spoil.

Used by training scripts, `parameter_server` and `ddp`. A checkpoint is a data file and a manifest with its size and
sha256; the manifest's rename is the commit. Files are written aside, synced, then renamed; the directory is synced too.

Order: every writer holds an order `(attempt, number)`, and a `fence` file in the directory remembers the highest one
seen. A writer with a lower order is refused at the moment of commit (under a file lock), so a replica that outlived its
attempt can neither overwrite nor outrank what its successor wrote. Never deletes a checkpoint of a newer order.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobsched.train.context import context

CHUNK_BYTES = 1 << 20


class Fenced(RuntimeError):
    """A newer attempt or restart has taken over this checkpoint; whoever gets this should end."""


@dataclass(frozen=True, slots=True, order=True)
class Saved:
    """One committed checkpoint; sorts by age: a newer order outranks any step of an older one."""

    attempt: int
    number: int
    step: int
    path: Path
    sha256: str
    size: int


class Checkpointer:
    """Reads and writes the checkpoints called `name` in a directory.

    One per writer: give every shard or rank that saves on its own another `name`. The order is this replica's
    (attempt, restart); where writers take turns (`shared`, rank 0 of an elastic group), each calls `take_over` first.
    """

    def __init__(self, directory: str | os.PathLike[str] = "", *, name: str = "model", keep: int = 3,
                 shared: bool = False, order: tuple[int, int] | None = None) -> None:
        """`directory` defaults to the job's checkpoint directory, or one under `checkpoints`. The newest `keep`
        checkpoints stay. Raises `Fenced` if the directory already belongs to a newer order."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name):
            raise ValueError(f"{name!r} cannot name a checkpoint; use letters, digits, '.', '_' and '-'")
        self.directory = Path(directory or context.checkpoint_dir or f"checkpoints/{context.env.job_id}")
        self.name = name
        self.keep = max(1, keep)
        self.order = order or (context.attempt, context.restart)
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._fence() as newest:
            if shared:
                self.order = (self.order[0], newest[1] if newest[0] == self.order[0] else 0)
            self._raise_fence(newest)

    def take_over(self) -> None:
        """Become the only writer within this attempt: whoever wrote before is refused from now on."""
        with self._fence() as (attempt, number):
            if attempt > self.order[0]:
                raise Fenced(f"{self.name}: attempt {attempt} has taken over from attempt {self.order[0]}")
            self.order = (self.order[0], number + 1 if attempt == self.order[0] else 0)
            self._raise_fence((attempt, number))

    def save(self, state: Any, step: int) -> Path:
        """Write `state` (bytes, or anything torch.save takes) as the checkpoint of `step`; returns its path once it is
        durable. Raises `Fenced` if a newer order took over meanwhile, OSError if the disk refuses."""
        attempt, number = self.order
        path = self.directory / f"{self.name}-{attempt:06d}-{number:06d}-{step:012d}.ckpt"
        data = bytes(state) if isinstance(state, (bytes, bytearray, memoryview)) else _dump(state)
        manifest = {
            "v": 1, "attempt": attempt, "number": number, "step": step, "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(), "raw": isinstance(state, (bytes, bytearray, memoryview)),
        }
        part = path.with_suffix(".part")
        _write(part, data)
        with self._fence() as newest:
            try:
                self._raise_fence(newest)
            except Fenced:
                part.unlink(missing_ok=True)
                raise
            _manifest_of(path).unlink(missing_ok=True)  # the same step again: never old manifest with new data
            part.replace(path)
            _write(_manifest_of(path).with_suffix(".part"), json.dumps(manifest).encode())
            _manifest_of(path).with_suffix(".part").replace(_manifest_of(path))
            _sync_directory(self.directory)
            self._drop_old()
        return path

    def note(self, kind: str, text: str) -> None:
        """Write a small text beside the checkpoints (`NAME.kind`), fenced like them: the newest order's stays."""
        with self._fence() as newest:
            self._raise_fence(newest)
            part = self.directory / f"{self.name}.{kind}.part"
            _write(part, text.encode())
            part.replace(part.with_suffix(""))

    def load(self, *, map_location: Any = "cpu") -> tuple[Any, int] | None:
        """(state, step) of the newest whole checkpoint; damaged ones are passed over. None if there is none."""
        for saved in self.list():
            try:
                return read(saved, map_location=map_location), saved.step
            except (OSError, ValueError):
                continue
        return None

    def list(self) -> list[Saved]:
        """Committed checkpoints, newest first, without reading their data."""
        return committed(self.directory, self.name)

    def _drop_old(self) -> None:
        """Remove what is neither among the newest `keep` nor of a newer order, half-written files included."""
        kept = {saved.path.stem for saved in self.list()[:self.keep]}
        for file in self.directory.glob(f"{self.name}-*"):
            parts = re.fullmatch(rf"{re.escape(self.name)}-(\d+)-(\d+)-\d+", file.stem)
            if parts and (int(parts[1]), int(parts[2])) <= self.order and file.stem not in kept:
                file.unlink(missing_ok=True)

    @contextmanager
    def _fence(self) -> Iterator[tuple[int, int]]:
        """Hold the lock and yield the highest order that ever wrote or opened this checkpoint."""
        with open(self.directory / f"{self.name}.fence", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            attempt, _, number = file.read().partition(" ")
            yield (int(attempt), int(number)) if number.strip().isdigit() else (-1, -1)

    def _raise_fence(self, newest: tuple[int, int]) -> None:
        """Claim our order under the lock; `Fenced` if a newer one is there."""
        if newest > self.order:
            raise Fenced(f"{self.name}: attempt {newest[0]} restart {newest[1]} has taken over from attempt "
                         f"{self.order[0]} restart {self.order[1]}")
        if newest < self.order:
            with open(self.directory / f"{self.name}.fence", "r+") as file:
                file.write(f"{self.order[0]:012d} {self.order[1]:012d}\n")  # fixed width: rewritten in place
                file.flush()
                os.fsync(file.fileno())


def committed(directory: Path, name: str) -> list[Saved]:
    """Committed checkpoints called `name`, newest first, without reading their data. Claims nothing: all may ask."""
    found = []
    for file in directory.glob(f"{name}-*.json"):
        if not re.fullmatch(rf"{re.escape(name)}-\d+-\d+-\d+\.json", file.name):
            continue  # another checkpoint whose name begins like this one's
        try:
            m = json.loads(file.read_text())
            found.append(Saved(int(m["attempt"]), int(m["number"]), int(m["step"]), file.with_suffix(".ckpt"),
                               str(m["sha256"]), int(m["size"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged manifest is as good as none
    return sorted(found, reverse=True)


def read(saved: Saved, *, map_location: Any = "cpu") -> Any:
    """What `save` was given. ValueError if the file is damaged, OSError if it is gone."""
    data = saved.path.read_bytes()
    if len(data) != saved.size or hashlib.sha256(data).hexdigest() != saved.sha256:
        raise ValueError(f"{saved.path} is damaged")
    raw = json.loads(_manifest_of(saved.path).read_text()).get("raw", False)
    return data if raw else _parse(data, map_location)


def _manifest_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _dump(state: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _parse(data: bytes, map_location: Any) -> Any:
    import torch

    return torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        for start in range(0, len(data), CHUNK_BYTES):
            file.write(data[start:start + CHUNK_BYTES])
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
