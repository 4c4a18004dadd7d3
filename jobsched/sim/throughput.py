"""How far simulated jobs are and how fast they go: the physics that a trace describes. Used by `sim.run` only.

A `Work` is what a trace says about one job and never changes; `begin()` makes its `Course`, the mutable state of one
simulated run. Times are milliseconds as floats (callers round), amounts of work are milliseconds at speed 1.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf
from random import Random
from typing import Protocol

from jobsched.core.policies.goodput import Batches, Report, SpeedModel
from jobsched.core.resources import WHOLE_GPU

Seats = tuple[tuple[str, int], ...]
"""Where a gang sits: (GPU kind, GPUs in thousandths) per node, in order of its replicas' binding; then `SERVER` for
each of its parameter servers."""
SERVER = ("ps", 0)


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
    steps: int = 0
    """How many steps the work consists of; 0: it cannot tell how far it is."""

    def begin(self) -> Course:
        return SteadyCourse(self, self.work_ms)


@dataclass(slots=True)
class SteadyCourse:
    work: Steady
    left: float

    def left_ms(self, seats: Seats) -> float:
        return self.left / self.work.speed(seats)

    def advance(self, seats: Seats, ran_ms: float) -> None:
        self.left = max(0.0, self.left - ran_ms * self.work.speed(seats))

    def step(self, seats: Seats, ran_ms: float) -> int:
        """Steps made when it has run so long since it was last advanced."""
        left = max(0.0, self.left - ran_ms * self.work.speed(seats))
        return int(self.work.steps * (1 - left / self.work.work_ms))


@dataclass(frozen=True, slots=True)
class Served:
    """So many steps by asynchronous workers of like GPUs, whose time follows Optimus (EuroSys'18): computing, the
    servers' load, an exchange, and what each further worker and server adds. Reports are off by `noise`."""

    steps: int
    thetas: tuple[float, ...]
    """Seconds: computing, a server's load by one worker, an exchange, a worker, a server."""
    noise: float = 0.03
    seed: int = 0
    start_ms: int = 30_000
    worker_milli: int = WHOLE_GPU
    """GPUs of a worker, in thousandths."""

    def begin(self) -> ServedCourse:
        return ServedCourse(self, float(self.steps), Random(self.seed))

    def counted(self, seats: Seats) -> tuple[int, int]:
        """(workers, servers)."""
        workers = sum(milli for _, milli in seats) // self.worker_milli
        return workers, max(1, sum(seat == SERVER for seat in seats))

    def step_s(self, workers: int, servers: int) -> tuple[float, float]:
        """(seconds of a worker's step, seconds of it with the servers)."""
        compute_s, load_s, exchange_s, worker_s, server_s = self.thetas
        sync_s = load_s * workers / servers + exchange_s + worker_s * workers + server_s * servers
        return compute_s + sync_s, sync_s


@dataclass(slots=True)
class ServedCourse:
    work: Served
    left: float
    random: Random

    def left_ms(self, seats: Seats) -> float:
        return self.left / self._per_ms(seats)

    def advance(self, seats: Seats, ran_ms: float) -> None:
        self.left = max(0.0, self.left - ran_ms * self._per_ms(seats))

    def told(self, seats: Seats, ran_ms: float) -> tuple[int, int, tuple[tuple[str, float], ...]]:
        """(step, workers, what a worker reports) when it has run so long since it was last advanced."""
        workers, servers = self.work.counted(seats)
        step_s, sync_s = self.work.step_s(workers, servers)
        off = self.random.lognormvariate(0.0, self.work.noise)
        step = self.work.steps - self.left + ran_ms * self._per_ms(seats)
        return int(step), workers, (("asynchronous", 1.0), ("step_s", off * step_s), ("sync_s", off * sync_s))

    def _per_ms(self, seats: Seats) -> float:
        workers, servers = self.work.counted(seats)
        return workers / (1_000.0 * self.work.step_s(workers, servers)[0])


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
            return self._between_sizes(min(len(gpus_per_node), 16), sum(gpus_per_node), local_batch)
        return _interpolate(points, local_batch)

    def _between_sizes(self, nodes: int, gpus: int, local_batch: float) -> tuple[float, float]:
        """Linear between the measured numbers of nodes, with as many GPUs on either as there can be; then linear
        between the measured numbers of GPUs there."""
        measured = sorted({size[0] for size in self.by_size})
        few, many = max(n for n in measured if n <= nodes), min(n for n in measured if n >= nodes)
        part = (nodes - few) / (many - few) if many > few else 0.0
        on_few = float(min(max(gpus, few), 4 * few) if part else gpus)
        on_many = min(max((gpus - (1 - part) * on_few) / part, many), 4 * many) if part else gpus
        on_few = (gpus - part * on_many) / (1 - part)
        return _mix(self._at(few, on_few, local_batch), self._at(many, on_many, local_batch), few, many, nodes)

    def _at(self, nodes: int, gpus: float, local_batch: float) -> tuple[float, float]:
        sizes = sorted(size for size in self.by_size if size[0] == nodes)
        low = max((size for size in sizes if size[1] <= gpus), default=sizes[0])
        high = min((size for size in sizes if size[1] >= gpus), default=sizes[-1])
        points = [_interpolate(self.by_size[size], local_batch) for size in (low, high)]
        return _mix(points[0], points[1], low[1], high[1], gpus)

    def gain(self, batch: int, epoch: int) -> float:
        """Progress of a step at this batch size relative to the initial one: statistical efficiency times scale."""
        square, variance = self.noise(batch, epoch)
        return (variance + square) / (variance * self.init_batch / batch + square)

    def noise(self, batch: int, epoch: int) -> tuple[float, float]:
        """Square of the gradient's norm and its variance at the initial batch, while training at this one."""
        low = max(size for size in self.epochs if size <= batch)
        high = min(size for size in self.epochs if size >= batch)
        square, variance = self.epochs[low][epoch][1:]
        if high != low:
            part = (batch - low) / (high - low)
            square += part * (self.epochs[high][epoch][1] - square)
            variance += part * (self.epochs[high][epoch][2] - variance)
        return square, variance

    def batches(self, gpus: int, batch: int) -> tuple[int, int]:
        """(batch per GPU and step, extra steps that only accumulate gradients) for a total batch on so many GPUs."""
        local = ceil(batch / gpus - 1e-8)
        extra = ceil(local / self.max_local_batch - 1e-8) - 1
        if gpus == 1 and batch > self.init_batch:
            extra = max(1, extra)
        return min(ceil(local / (extra + 1) - 1e-8), self.max_batch // (gpus * (extra + 1))), extra


def _mix(
    low: tuple[float, float], high: tuple[float, float], low_at: float, high_at: float, at: float
) -> tuple[float, float]:
    part = (at - low_at) / (high_at - low_at) if high_at > low_at else 0.0
    return low[0] + part * (high[0] - low[0]), low[1] + part * (high[1] - low[1])


def _interpolate(points: Sequence[tuple[float, float, float]], at: float) -> tuple[float, float]:
    """Linear between the neighbours; the end values outside."""
    place = bisect_left(points, at, key=lambda point: point[0])
    if place < len(points) and points[place][0] == at:
        return points[place][1:]
    low, high = points[max(0, place - 1)], points[min(place, len(points) - 1)]
    return _mix(low[1:], high[1:], low[0], high[0], at)


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


LOOK_MS = 60_000
"""How far ahead the end of an elastic job is looked for: its speed depends on what it learns until then."""


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Training to the end of a profile's epochs by a job that adapts its batch to its GPUs as Pollux's agent does: it
    fits its own speed model to what it has measured and takes the batch of the highest goodput, anew in every epoch and
    every minute. `batch`: fixed total batch; 0: adapted."""

    profile: Profile
    local_least: int
    batch: int = 0
    start_ms: int = 30_000

    def begin(self) -> Course:
        return AdaptiveCourse(self)

    @property
    def batches(self) -> Batches:
        p = self.profile
        if self.batch:
            return Batches(self.batch, self.batch)
        return Batches(p.init_batch, p.max_batch, self.local_least, p.max_local_batch)


@dataclass(slots=True)
class AdaptiveCourse:
    """Whole seconds at epoch ends, as in Pollux's simulator."""

    work: Adaptive
    epoch: int = 0
    progress: float = 0.0
    model: SpeedModel = field(default_factory=SpeedModel)
    report: Report | None = None
    """What the job last told of its speed."""
    _gpus: tuple[int, ...] = ()
    _local: int = 0
    _extra: int = 0
    _ahead: tuple[Seats, AdaptiveCourse, float] | None = None
    """What a look ahead of `LOOK_MS` came to: the course then, and when it ends."""

    def left_ms(self, seats: Seats) -> float:
        """Time to the end if that is within `LOOK_MS`; else infinity."""
        if self._ahead is None or self._ahead[0] != seats:
            ahead = replace(self, model=self.model.copy(), _ahead=None)
            left_ms = ahead._run(seats, LOOK_MS)
            self._ahead = (seats, ahead, left_ms)
        return self._ahead[2]

    def advance(self, seats: Seats, ran_ms: float) -> None:
        if ran_ms == LOOK_MS and self._ahead is not None and self._ahead[0] == seats:
            after = self._ahead[1]
            self.epoch, self.progress, self.model, self.report = after.epoch, after.progress, after.model, after.report
            self._gpus, self._local, self._extra, self._ahead = after._gpus, after._local, after._extra, None
            return
        self._ahead = None
        self._run(seats, ran_ms)

    def _run(self, seats: Seats, ran_ms: float) -> float:
        """Run on; returns how long it took to the end, or infinity."""
        profile, gpus = self.work.profile, tuple(milli // 1_000 for _, milli in seats)
        replicas, left_s, spent_s = sum(gpus), ran_ms / 1_000, 0.0
        if gpus != self._gpus:
            self._gpus = gpus
            self._choose(replicas)
        while left_s > 0 and self.epoch < profile.max_epochs:
            batch = replicas * self._local * (self._extra + 1)
            step_s, sync_s = profile.step_s(gpus, self._local)
            square, variance = profile.noise(batch, self.epoch)
            noise = (0.0, 0.0) if self.work.batch else (square, variance)
            self.report = Report(len(gpus), replicas, self._local, step_s, sync_s, noise, self.work.batches)
            self.model.note(self.report)
            gain = (variance + square) / (variance * profile.init_batch / batch + square)
            rate = gain / (step_s + self._extra * (step_s - sync_s))
            target = profile.progress_at(self.epoch + 1)
            if self.progress + rate * left_s < target:
                self.progress += rate * left_s
                spent_s, left_s = spent_s + left_s, 0.0
            else:
                took_s = round((target - self.progress) / rate)
                self.progress, self.epoch = target, self.epoch + 1
                spent_s, left_s = spent_s + took_s, left_s - took_s
                if self.epoch == profile.max_epochs:
                    return 1_000 * spent_s
            self._choose(replicas)
        return inf

    def _choose(self, replicas: int) -> None:
        """Batch of one GPU and extra passes, from here on."""
        profile, work = self.work.profile, self.work
        local, extra = 0.0, 0
        if not work.batch and self.model.seen:
            _, local, extra = self.model.choose(len(self._gpus), replicas)
        if local:
            self._local, self._extra = int(local), extra
        else:
            batch = work.batch or max(profile.init_batch, work.local_least * replicas)
            self._local, self._extra = profile.batches(replicas, batch)
        self._local = min(self._local, profile.max_batch // (replicas * (self._extra + 1)))
