"""Survival tables and what they say of a run time: hazards in doubling buckets, quantiles, the Gittins index.

Sources: Kaplan & Meier 1958 for hazards; Gittins 1979 for the index (as in Tiresias, NSDI'19).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import log2

BASE_MS = 60_000
PER_DOUBLING = 2
EDGES_MS = (0, *(round(BASE_MS * 2 ** (k / PER_DOUBLING)) for k in range(16 * PER_DOUBLING + 1)))
"""Where buckets of run time begin: 0, 1 min, 85 s, 2 min, … 45 days; the last is open."""
BUCKETS = len(EDGES_MS)
_ENDS_MS = (*EDGES_MS[1:], 2 * EDGES_MS[-1])
PRIOR_HAZARD = 1 - 0.5 ** (1 / PER_DOUBLING)
"""Before anything was seen: half of those that ran so long end before they have run twice as long (Pareto, as Harchol-
Balter & Downey 1997 measured of Unix processes)."""
TRUST = (2.0, 10.0, 5.0, 3.0, 1.5)
"""As if so many jobs like the level above had been seen, for all jobs, same GPUs, family, name, campaign."""
HABIT_TRUST = (2.0, 10.0)
"""The same for guesses: of all jobs, of the same owner."""
NEVER = 1e-9
"""No run time is impossible."""
CENTRE = 8 * PER_DOUBLING + 0.5
EXPECTED_MS = round(BASE_MS * 2 ** (CENTRE / PER_DOUBLING))
"""Where tables of guessed run times have the guess: in the middle of a bucket, with room for a 256th of it and less."""
GUESS_STEPS = 4
"""Guesses are told apart in so many steps per doubling."""
REFRESH = 16
"""Curves follow a table once it saw so much more: a 16th."""


@dataclass(slots=True, eq=False)
class Tally:
    """What one level has seen: per bucket, jobs that entered it and jobs that ended in it."""

    steps: list[int] = field(default_factory=lambda: [0] * (BUCKETS + 1))
    """How `entered` differs from the bucket before: however far a job came, it counts in two places."""
    ended: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    version: int = 0
    edition: int = 0
    """Counts up when enough was seen to look at it again."""
    due: int = 0
    """The version at which it does."""
    made: dict[int, Made] = field(default_factory=dict, repr=False)
    """The curves of jobs whose last level this is by what they guess (0: nothing)."""
    number: int = 0
    """Of a campaign: counts up."""
    told: int = 0
    """Jobs that reported how far they are of how much."""
    silent: int = 0
    """Jobs that ran long enough for that, and did not."""

    def add(self, first: int, bucket: int, ends: bool) -> None:
        """A job has passed buckets `first`..`bucket`-1, and ended in `bucket` or not."""
        self.version += 1
        if self.version >= self.due:
            self.edition += 1
            self.due = self.version + max(1, self.version // REFRESH)
        self.steps[first] += 1
        self.steps[bucket + ends] -= 1
        if ends:
            self.ended[bucket] += 1

    @property
    def entered(self) -> list[int]:
        return list(accumulate(self.steps[:-1]))


@dataclass(slots=True, eq=False)
class Curve:
    """What is known of the run time of a job: hazards per bucket, and from each bucket the Gittins index."""

    hazard: tuple[float, ...]
    seen: int
    """Ended jobs of its own family."""
    _whole: dict[float, int] = field(default_factory=dict, repr=False)
    """Quantile -> run time of those that have not run, once asked for."""
    _index: tuple[tuple[float, ...], tuple[int, ...]] | None = field(default=None, repr=False)

    @property
    def index(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """From each bucket, ends per millisecond when it runs on for the best quantum; and the bucket before which that
        quantum ends. Reckoned when first asked for."""
        if self._index is None:
            self._index = _gittins(self.hazard)
        return self._index

    def left_ms(self, ran_ms: int, quantile: float) -> int:
        """Such a share of the jobs that ran so long end within this time; linear within a bucket."""
        if ran_ms > 0:
            return self._left_ms(ran_ms, quantile)
        if quantile not in self._whole:
            self._whole[quantile] = self._left_ms(0, quantile)
        return self._whole[quantile]

    def _left_ms(self, ran_ms: int, quantile: float) -> int:
        bucket = bucket_of(ran_ms)
        survive, at_ms = 1.0, ran_ms
        while True:
            end_ms = _ENDS_MS[bucket]
            # hazard of what is left of the bucket, as if ends were spread evenly over it
            part = (end_ms - at_ms) / (end_ms - EDGES_MS[bucket])
            hazard = self.hazard[bucket]
            hazard = hazard * part / (1 - hazard * (1 - part))
            if survive * (1 - hazard) <= 1 - quantile or bucket == BUCKETS - 1:
                share = 1.0 if hazard <= 0 else min(1.0, (1 - (1 - quantile) / survive) / hazard)
                return round(at_ms + share * (end_ms - at_ms)) - ran_ms
            survive *= 1 - hazard
            at_ms, bucket = end_ms, bucket + 1

    def mean_left_ms(self, ran_ms: int) -> int:
        """Expected time to the end of one that ran so long. What ran past the last bucket is not looked at."""
        bucket = bucket_of(ran_ms)
        survive, at_ms, total = 1.0, ran_ms, 0.0
        for k in range(bucket, BUCKETS):
            part = (_ENDS_MS[k] - at_ms) / (_ENDS_MS[k] - EDGES_MS[k])
            hazard = self.hazard[k] * part / (1 - self.hazard[k] * (1 - part))
            total += survive * (1 - hazard / 2) * (_ENDS_MS[k] - at_ms)
            survive *= 1 - hazard
            at_ms = _ENDS_MS[k]
        return max(1, round(total))


@dataclass(slots=True, eq=False)
class Made:
    """A curve, and what it was made from."""

    stamp: int
    """Editions of its levels and those of its guess."""
    asked_at: int
    """The version of the widest level when those were last looked at: nothing is learned that it does not see."""
    curve: Curve


def bucket_of(ran_ms: int) -> int:
    """The bucket that a job is in which ran so long."""
    return bisect_right(EDGES_MS, ran_ms) - 1 if ran_ms > 0 else 0


def hazards(levels: Sequence[Tally], habits: Sequence[Tally], guess: int) -> tuple[float, ...]:
    """What is known of a job by its levels, widest first, and by its guess, if it made one (0: none)."""
    hazard = _nested(levels, TRUST, _PRIOR)
    if guess:
        of_all, of_guess = _nested(levels[:1], TRUST, _PRIOR), _nested(habits, HABIT_TRUST, _HABIT_PRIOR)
        hazard = _product(hazard, of_all, of_guess, guess)
    return tuple(hazard)


def _nested(levels: Sequence[Tally], trusts: Sequence[float], prior: Sequence[float]) -> Sequence[float]:
    """Hazards of the last level, each starting from the one above."""
    hazard = prior
    for tally, trust in zip(levels, trusts, strict=False):
        if tally.version:
            ended, entered = tally.ended, tally.entered
            hazard = [(ended[k] + trust * hazard[k]) / (entered[k] + trust) for k in range(BUCKETS)]
    return hazard


def _survival(hazard: Sequence[float]) -> list[float]:
    """The share that enters each bucket; none is left after the last."""
    survive = [1.0]
    for h in hazard[:-1]:
        survive.append(survive[-1] * (1 - h))
    return [*survive, 0.0]


def _product(
    hazard: Sequence[float], of_all: Sequence[float], of_guess: Sequence[float], guess: int
) -> Sequence[float]:
    """Hazards of a job by its levels, of all jobs, and by its guess in parts of that -> of a job of which both are
    known: what the guess says, times what its like are beyond all jobs (Bayes, where how far a guess is off does not
    depend on who makes it)."""
    like, everybody, guessed = _survival(hazard), _survival(of_all), _survival(of_guess)
    shift = CENTRE + PER_DOUBLING * (log2(BASE_MS) - guess / GUESS_STEPS)

    def later(k: int) -> float:
        """The share of such guesses after which a job runs on to bucket `k`."""
        at = k + shift
        if k == 0 or at >= BUCKETS:
            return 0.0 if k else 1.0
        if at <= 1:  # the first bucket begins at nothing
            return 1.0 + 2 ** ((at - 1) / PER_DOUBLING) * (guessed[1] - 1.0)
        whole = int(at)
        return guessed[whole] + (at - whole) * (guessed[whole + 1] - guessed[whole])

    left = [later(k) for k in range(BUCKETS)] + [0.0]
    # who ends late in a bucket could have ended in the next
    like, everybody = _smooth(like), _smooth(everybody)
    mass = [(left[k] - left[k + 1] + NEVER) * (like[k] + NEVER) / (everybody[k] + NEVER) for k in range(BUCKETS)]
    rest, found = 0.0, []
    for each in reversed(mass):
        rest += each
        found.append(each / rest)
    found.reverse()
    return [*found[:-1], hazard[-1]]


def _smooth(survive: Sequence[float]) -> list[float]:
    """The share that ends in each bucket or near it."""
    ends = [0.0, *(early - late for early, late in pairwise(survive)), 0.0]
    return [(ends[k - 1] + 2 * ends[k] + ends[k + 1]) / 4 for k in range(1, BUCKETS + 1)]


def _decaying() -> tuple[float, ...]:
    """Hazards of guesses before any was seen: half of what is off is off by less than twice, either way."""
    mass = [2.0 ** (-abs(k - CENTRE - 0.5) / PER_DOUBLING) for k in range(BUCKETS)]
    return tuple([mass[k] / sum(mass[k:]) for k in range(BUCKETS - 1)] + [PRIOR_HAZARD])


_PRIOR = (0.5, *(PRIOR_HAZARD,) * (BUCKETS - 1))
_HABIT_PRIOR = _decaying()


def _gittins(hazard: Sequence[float]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The Gittins index from each bucket: the most ends per time over all quanta that stop at a bucket's end; and where
    that is."""
    survive = [1.0]
    for h in hazard:
        survive.append(survive[-1] * (1 - h))
    area = [
        (_ENDS_MS[k] - EDGES_MS[k]) * (survive[k] + survive[k + 1]) / 2 for k in range(BUCKETS)
    ]
    rate, until = [], []
    for k in range(BUCKETS):
        best, bound, spent = 0.0, k + 1, 0.0
        for m in range(k, BUCKETS):
            spent += area[m]
            found = (survive[k] - survive[m + 1]) / spent if spent > 0 else 0.0
            if found > best * (1 + 1e-9):
                best, bound = found, m + 1
        rate.append(best)
        until.append(bound)
    return tuple(rate), tuple(until)
