"""Which samples a replica works on, such that each is used exactly once an epoch however replicas come and go.

Two ways, for the two kinds of job. `Plan` is for synchronous training: the position in a seeded permutation is part of
the replicated state, and each rank takes its part of the batch at that position. `Ledger` is for asynchronous workers:
parameter server 0 leases batches, takes them back when a worker dies, and counts a batch as used in the same breath as
it applies the gradient; its journal survives a kill. Pure but for that journal; numpy only.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """`epochs` passes over `size` samples in batches of `batch`, each epoch in its own order drawn from `seed`.

    The last batch of an epoch may be short; nothing is padded, dropped or repeated.
    """

    size: int
    batch: int
    epochs: int
    seed: int = 0

    @property
    def per_epoch(self) -> int:
        """Batches of one epoch."""
        return -(-self.size // self.batch)

    @property
    def total(self) -> int:
        """Batches of all epochs."""
        return self.per_epoch * self.epochs

    def indices(self, position: int) -> Indices:
        """Samples of batch number `position` (0 … total - 1)."""
        epoch, number = divmod(position, self.per_epoch)
        return _order(self.size, self.seed, epoch)[number * self.batch:(number + 1) * self.batch]

    def share(self, position: int, rank: int, world: int, batches: int = 1) -> Indices:
        """One rank's part of that batch, or of so many from there on, taken as one; the parts of all ranks make up the
        whole, and some may be empty."""
        whole = np.concatenate([self.indices(position + i) for i in range(batches)])
        return np.array_split(whole, world)[rank]


@lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng((seed, epoch)).permutation(size)


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """The right and duty of one worker to work on one batch."""

    position: int
    epoch: int
    indices: Indices
    """The samples to load."""


@dataclass(slots=True)
class _Held:
    worker: str
    until_s: float


@dataclass(slots=True)
class Ledger:
    """Who works on which batch of a `Plan`, and how often each sample was really used.

    Times are seconds on the caller's monotonic clock. A lease ends when its batch is done, when the worker shows up
    again as a new incarnation (`release`), or `lease_s` after the worker was last heard (`renew`).
    """

    plan: Plan
    journal: Path | None = None
    lease_s: float = 10.0
    done: set[int] = field(default_factory=set)
    used: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    """Epoch -> how often each sample was loaded for an applied step; dropped when the epoch is complete."""
    exact_epochs: int = 0
    """Complete epochs in which every sample was used exactly once."""
    complete_epochs: int = 0
    _held: dict[int, _Held] = field(default_factory=dict)
    _left: dict[int, int] = field(default_factory=dict)
    _next: int = 0
    _returned: list[int] = field(default_factory=list)
    _file: int = -1

    def __post_init__(self) -> None:
        """Read the journal, if there is one, and go on writing it; a journal of another plan is set aside."""
        if self.journal is None:
            return
        head = {"size": self.plan.size, "batch": self.plan.batch, "epochs": self.plan.epochs, "seed": self.plan.seed}
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        if lines and _parse(lines[0]) != head:
            self.journal.replace(self.journal.with_suffix(".old"))
            lines = []
        for line in lines[1:]:
            entry = _parse(line)
            if "done" in entry:  # a line cut short by a kill holds nothing: that batch is leased anew
                self._count(int(entry["done"]), np.asarray(entry["used"], np.int64))
        self._file = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self._file, b"\n" if lines else json.dumps(head).encode() + b"\n")

    @property
    def finished(self) -> bool:
        return len(self.done) == self.plan.total

    def lease(self, worker: str, now_s: float) -> int | None:
        """Position of the next batch for this worker, or the one it holds already, so that asking twice is harmless.

        None while all that is left is in other hands (or nothing is left).
        """
        for expired in [p for p, held in self._held.items() if held.until_s <= now_s]:
            self._return(expired)
        mine = next((p for p, held in self._held.items() if held.worker == worker), None)
        position = self._take() if mine is None else mine
        if position is not None:
            self._held[position] = _Held(worker, now_s + self.lease_s)
        return position

    def holds(self, worker: str, position: int) -> bool:
        """Whether a step on this batch by this worker may be applied: it is not done and not leased to another."""
        held = self._held.get(position)
        return position not in self.done and (held is None or held.worker == worker)

    def finish(self, position: int, used: Indices) -> None:
        """The step on this batch was applied; `used` are the samples that the worker says it loaded."""
        if self._file >= 0:
            os.write(self._file, json.dumps({"done": position, "used": used.tolist()}).encode() + b"\n")
        self._held.pop(position, None)
        self._count(position, used)

    def renew(self, worker: str, now_s: float) -> None:
        for held in self._held.values():
            if held.worker == worker:
                held.until_s = now_s + self.lease_s

    def release(self, worker: str) -> None:
        """Take back what this worker holds: it left, or started anew."""
        for position in [p for p, held in self._held.items() if held.worker == worker]:
            self._return(position)

    def _take(self) -> int | None:
        while self._returned:
            if (position := self._returned.pop()) not in self.done:
                return position
        while self._next < self.plan.total:
            self._next += 1
            if self._next - 1 not in self.done:
                return self._next - 1
        return None

    def _return(self, position: int) -> None:
        del self._held[position]
        self._returned.append(position)

    def _count(self, position: int, used: Indices) -> None:
        assert position not in self.done, f"batch {position} was applied twice"
        self.done.add(position)
        epoch = position // self.plan.per_epoch
        counts = self.used.setdefault(epoch, np.zeros(self.plan.size, np.int32))
        np.add.at(counts, used, 1)
        self._left[epoch] = self._left.get(epoch, self.plan.per_epoch) - 1
        if self._left[epoch] == 0:
            self.complete_epochs += 1
            self.exact_epochs += bool((counts == 1).all())
            del self.used[epoch]


def _parse(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
