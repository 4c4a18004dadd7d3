"""How far simulated jobs are and how fast they go: the physics that a trace describes. Used by `sim.run` only.

A `Work` is what a trace says about one job and never changes; `begin()` makes its `Course`, the mutable state of one
simulated run. Times are milliseconds as floats (callers round), amounts of work are milliseconds at speed 1.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

Seats = tuple[tuple[str, int], ...]
"""Where a gang sits: (GPU kind, GPUs in thousandths) per node, in order of its replicas' binding."""


class Course(Protocol):
    """How far one job is."""

    def left_ms(self, seats: Seats) -> float:
        """Time to the end from here, without pauses, while it sits there."""
        ...

    def advance(self, seats: Seats, ran_ms: float) -> None:
        """It ran there for so long."""
        ...


class Work(Protocol):
    """What a trace says about one job."""

    @property
    def start_ms(self) -> int:
        """Time without progress after each start."""
        ...

    def begin(self) -> Course: ...


def full_speed(seats: Seats) -> float:
    return 1.0


@dataclass(frozen=True, slots=True)
class Steady:
    """A fixed amount of work at a speed that depends on the seats alone."""

    work_ms: float
    start_ms: int = 0
    speed: Callable[[Seats], float] = full_speed

    def begin(self) -> Course:
        return _SteadyCourse(self, self.work_ms)


@dataclass(slots=True)
class _SteadyCourse:
    work: Steady
    left: float

    def left_ms(self, seats: Seats) -> float:
        return self.left / self.work.speed(seats)

    def advance(self, seats: Seats, ran_ms: float) -> None:
        self.left = max(0.0, self.left - ran_ms * self.work.speed(seats))


@dataclass(frozen=True, slots=True)
class Profile:
    """One application's measured scaling and statistical efficiency, as Pollux (OSDI'21) profiled it.

    `by_placement`: GPUs per node as digits, smallest rotation -> sorted (batch per GPU, seconds a step, seconds of it
    in synchronisation); `by_size`: (nodes, GPUs) -> the same, for larger gangs. `epochs`: validated batch size -> one
    (progress at its end, gradient square, gradient variance) an epoch.
    """

    name: str
    by_placement: dict[str, tuple[tuple[float, float, float], ...]]
    by_size: dict[tuple[int, int], tuple[tuple[float, float, float], ...]]
    epochs: dict[int, tuple[tuple[float, float, float], ...]]
    max_epochs: int
    max_local_batch: int

    @property
    def init_batch(self) -> int:
        return min(self.epochs)

    @property
    def max_batch(self) -> int:
        return max(self.epochs)

    def progress_at(self, epoch: int) -> float:
        """Progress at the end of the epoch before `epoch`; the least of all batch sizes."""
        return min(rows[epoch - 1][0] for rows in self.epochs.values()) if epoch else 0.0

    def step_s(self, gpus_per_node: Sequence[int], local_batch: float) -> tuple[float, float]:
        """(seconds a step, seconds of it in synchronisation)."""
        turns = [tuple(gpus_per_node[i:]) + tuple(gpus_per_node[:i]) for i in range(len(gpus_per_node))]
        points = self.by_placement.get("".join(map(str, min(turns))))
        if points is None:
            nodes, gpus = len(gpus_per_node), sum(gpus_per_node)
            nearest = min(self.by_size, key=lambda size: (abs(size[1] - gpus), abs(size[0] - nodes), size))
            points = self.by_size[nearest]
        return _interpolate(points, local_batch)

    def gain(self, batch: int, epoch: int) -> float:
        """Progress of a step at this batch size relative to the initial one: statistical efficiency times scale."""
        low = max(size for size in self.epochs if size <= batch)
        high = min(size for size in self.epochs if size >= batch)
        square, variance = self.epochs[low][epoch][1:]
        if high != low:
            part = (batch - low) / (high - low)
            square += part * (self.epochs[high][epoch][1] - square)
            variance += part * (self.epochs[high][epoch][2] - variance)
        return (variance + square) / (variance * self.init_batch / batch + square)

    def batches(self, gpus: int, batch: int) -> tuple[int, int]:
        """(batch per GPU and step, extra steps that only accumulate gradients) for a total batch on so many GPUs."""
        local = ceil(batch / gpus - 1e-8)
        extra = ceil(local / self.max_local_batch - 1e-8) - 1
        if gpus == 1 and batch > self.init_batch:
            extra = max(1, extra)
        return min(ceil(local / (extra + 1) - 1e-8), self.max_batch // (gpus * (extra + 1))), extra


def _interpolate(points: Sequence[tuple[float, float, float]], at: float) -> tuple[float, float]:
    """Linear between the neighbours; the end values outside."""
    place = bisect_left(points, at, key=lambda point: point[0])
    if place < len(points) and points[place][0] == at:
        return points[place][1:]
    low, high = points[max(0, place - 1)], points[min(place, len(points) - 1)]
    part = (at - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
    return low[1] + part * (high[1] - low[1]), low[2] + part * (high[2] - low[2])


@dataclass(frozen=True, slots=True)
class Profiled:
    """Training to the end of a profile's epochs at a fixed total batch size (the tuned request of Pollux's traces)."""

    profile: Profile
    batch: int
    start_ms: int = 30_000

    def begin(self) -> Course:
        return _ProfiledCourse(self)

    def epoch_rate(self, seats: Seats, epoch: int) -> float:
        """Progress per second in this epoch."""
        return _epoch_rate(self.profile.name, self, tuple(milli // 1_000 for _, milli in seats), epoch)


_RATES: dict[tuple[str, int, tuple[int, ...], int], float] = {}


def _epoch_rate(name: str, work: Profiled, gpus_per_node: tuple[int, ...], epoch: int) -> float:
    key = (name, work.batch, gpus_per_node, epoch)
    if key not in _RATES:
        profile, gpus = work.profile, sum(gpus_per_node)
        local, extra = profile.batches(gpus, work.batch)
        step_s, sync_s = profile.step_s(gpus_per_node, local)
        _RATES[key] = profile.gain(gpus * local * (extra + 1), epoch) / (step_s + extra * (step_s - sync_s))
    return _RATES[key]


@dataclass(slots=True)
class _ProfiledCourse:
    """Whole seconds at epoch ends, as in Pollux's simulator."""

    work: Profiled
    epoch: int = 0
    progress: float = 0.0

    def left_ms(self, seats: Seats) -> float:
        profile, progress, left_s = self.work.profile, self.progress, 0
        for epoch in range(self.epoch, profile.max_epochs):
            target = profile.progress_at(epoch + 1)
            left_s += round((target - progress) / self.work.epoch_rate(seats, epoch))
            progress = target
        return 1_000.0 * left_s

    def advance(self, seats: Seats, ran_ms: float) -> None:
        left_s = ran_ms / 1_000
        while left_s > 0 and self.epoch < self.work.profile.max_epochs:
            rate = self.work.epoch_rate(seats, self.epoch)
            target = self.work.profile.progress_at(self.epoch + 1)
            if self.progress + rate * left_s < target:
                self.progress += rate * left_s
                return
            left_s -= round((target - self.progress) / rate)
            self.progress, self.epoch = target, self.epoch + 1
