"""Speed models: how fast a job would go with numbers of replicas that it never had, from what it reported with others.

Fed by `controller.telemetry`, asked by `policies.elasticity`; kept beside the cluster, never in the log. Goodput is
throughput times statistical efficiency (Pollux, OSDI'21). One pass takes `(compute^g + sync^g)^(1/g)` seconds: compute
is linear in the batch of one replica, synchronisation linear in the number of replicas, apart for gangs on one node and
on several; `g` says how far both overlap. Efficiency follows from the gradient noise where a job reports it (McCandlish
et al., 2018). A job that reports only samples per second has a fixed batch, and its goodput is its throughput (Optimus,
EuroSys'18). What was never measured is taken to cost nothing, so that a job with one measurement is believed to scale
perfectly: whoever grows it finds out.

Pollux fits seven parameters by gradient descent; here each candidate `g` leaves two straight lines with a closed form.

Where workers talk to parameter servers, synchronisation follows Optimus instead: with w workers and p servers it takes
`a * w/p + b + c * w + d * p` seconds, the time that a server needs for its part of all pushes, what every exchange
takes, and what every further worker or server adds; none below 0. While measurements do not tell these apart, half
counts as the servers' and half as the exchange's: hopeful about more of either. Asynchronous workers step each for
themselves, so that w of them make w steps in that time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, log, sqrt

OVERLAPS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Candidates for `g`: 1 is no overlap, 10 is nearly perfect."""
KEPT = 64
"""Most measurements kept per job; the oldest kind goes first."""
FRESH = 0.1
"""Least weight of a new measurement beside the mean of older ones of the same kind."""
BATCHES_TRIED = 20
"""Batch sizes looked at between the smallest and the largest, in geometric steps."""
FURTHER = 1.1
"""Synchronisation across nodes takes at least so many times that within one."""
TINY = 1e-8
RIDGE = 1e-3
"""Weight of having no term at all beside one measurement: it divides what measurements do not tell apart."""

Size = tuple[int, int]
"""(training replicas, parameter servers); the latter 0 where a job has none."""


@dataclass(frozen=True, slots=True)
class Batches:
    """What a job may do with its batch; all in samples. A step at `initial` counts as one unit of progress. The batch
    is fixed when `initial` and `largest` are equal."""

    initial: float = 1.0
    largest: float = 1.0
    local_least: float = 0.0
    """Least and most that one replica takes in one pass."""
    local_most: float = inf
    apart: bool = False
    """Each replica steps for itself (asynchronous parameter servers): the batches above are those of one replica."""

    def split(self, batch: float, replicas: int) -> tuple[float, int]:
        """(batch of one replica and pass, extra passes that only accumulate gradients) for a total batch. A single
        replica needs two passes to tell the noise of its gradient."""
        local = batch if self.apart else batch / replicas
        if self.initial == self.largest:
            return local, 0
        extra = ceil(local / self.local_most - TINY) - 1
        if replicas == 1 and local > self.initial + TINY:
            extra = max(1, extra)
        return float(ceil(local / (extra + 1) - TINY)), extra


@dataclass(frozen=True, slots=True)
class Report:
    """One measurement of a running gang."""

    nodes: int
    replicas: int
    local: float
    """Samples of one replica and pass."""
    step_s: float
    """Seconds of a pass with synchronisation."""
    sync_s: float = -1.0
    """Seconds of it that synchronisation adds; negative: not known."""
    noise: tuple[float, float] = (0.0, 0.0)
    """Square of the gradient's norm and its variance at the initial batch; zeros: not known."""
    batches: Batches = Batches()
    servers: int = 0
    """Parameter servers."""

    def metrics(self) -> tuple[tuple[str, float], ...]:
        """As a job reports them; `of` reads them back."""
        told = {"step_s": self.step_s, "sync_s": self.sync_s, "local_batch": float(self.local)}
        if self.batches.initial < self.batches.largest:
            told |= {
                "batch_initial": self.batches.initial,
                "batch_max": self.batches.largest,
                "local_batch_min": self.batches.local_least,
                "local_batch_max": self.batches.local_most,
            }
        else:
            told["batch"] = self.batches.initial
        if self.batches.apart:
            told["asynchronous"] = 1.0
        if any(self.noise):
            told |= {"grad_sqr": self.noise[0], "grad_var": self.noise[1]}
        return tuple(sorted(told.items()))

    @classmethod
    def of(cls, metrics: Mapping[str, float], nodes: int, replicas: int, servers: int = 0) -> Report | None:
        """From a job's metrics: `samples_per_s` of all together is enough, or `local_samples_per_s` of the one that
        reports, whose peers are taken to be as fast; `step_s`, `sync_s`, `batch`, `local_batch`, `grad_sqr`,
        `grad_var`, `batch_initial`, `batch_max`, `local_batch_min`, `local_batch_max` say more, and `asynchronous` that
        replicas step for themselves. None: they do not say anything about speed."""
        batch, apart = metrics.get("batch", 0.0) or 1.0, metrics.get("asynchronous", 0.0) > 0.0
        local = metrics.get("local_batch", batch if apart else batch / replicas)
        if servers:
            nodes = 1  # where workers sit does not matter: they talk to servers only
        step_s = metrics.get("step_s", 0.0)
        if step_s <= 0.0:
            per_s = metrics.get("samples_per_s", 0.0) or replicas * metrics.get("local_samples_per_s", 0.0)
            if per_s <= 0.0:
                return None
            step_s = local * replicas / per_s
        if metrics.get("batch_max", 0.0) > 0.0:
            initial = metrics.get("batch_initial", batch)
            batches = Batches(initial, max(initial, metrics["batch_max"]), metrics.get("local_batch_min", 1.0),
                              metrics.get("local_batch_max", metrics["batch_max"]))  # fmt: skip
        else:
            batches = Batches(batch, batch, apart=apart)
        noise = metrics.get("grad_sqr", 0.0), metrics.get("grad_var", 0.0)
        return cls(nodes, replicas, local, step_s, metrics.get("sync_s", -1.0), noise, batches, servers)


@dataclass(frozen=True, slots=True)
class Straight:
    """`base + slope * x`, neither below 0."""

    base: float
    slope: float

    def at(self, x: float) -> float:
        return self.base + self.slope * x

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> Straight:
        """Least squares of relative errors."""
        weights = [1.0 / max(y, TINY) ** 2 for y in ys]
        total = sum(weights)
        mean_x = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
        mean_y = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
        spread = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, xs, strict=True))
        if spread <= TINY * total * max(TINY, mean_x**2):
            return cls(mean_y, 0.0)
        slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, xs, ys, strict=True)) / spread
        if slope < 0.0:
            return cls(mean_y, 0.0)
        if mean_y < slope * mean_x:
            squares = sum(w * x * x for w, x in zip(weights, xs, strict=True))
            return cls(0.0, sum(w * x * y for w, x, y in zip(weights, xs, ys, strict=True)) / squares)
        return cls(mean_y - slope * mean_x, slope)


Place = tuple[int, int, int, float]
"""(nodes, replicas, servers, local batch)."""
Seen = Mapping[Place, tuple[float, float]]
"""Where -> (seconds of a pass, seconds of it in synchronisation)."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Seconds of a pass that workers spend with parameter servers: Optimus' terms."""

    load: float
    """Per worker and server."""
    exchange: float
    worker: float
    server: float

    def at(self, replicas: int, servers: int) -> float:
        return self.load * replicas / servers + self.exchange + self.worker * replicas + self.server * servers

    @staticmethod
    def terms(replicas: int, servers: int) -> tuple[float, ...]:
        return replicas / servers, 1.0, float(replicas), float(servers)


SERVING_RIDGE = (RIDGE, RIDGE, 100 * RIDGE, 100 * RIDGE)
"""Servers' load and exchange are what there always is; what each further worker or server adds has to show."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Fitted seconds of a pass."""

    compute: Straight
    within: Straight
    """Synchronisation on one node, by replicas beyond two."""
    across: Straight
    overlap: float
    serving: Serving | None = None
    """Synchronisation through parameter servers, where the job has some."""

    def pass_s(self, nodes: int, replicas: int, local: float, servers: int = 0) -> float:
        return _joined(self.compute.at(local), self.sync_s(nodes, replicas, servers), self.overlap)

    def sync_s(self, nodes: int, replicas: int, servers: int = 0) -> float:
        if self.serving is not None and servers:
            return self.serving.at(replicas, servers)
        if replicas == 1:
            return 0.0
        return (self.across if nodes > 1 else self.within).at(max(0, replicas - 2))

    @classmethod
    def fit(cls, seen: Seen, fixed: bool = False) -> Curve:
        """The curve nearest to the measurements; `fixed`: of a job with a fixed batch. O(measurements)."""
        served = any(key[2] for key in seen)
        if served and not all(sync_s >= 0.0 for _, sync_s in seen.values()):
            return cls._apart(seen)
        seen = _with_sync(seen)
        locals_ = [key[3] for key in seen]
        computes = [step_s - sync_s for step_s, sync_s in seen.values()]
        if len(set(locals_)) > 1:
            compute = Straight.through(locals_, computes)
        else:  # half of it grows with the batch, or all where the batch is what more replicas share: hopeful about both
            mean = sum(computes) / len(computes)
            base = 0.0 if fixed else mean / 2
            compute = Straight(base, (mean - base) / max(TINY, locals_[0]))
        if served:
            rows = [(Serving.terms(key[1], key[2]), *told) for key, told in seen.items() if key[2]]
            found = not_negative([[x / step_s for x in terms] for terms, step_s, _ in rows],
                                 [sync_s / step_s for _, step_s, sync_s in rows], SERVING_RIDGE)  # fmt: skip
            return cls(compute, Straight(0.0, 0.0), Straight(0.0, 0.0), 1.0, Serving(*found))
        best: tuple[float, Curve] | None = None
        for overlap in OVERLAPS:
            curve = cls._with(seen, compute, overlap)
            error = sum(log(curve.pass_s(n, r, b) / step_s) ** 2 for (n, r, _, b), (step_s, _) in seen.items())
            error += 1e-5 * (overlap - 1.0) ** 2
            if best is None or error < best[0]:
                best = (error, curve)
        assert best is not None
        return best[1]

    @classmethod
    def _apart(cls, seen: Seen) -> Curve:
        """With parameter servers, of whose part in a pass nothing was told: it is what changes with the numbers."""
        rows = [((key[3], *Serving.terms(key[1], key[2])), step_s) for key, (step_s, _) in seen.items() if key[2]]
        slope, *found = not_negative([[x / step_s for x in terms] for terms, step_s in rows], [1.0] * len(rows),
                                     (RIDGE / 10, *SERVING_RIDGE))  # fmt: skip
        return cls(Straight(0.0, slope), Straight(0.0, 0.0), Straight(0.0, 0.0), 1.0, Serving(*found))

    @classmethod
    def _with(cls, seen: Seen, compute: Straight, overlap: float) -> Curve:
        points: dict[bool, tuple[list[float], list[float]]] = {False: ([], []), True: ([], [])}
        for (nodes, replicas, _, _), (step_s, sync_s) in seen.items():
            if replicas > 1:
                xs, ys = points[nodes > 1]
                xs.append(max(0, replicas - 2))
                ys.append(max(0.0, step_s**overlap - (step_s - sync_s) ** overlap) ** (1.0 / overlap))
        within, across = (Straight.through(*points[far]) if points[far][0] else None for far in (False, True))
        within = within or Straight(0.0, 0.0)
        return cls(compute, within, across or Straight(FURTHER * within.base, FURTHER * within.slope), overlap)


def _joined(compute_s: float, sync_s: float, overlap: float) -> float:
    if sync_s <= 0.0:
        return compute_s
    return float((compute_s**overlap + sync_s**overlap) ** (1.0 / overlap))


def _with_sync(seen: Seen) -> Seen:
    """Where synchronisation was not reported it is what does not shrink with the batch of one replica."""
    if all(sync_s >= 0.0 for _, sync_s in seen.values()):
        return seen
    alone = [(key[3], step_s) for key, (step_s, _) in seen.items() if key[1] == 1]
    locals_, steps = [key[3] for key in seen], [step_s for step_s, _ in seen.values()]
    if alone:
        each = sum(step_s / local for local, step_s in alone) / len(alone)
    elif len(set(locals_)) > 1:
        each = Straight.through(locals_, steps).slope
    else:
        each = steps[0] / locals_[0]
    return {
        key: (step_s, 0.0 if key[1] == 1 else min(max(0.0, step_s - each * key[3]), 0.99 * step_s))
        for key, (step_s, _) in seen.items()
    }


def not_negative(rows: Sequence[Sequence[float]], wanted: Sequence[float], ridge: Sequence[float]) -> list[float]:
    """Coefficients, none below 0, with the least squares of `rows * coefficients - wanted`, plus `ridge` times the
    square of what each contributes (the active set of Lawson & Hanson, 1974). O(columns^4)."""
    columns = range(len(ridge))
    scale = [max(TINY, sqrt(sum(row[j] ** 2 for row in rows) / len(rows))) for j in columns]
    table = [[row[j] / scale[j] for j in columns] for row in rows]
    square = [[sum(row[i] * row[j] for row in table) + (ridge[i] if i == j else 0.0) for j in columns] for i in columns]
    goal = [sum(row[j] * y for row, y in zip(table, wanted, strict=True)) for j in columns]
    found, inside = [0.0] * len(ridge), list[int]()
    for _ in range(3 * len(ridge)):
        pull = {j: goal[j] - sum(square[j][i] * found[i] for i in columns) for j in columns if j not in inside}
        best = max(pull, key=lambda j: pull[j], default=-1)
        if best < 0 or pull[best] <= TINY:
            break
        inside = sorted([*inside, best])
        while True:
            trial = dict(zip(inside, _solved([[square[i][j] for j in inside] for i in inside],
                                             [goal[i] for i in inside]), strict=True))  # fmt: skip
            if all(value > 0.0 for value in trial.values()):
                found = [trial.get(j, 0.0) for j in columns]
                break
            reach = min(found[j] / (found[j] - trial[j]) for j in inside if trial[j] <= 0.0)
            found = [found[j] + reach * (trial.get(j, 0.0) - found[j]) for j in columns]
            inside = [j for j in inside if found[j] > TINY and not (trial[j] <= 0.0 and found[j] <= TINY)]
            found = [found[j] if j in inside else 0.0 for j in columns]
    return [found[j] / scale[j] for j in columns]


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Of a symmetric positive definite system, by elimination."""
    size = len(right)
    for i in range(size):
        for j in range(i + 1, size):
            part = matrix[j][i] / matrix[i][i]
            matrix[j] = [below - part * above for below, above in zip(matrix[j], matrix[i], strict=True)]
            right[j] -= part * right[i]
    for i in reversed(range(size)):
        right[i] = (right[i] - sum(matrix[i][j] * right[j] for j in range(i + 1, size))) / matrix[i][i]
    return right


@dataclass(frozen=True, slots=True)
class Stretch:
    """How far a job came while one attempt had one size: its first and its last report."""

    attempt: int = 0
    size: Size = (0, 0)
    first_step: int = 0
    first_at_ms: int = 0
    step: int = 0
    at_ms: int = 0

    @property
    def step_ms(self) -> float:
        """0: not known."""
        steps, took_ms = self.step - self.first_step, self.at_ms - self.first_at_ms
        return took_ms / steps if steps > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Pause:
    """What a change of size took."""

    in_place: bool
    """Without a new attempt."""
    since_ms: int
    """The last report before it."""
    took_ms: int
    """Time without progress since then."""


@dataclass(slots=True)
class SpeedModel:
    """What is known of one job's speed."""

    batches: Batches = Batches()
    noise: tuple[float, float] = (0.0, 0.0)
    seen: dict[Place, tuple[float, float]] = field(default_factory=dict)
    most_tried: Size = (0, 0)
    """Most training replicas, and most servers, measured so far."""
    left_ms: float = inf
    """Time to the end at the pace of late, where the job reports how many steps it will make."""
    _times: dict[Place, int] = field(default_factory=dict)
    """How often each kind was measured."""
    _stretch: Stretch = Stretch()
    _before: Stretch = Stretch()
    """The one before that; none once it is known what the change took."""
    _curve: Curve | None = None
    _choices: dict[tuple[int, int, int], tuple[float, float, int]] = field(default_factory=dict)
    known: object = None
    """What was last found out by it; scratch of `policies.elasticity`, forgotten with the curve."""

    def copy(self) -> SpeedModel:
        """One that learns on its own."""
        return replace(self, seen=dict(self.seen), _times=dict(self._times), _choices=dict(self._choices))

    def note(self, report: Report) -> None:
        """Learn from one measurement. O(1); the curve is fitted when next asked for."""
        key = report.nodes, report.replicas, report.servers, report.local
        told = report.step_s, report.sync_s
        old = self.seen.pop(key, told)
        times = self._times[key] = self._times.get(key, 0) + 1
        if old != told:
            part = max(FRESH, 1.0 / times)
            step_s, sync_s = (part * new + (1.0 - part) * before for new, before in zip(told, old, strict=True))
            told = (step_s, sync_s if min(told[1], old[1]) >= 0.0 else told[1])
        if times == 1 or old != told:
            self._curve = None
        self.seen[key] = told
        if len(self.seen) > KEPT:
            oldest = next(iter(self.seen))
            del self.seen[oldest], self._times[oldest]
        if report.noise != self.noise or report.batches != self.batches or self._curve is None:
            self._choices.clear()
            self.known = None
        self.noise, self.batches = report.noise, report.batches
        self.most_tried = max(self.most_tried[0], report.replicas), max(self.most_tried[1], report.servers)

    def passed(self, attempt: int, size: Size, step: int, total: int, now_ms: int) -> Pause | None:
        """Learn how far the job is. The pace is that since it has had so many replicas. Returns what the change to them
        took, once that can be told."""
        now = self._stretch
        if (now.attempt, now.size) != (attempt, size) or step < now.first_step:
            self._before, self._stretch, self.left_ms = now, Stretch(attempt, size, step, now_ms, step, now_ms), inf
            return None
        self._stretch = now = replace(now, step=step, at_ms=now_ms)
        if not now.step_ms:
            return None
        if total >= 0:
            self.left_ms = max(0, total - step) * now.step_ms
        before, self._before = self._before, Stretch()
        return _pause(before, now) if before.attempt else None

    def shown(self, attempt: int, size: Size) -> bool:
        """Whether the job has reported since it has had so many replicas."""
        return (self._stretch.attempt, self._stretch.size) == (attempt, size)

    def rate(self, nodes: int, replicas: int, servers: int = 0) -> float:
        """Units of progress a second at the best batch; 0 where no batch is possible."""
        return self.choose(nodes, replicas, servers)[0]

    def speedup(self, nodes: int, replicas: int, servers: int = 0) -> float:
        """Times the rate of one replica (with one server); the number of replicas while nothing was measured."""
        if not self.seen:
            return float(replicas)
        alone = self.rate(1, 1, min(1, servers))
        return self.rate(nodes, replicas, servers) / alone if alone > 0.0 else float(replicas)

    def choose(self, nodes: int, replicas: int, servers: int = 0) -> tuple[float, float, int]:
        """(rate, batch of one replica and pass, extra passes) at the batch that gives the most. O(batches tried)."""
        found = self._choices.get((nodes, replicas, servers))
        if found is None:
            if self._curve is None:
                self._curve = Curve.fit(self.seen, self.batches.initial == self.batches.largest)
            found = self._choices[nodes, replicas, servers] = self._best(self._curve, nodes, replicas, servers)
        return found

    def _best(self, curve: Curve, nodes: int, replicas: int, servers: int) -> tuple[float, float, int]:
        b = self.batches
        alike, steps = (1, replicas) if b.apart else (replicas, 1)  # parts of a step, steps at a time
        least = max(b.initial, b.local_least * alike)
        best = (0.0, 0.0, 0)
        if least > b.largest:
            return best
        ratio = (b.largest / least) ** (1.0 / (BATCHES_TRIED - 1))
        batch, together_s = least, curve.sync_s(nodes, replicas, servers)
        for _ in range(BATCHES_TRIED if ratio > 1.0 + TINY else 1):
            local, extra = b.split(batch, replicas)
            batch *= ratio
            if not b.local_least <= local <= b.local_most:
                continue
            compute_s = curve.compute.at(local)
            step_s = _joined(compute_s, together_s, curve.overlap) + extra * compute_s
            rate = steps * self.gain(local * alike * (extra + 1)) / max(TINY, step_s)
            if rate > best[0]:
                best = (rate, local, extra)
        return best

    def gain(self, batch: float) -> float:
        """Progress of one step at this batch, in steps at the initial one: at most `batch / initial`, less the less
        noise there is."""
        square, variance = self.noise
        scale = batch / self.batches.initial
        rest = variance / scale + square
        return (variance + square) / rest if rest > 0.0 else scale


def _pause(before: Stretch, after: Stretch) -> Pause | None:
    """Between two stretches: the time from one report to the next, less what the steps in between took. In place, the
    old replicas go on for most of that time, so that none of it counts which the slower of both paces accounts for.
    Steps that were lost and done again do not count either. None: the one did not become the other by a change."""
    in_place = after.attempt == before.attempt
    if after.attempt - before.attempt not in (0, 1) or (in_place and after.size == before.size):
        return None
    step_ms = max(before.step_ms, after.step_ms) if in_place else after.step_ms
    worked_ms = max(0, after.first_step - before.step) * step_ms
    return Pause(in_place, before.at_ms, max(0, round(after.first_at_ms - before.at_ms - worked_ms)))
