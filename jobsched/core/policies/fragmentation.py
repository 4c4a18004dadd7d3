"""Fragmentation: how much of a node's free GPUs the usual replicas could not use, and scores that keep it low.

Fragmentation gradient descent (FGD, "Beware of Fragmentation", USENIX ATC'23) takes the node where this waste grows
least. `Gradient` is that score as published, with the workload given; `Learned` is jobsched's own: it learns the
workload from what was submitted, and counts beside FGD's "one more would fit" how many would, so that CPUs that several
free GPUs need together are kept for them. The other scores are the paper's baselines. All rate one node by itself, in
integers; `ranking` keeps their order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import exp
from operator import itemgetter
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


_Use = tuple[int, int, int, int, int]
"""(CPUs and memory of a replica, reach, each, most): what one demand could use of a node in a given GPU state, which is
`reach` as soon as one replica has its CPUs and memory, and `each` per replica up to `most`."""


class _Demands:
    """The demands that may use one GPU class, by CPUs needed, and what they could use of a single GPU."""

    def __init__(self, demands: Iterable[tuple[Demand, int]], memory: Mapping[Demand, int]) -> None:
        rows = [(d.cpu_milli, memory.get(d, 0), d.gpu_milli, n) for d, n in demands]
        self.singles = [row for row in rows if row[2] <= WHOLE_GPU]
        self.multiples = [row for row in rows if row[2] > WHOLE_GPU]
        self._rows: dict[int, tuple[list[int], list[int]]] = {}
        self._fills: dict[int, int] = {0: 0}

    def row(self, level: int) -> tuple[list[int], list[int]]:
        """(how many replicas of each single-GPU demand fit on a GPU at this level, what it could reach of it)."""
        row = self._rows.get(level)
        if row is None:
            most = [level // gpu for _, _, gpu, _ in self.singles]
            row = self._rows[level] = (most, [level if count else 0 for count in most])
        return row

    def uses(self, levels: Levels, fill: bool) -> list[_Use]:
        rows = [self.row(level) for level in levels if level]
        mosts = map(sum, zip(*[row[0] for row in rows], strict=True))
        reaches = map(sum, zip(*[row[1] for row in rows], strict=True))
        found = [
            (cpu, memory, count * reach * (2 if fill else 1), count * gpu if fill else 0, most)
            for (cpu, memory, gpu, count), most, reach in zip(self.singles, mosts, reaches, strict=False)
            if most
        ]
        whole = levels.count(WHOLE_GPU)
        for cpu, memory, gpu, count in self.multiples:
            if most := whole // (gpu // WHOLE_GPU):
                reach = count * whole * WHOLE_GPU
                insort(found, (cpu, memory, reach * (2 if fill else 1), count * gpu if fill else 0, most))
        return found

    def filled(self, level: int) -> int:
        """How much of one GPU at this level is taken in the end, on average, if single-GPU demands come at random and
        each that fits is let in."""
        fill = self._fills.get(level)
        if fill is None:
            taken = comers = 0
            for _, _, gpu, count in self.singles:
                if SMALLEST <= gpu <= level:
                    taken += count * (gpu + self.filled(level - gpu))
                    comers += count
            fill = self._fills[level] = taken // comers if comers else 0
        return fill


SMALLEST = 20
"""Demands for fewer thousandths of a GPU are left out where a GPU is thought to be filled at random."""
OFTEN = 4
STATES_KEPT = 50_000


class Waste:
    """The free GPUs that a mix of demands would leave unused, in thousandths times the mix's total count.

    Averaged over the demands: all that is free minus what this demand could use, which is FGD's measure (GPUs with
    room for it, if the node has CPUs for one) and, with `fill`, to a third what the node would hold filled with this
    demand alone; and, with `fill`, a third of what of each GPU would stay free once filled at random.

    `memory`: bytes that a replica of each demand takes of its node; none, as in FGD, does not look at it."""

    def __init__(self, counts: Mapping[Demand, int], fill: bool, memory: Mapping[Demand, int] | None = None) -> None:
        self.total = sum(counts.values())
        self.fill = fill
        self.memory = memory or {}
        self._counts = sorted((d, n) for d, n in counts.items() if d.gpu_milli)
        self._of_class: dict[GpuClass, _Demands] = {}
        self._states: dict[tuple[GpuClass, Levels], State] = {}

    def of(self, space: Space, cls: GpuClass) -> tuple[State, int]:
        """The state of a node's GPUs of one class, and what is wasted there now."""
        key = (id(self), cls)
        found = space.notes.get(key)
        if found is None:
            state = self.state(cls, space.levels(cls))
            found = space.notes[key] = (state, state.wasted(space.cpu_milli, space.memory_bytes))
        assert isinstance(found[0], State)
        return found[0], found[1]

    def state(self, cls: GpuClass, levels: Levels) -> State:
        found = self._states.get((cls, levels))
        if found is None:
            if len(self._states) >= STATES_KEPT:
                self._states.clear()
            demands = self._of_class.get(cls)
            if demands is None:
                usable = [(d, n) for d, n in self._counts if _usable(cls, d)]
                demands = self._of_class[cls] = _Demands(usable, self.memory)
            found = self._states[cls, levels] = State(self, cls, levels, demands)
        return found


class State:
    """One state of a node's GPUs of one class: what is wasted there falls in steps as the node's CPUs grow. States that
    are asked for often get a table of these steps, as if memory were plenty, and look after what memory keeps out."""

    __slots__ = ("_afters", "_asked", "_cls", "_free", "_heavy", "_levels", "_plenty", "_steps", "_uses", "_waste",
                 "_wasted")  # fmt: skip

    def __init__(self, waste: Waste, cls: GpuClass, levels: Levels, demands: _Demands) -> None:
        self._waste, self._cls, self._levels = waste, cls, levels
        self._free = sum(levels) * waste.total * (3 if waste.fill else 1)
        if waste.fill:
            self._free += waste.total * sum([level - demands.filled(level) for level in levels])
        self._uses = demands.uses(levels, waste.fill)
        self._afters: dict[int, list[tuple[State, int]]] = {}
        self._asked = 0
        self._steps: list[int] = []
        self._wasted: list[int] = []
        self._plenty = 0
        """Memory from which on it keeps nothing out."""
        self._heavy: list[tuple[int, _Use]] = []
        """What replicas of a demand may take together, and its use; most first."""

    def wasted(self, cpu_milli: int, memory_bytes: int) -> int:
        """With so many CPUs and so much memory free. O(log steps + demands that memory may keep out) in the long
        run."""
        if not self._steps:
            self._asked += 1
            if self._asked > OFTEN:
                self._tabulate()
            return self._count(cpu_milli, memory_bytes)
        wasted = self._wasted[bisect_right(self._steps, cpu_milli)]
        if memory_bytes < self._plenty:
            for together, (need, memory, reach, each, most) in self._heavy:
                if together <= memory_bytes:
                    break
                if need > cpu_milli:
                    continue
                holds = cpu_milli // need if need else most
                if holds > most:
                    holds = most
                if memory > memory_bytes:
                    wasted += reach + each * holds
                elif memory_bytes // memory < holds:
                    wasted += each * (holds - memory_bytes // memory)
        return wasted

    def _count(self, cpu_milli: int, memory_bytes: int) -> int:
        wasted = self._free
        for need, memory, reach, each, most in self._uses:
            if need > cpu_milli:
                break
            if memory > memory_bytes:
                continue
            if each:
                holds = cpu_milli // need if need else most
                if memory and memory_bytes // memory < holds:
                    holds = memory_bytes // memory
                wasted -= reach + each * (holds if holds < most else most)
            else:
                wasted -= reach
        return wasted

    def _tabulate(self) -> None:
        falls: dict[int, int] = {0: 0}
        for need, _, reach, each, most in self._uses:
            falls[need] = falls.get(need, 0) + reach + (each if need else each * most)
            if each and need:
                for count in range(2, most + 1):
                    falls[need * count] = falls.get(need * count, 0) + each
        self._steps = sorted(falls)
        self._wasted = [self._free]
        for step in self._steps:
            self._wasted.append(self._wasted[-1] - falls[step])
        self._heavy = [(use[1] * (use[4] if use[3] else 1), use) for use in self._uses if use[1]]
        self._heavy.sort(reverse=True)
        self._plenty = self._heavy[0][0] if self._heavy else 0

    def after(self, gpu_milli: int) -> list[tuple[State, int]]:
        """Every way to take whole GPUs or a share: the state that it leaves, and the level of the GPU that it is taken
        from, fullest first."""
        found = self._afters.get(gpu_milli)
        if found is None:
            waste, cls, levels = self._waste, self._cls, self._levels
            if gpu_milli >= WHOLE_GPU:
                count = gpu_milli // WHOLE_GPU
                found = [(waste.state(cls, (0,) * count + levels[: len(levels) - count]), WHOLE_GPU)]
            else:
                found = [(waste.state(cls, _less(levels, at, gpu_milli)), at) for at in _choices(levels, gpu_milli)]
            self._afters[gpu_milli] = found
        return found


def _usable(cls: GpuClass, demand: Demand) -> bool:
    high = demand.memory_max_bytes
    return kind_matches(cls[0], demand.kinds) and demand.memory_min_bytes <= cls[1] <= (high or cls[1])


def _less(levels: Levels, level: int, gpu_milli: int) -> Levels:
    """Once a share is taken from a GPU at `level`."""
    left = list(levels)
    left.remove(level)
    insort(left, level - gpu_milli)
    return tuple(left)


def _choices(levels: Levels, gpu_milli: int) -> list[int]:
    """The distinct levels that a share may come from, fullest GPU first; whole GPUs are all alike."""
    if gpu_milli >= WHOLE_GPU or not gpu_milli:
        return [WHOLE_GPU]
    return list(dict.fromkeys(levels[bisect_left(levels, gpu_milli) :]))


def _gains(waste: Waste, space: Space, cls: GpuClass, role: RoleShape) -> list[Rated]:
    """By how much the waste shrinks for each way to put a replica here."""
    cpu, memory, gpu = space.cpu_milli - role.cpu_milli, space.memory_bytes - role.memory_bytes, role.gpu_milli
    if gpu:
        state, before = waste.of(space, cls)
        return [Rated(before - left.wasted(cpu, memory), level) for left, level in state.after(gpu)]
    gain = 0
    for own in space.whole:
        state, before = waste.of(space, own)
        gain += before - state.wasted(cpu, memory)
    return [Rated(gain, WHOLE_GPU)]


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


@dataclass(frozen=True, slots=True)
class MixNote:
    """A `Mix` as values. `counts`: demand, replicas, what these ask of the memory of their nodes together; `usual`:
    demand, replicas, what each asks of it."""

    counts: tuple[tuple[Demand, int, int], ...] = ()
    usual: tuple[tuple[Demand, int, int], ...] = ()
    total: int = 0
    shares: bool = False
    next: int = 1


@dataclass(slots=True)
class Mix:
    """What was submitted so far: how many replicas of each demand. Old counts fade: when `FADES_AT` is reached all are
    halved. What ended before a server's start is not counted again after it."""

    counts: dict[Demand, int] = field(default_factory=dict)
    total: int = 0
    _memory: dict[Demand, int] = field(default_factory=dict)
    """What these replicas together ask of their nodes."""
    shares: bool = False
    """Whether anybody asked for part of a GPU."""
    version: int = 0
    _next: int = 1
    _usual: dict[Demand, int] = field(default_factory=dict)
    _waste: Waste = field(default_factory=lambda: Waste({}, fill=True))

    def noted(self) -> MixNote:
        return MixNote(
            tuple((d, n, self._memory[d]) for d, n in self.counts.items()),
            tuple((d, n, self._waste.memory.get(d, 0)) for d, n in self._usual.items()),
            self.total, self.shares, self._next,
        )  # fmt: skip

    @classmethod
    def of(cls, note: MixNote) -> Mix:
        """As it was when that was noted."""
        mix = cls({d: n for d, n, _ in note.counts}, note.total, {d: m for d, _, m in note.counts}, note.shares)
        mix._next, mix._usual = note.next, {d: n for d, n, _ in note.usual}
        if note.usual:
            mix.version, mix._waste = 1, Waste(mix._usual, fill=True, memory={d: each for d, _, each in note.usual})
        return mix

    def learn(self, shape: Shape) -> None:
        for role in shape.roles:
            demand = demand_of(role)
            self.counts[demand] = self.counts.get(demand, 0) + role.prefer
            self._memory[demand] = self._memory.get(demand, 0) + role.prefer * role.memory_bytes
            self.total += role.prefer
            if 0 < role.gpu_milli < WHOLE_GPU:
                self.shares = True
        if self.total >= self._next:
            now = typical(self.counts)
            if _differ_pct(now, self._usual) >= NOTABLE_PCT:
                self.version += 1
                self._usual = now
                self._waste = Waste(now, fill=True, memory={d: self._memory[d] // self.counts[d] for d in now})
            if self.total >= FADES_AT:
                self._memory = {d: self._memory[d] // n * (n // 2) for d, n in self.counts.items() if n > 1}
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
        gains = _gains(self.mix.waste, space, cls, role)
        return gains[0] if len(gains) == 1 else max(gains, key=_gain)


_gain = itemgetter(0)
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
