"""Fragmentation: how much of a node's free GPUs the usual replicas could not use, and scores that keep it low.

Fragmentation gradient descent (FGD, "Beware of Fragmentation", USENIX ATC'23) takes the node where this waste grows
least. `Gradient` is that score as published, with the workload given; `Learned` is jobsched's own: it learns the
workload from what was submitted, and counts beside FGD's "one more would fit" how many would, so that CPUs that several
free GPUs need together are kept for them. The other scores are the paper's baselines. All rate one node by itself, in
integers; `ranking` keeps their order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import exp
from typing import NamedTuple

from jobsched.core.job import RoleShape, Shape
from jobsched.core.ledger import GpuClass, Space
from jobsched.core.node import kind_matches
from jobsched.core.policies.ranking import Rated
from jobsched.core.resources import WHOLE_GPU

Levels = tuple[int, ...]


class Demand(NamedTuple):
    """What one replica asks for, as far as a score looks at it."""

    cpu_milli: int
    gpu_milli: int
    kinds: tuple[str, ...] = ()
    memory_min_bytes: int = 0
    memory_max_bytes: int = 0


def demand_of(role: RoleShape) -> Demand:
    return Demand(
        role.cpu_milli, role.gpu_milli, role.gpu_kinds, role.gpu_memory_min_bytes, role.gpu_memory_max_bytes
    )


class _Use(NamedTuple):
    """What one demand could use of a node in a given GPU state: `reach` as soon as one replica has its CPUs, `each`
    per replica up to `most`."""

    cpu_milli: int
    reach: int
    each: int
    most: int


@dataclass(slots=True)
class _State:
    """What is known of one class and state of GPUs."""

    free: int
    uses: list[_Use]
    """By CPUs needed."""
    asked: int = 0
    steps: list[int] = field(default_factory=list)
    """CPUs from which on less is wasted."""
    wasted: list[int] = field(default_factory=list)
    """With fewer CPUs than the first step, than the second, …"""


class Waste:
    """The free GPUs that a mix of demands would leave unused, in thousandths times the mix's total count.

    Averaged over the demands: all that is free minus what this demand could use, which is FGD's measure (GPUs with
    room for it, if the node has CPUs for one) and, with `fill`, to equal parts what the node would hold filled with
    this demand alone. For a given state of the GPUs it falls in steps as the CPUs grow; states that are asked for often
    get a table of these steps."""

    def __init__(self, counts: Mapping[Demand, int], fill: bool) -> None:
        self.total = sum(counts.values())
        self._fill = fill
        self._counts = sorted((d, n) for d, n in counts.items() if d.gpu_milli)
        self._of_class: dict[GpuClass, list[tuple[Demand, int]]] = {}
        self._known: dict[tuple[GpuClass, Levels], _State] = {}

    def __call__(self, cls: GpuClass, levels: Levels, cpu_milli: int) -> int:
        """O(log steps) in the long run."""
        key = (cls, levels)
        state = self._known.get(key)
        if state is None:
            if len(self._known) >= STATES_KEPT:
                self._known.clear()
            state = self._known[key] = self._look(cls, levels)
        if state.steps:
            return state.wasted[bisect_right(state.steps, cpu_milli)]
        state.asked += 1
        if state.asked > OFTEN:
            _tabulate(state)
        wasted = state.free
        for need, reach, each, most in state.uses:
            if need > cpu_milli:
                break
            if each:
                holds = cpu_milli // need if need else most
                wasted -= reach + each * (holds if holds < most else most)
            else:
                wasted -= reach
        return wasted

    def _look(self, cls: GpuClass, levels: Levels) -> _State:
        demands = self._of_class.get(cls)
        if demands is None:
            demands = self._of_class[cls] = [(d, n) for d, n in self._counts if _usable(cls, d)]
        free, whole = sum(levels), levels.count(WHOLE_GPU)
        parts = 2 if self._fill else 1
        uses = []
        for demand, count in demands:
            gpu = demand.gpu_milli
            most = sum([level // gpu for level in levels]) if gpu < WHOLE_GPU else whole // (gpu // WHOLE_GPU)
            if most:
                reach = sum([level for level in levels if level >= gpu]) if gpu < WHOLE_GPU else whole * WHOLE_GPU
                uses.append(_Use(demand.cpu_milli, count * reach, count * gpu if self._fill else 0, most))
        return _State(free * self.total * parts, uses)


OFTEN = 6
STATES_KEPT = 100_000


def _tabulate(state: _State) -> None:
    falls: dict[int, int] = {0: 0}
    for need, reach, each, most in state.uses:
        falls[need] = falls.get(need, 0) + reach + (each if need else each * most)
        if each and need:
            for count in range(2, most + 1):
                falls[need * count] = falls.get(need * count, 0) + each
    steps = sorted(falls)
    wasted = [state.free]
    for step in steps:
        wasted.append(wasted[-1] - falls[step])
    state.steps, state.wasted = steps, wasted


def _usable(cls: GpuClass, demand: Demand) -> bool:
    high = demand.memory_max_bytes
    return kind_matches(cls[0], demand.kinds) and demand.memory_min_bytes <= cls[1] <= (high or cls[1])


def _after(levels: Levels, level: int, gpu_milli: int) -> Levels:
    """The GPU state once a share is taken from a GPU at `level`, or whole GPUs."""
    left = list(levels)
    if gpu_milli >= WHOLE_GPU:
        count = gpu_milli // WHOLE_GPU
        return (0,) * count + levels[: len(levels) - count]
    left.remove(level)
    rest = level - gpu_milli
    left.insert(bisect_left(left, rest), rest)
    return tuple(left)


def _choices(levels: Levels, gpu_milli: int) -> list[int]:
    """The distinct levels that a share may come from, fullest GPU first; whole GPUs are all alike."""
    if gpu_milli >= WHOLE_GPU or not gpu_milli:
        return [WHOLE_GPU]
    return list(dict.fromkeys(levels[bisect_left(levels, gpu_milli) :]))


def _gains(waste: Waste, space: Space, cls: GpuClass, role: RoleShape) -> Iterable[tuple[int, int]]:
    """(by how much the waste shrinks, GPU level) of each way to put a replica here."""
    cpu = space.cpu_milli - role.cpu_milli
    if not role.gpu_milli:
        gain = 0
        for own in space.whole:
            levels = space.levels(own)
            gain += waste(own, levels, space.cpu_milli) - waste(own, levels, cpu)
        return [(gain, WHOLE_GPU)]
    levels = space.levels(cls)
    before = waste(cls, levels, space.cpu_milli)
    gpu = role.gpu_milli
    return [(before - waste(cls, _after(levels, level, gpu), cpu), level) for level in _choices(levels, gpu)]


@dataclass(slots=True)
class Gradient:
    """FGD as published: the whole workload is known beforehand, a node's score is a sigmoid in whole percent."""

    waste: Waste
    version: int = 0
    steady: bool = True
    by_name: bool = True

    @classmethod
    def of(cls, counts: Mapping[Demand, int]) -> Gradient:
        return cls(Waste(typical(counts), fill=False))

    def rate(self, space: Space, cls: GpuClass, role: RoleShape) -> Rated:
        best = Rated(-1, 0)
        for gain, level in _gains(self.waste, space, cls, role):
            value = int(100 / (1 + exp(-gain / self.waste.total / WHOLE_GPU)))
            if value > best.value:
                best = Rated(value, level)
        return best


POPULAR_PCT = 95


def typical(counts: Mapping[Demand, int]) -> dict[Demand, int]:
    """The most frequent demands that make up 95 % of all."""
    order = sorted(((n, d) for d, n in counts.items()), reverse=True)
    found: dict[Demand, int] = {}
    missing = -(-POPULAR_PCT * sum(counts.values()) // 100)
    for count, demand in order:
        if missing <= 0:
            break
        found[demand] = count
        missing -= count
    return found


@dataclass(slots=True)
class Mix:
    """What was submitted so far: how many replicas of each demand. Old counts fade: when `FADES_AT` is reached all are
    halved. What ended before a server's start is not counted again after it."""

    counts: dict[Demand, int] = field(default_factory=dict)
    total: int = 0
    shares: bool = False
    """Whether anybody asked for part of a GPU."""
    version: int = 0
    _next: int = 1
    _usual: dict[Demand, int] = field(default_factory=dict)
    _waste: Waste = field(default_factory=lambda: Waste({}, fill=True))

    def learn(self, shape: Shape) -> None:
        for role in shape.roles:
            demand = demand_of(role)
            self.counts[demand] = self.counts.get(demand, 0) + role.prefer
            self.total += role.prefer
            if 0 < role.gpu_milli < WHOLE_GPU:
                self.shares = True
        if self.total >= self._next:
            now = typical(self.counts)
            if _differ_pct(now, self._usual) >= NOTABLE_PCT:
                self.version += 1
                self._usual = now
                self._waste = Waste(now, fill=True)
            if self.total >= FADES_AT:
                self.counts = {demand: count // 2 for demand, count in self.counts.items() if count > 1}
                self.total = sum(self.counts.values())
            self._next = min(2 * self.total, self.total + FADES_AT // 2)

    @property
    def waste(self) -> Waste:
        """As of the last time that the mix had grown notably."""
        return self._waste


def _differ_pct(one: Mapping[Demand, int], other: Mapping[Demand, int]) -> int:
    """How much of one mix would have to change to give the other, in percent (total variation)."""
    whole, whole_other = sum(one.values()), sum(other.values())
    if not whole or not whole_other:
        return 100
    apart = sum(abs(one.get(d, 0) * whole_other - other.get(d, 0) * whole) for d in {**one, **other})
    return 50 * apart // (whole * whole_other)


NOTABLE_PCT = 8
FADES_AT = 1 << 16


@dataclass(slots=True)
class Learned:
    """jobsched's own score: the waste that the learned mix would see grows least."""

    mix: Mix
    steady: bool = True
    by_name: bool = False

    @property
    def version(self) -> int:
        return self.mix.version

    def rate(self, space: Space, cls: GpuClass, role: RoleShape) -> Rated:
        gain, level = max(_gains(self.mix.waste, space, cls, role), key=lambda choice: (choice[0], -choice[1]))
        return Rated(gain, level)


MOST_CPU_MILLI = 128_000
MOST_GPU_MILLI = 8_000


@dataclass(frozen=True, slots=True)
class BestFit:
    """FGD's baseline: least left of CPU and GPU together, each measured against the largest node, in whole percent."""

    version: int = 0
    steady: bool = True
    by_name: bool = True

    def rate(self, space: Space, cls: GpuClass, role: RoleShape) -> Rated:
        cpu = (space.cpu_milli - role.cpu_milli) / MOST_CPU_MILLI
        gpu = (sum(space.gpu_free.values()) - role.gpu_milli) / MOST_GPU_MILLI
        return Rated(int((1 - (cpu + gpu) / 2) * 100), _choices(space.levels(cls), role.gpu_milli)[0])


@dataclass(frozen=True, slots=True)
class Packing:
    """FGD's baseline: started GPUs before free ones, started nodes before free ones."""

    version: int = 0
    steady: bool = True
    by_name: bool = True

    def rate(self, space: Space, cls: GpuClass, role: RoleShape) -> Rated:
        if not role.gpu_milli:
            return Rated(0, WHOLE_GPU)
        levels = space.levels(cls)
        level = _choices(levels, role.gpu_milli)[0]
        whole = levels.count(WHOLE_GPU)
        if whole == len(levels):
            return Rated(max(33 - whole, whole), level)
        if level == WHOLE_GPU:
            return Rated(max(50 - max(1, role.gpu_milli // WHOLE_GPU), 33), level)
        return Rated(max(100 - level * 100 // WHOLE_GPU // 10, 50), level)
