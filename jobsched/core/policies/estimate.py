"""How long jobs run, learned from those that ran before: survival tables per job family, kept up one job at a time.

Kaplan-Meier hazards in doubling buckets of run time: of the jobs that entered a bucket, how many ended in it. Jobs that
still run count for every bucket they have passed, so that long jobs teach before they end. Tables are nested (all jobs
> same GPUs > same family > same name > same campaign); each level starts from the one above as if it had seen some jobs
like that, so a family with few ends leans on its parents. A family is what a user runs again and again: queue, owner,
image, programs, GPUs. A campaign is a run of submissions of one family with short gaps: siblings of a sweep run alike.
Where jobs say how long they expect to run, tables of that habit (all jobs > same owner) hold the run times in parts of
what was expected: how far such guesses are off. What is known of such a job is the product of both. Reported progress,
where a job tells its total, replaces all of that; and where its like do, a job is worth a short run to hear it.

`Cluster` folds job events into its `Estimates`; orderings, backfill and answers ask. Learned from the past only.
Sources: Gittins 1979 for the index (as in Tiresias, NSDI'19); Kaplan & Meier 1958; Helios (SC'21) and 3Sigma
(EuroSys'18) for families.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from heapq import nlargest
from itertools import accumulate, pairwise, takewhile
from math import log2

from jobsched.core.job import Job, Phase
from jobsched.core.resources import JobId
from jobsched.spec.job import JobSpec

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
CAMPAIGN_GAP_MS = 600_000
REPORT_AFTER_MS = 60_000
"""A reported rate counts once it was measured over so long."""
PROBE_MS = 2 * REPORT_AFTER_MS
"""A job that is likely to report is let run so long to hear it."""
CENTRE = 8 * PER_DOUBLING + 0.5
EXPECTED_MS = round(BASE_MS * 2 ** (CENTRE / PER_DOUBLING))
"""Where tables of guessed run times have the guess: in the middle of a bucket, with room for a 256th of it and less."""
GUESS_STEPS = 4
"""Guesses are told apart in so many steps per doubling."""
REFRESH = 16
"""Curves follow a table once it saw so much more: a 16th."""

Key = tuple[object, ...]


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
    made: dict[int, _Made] = field(default_factory=dict, repr=False)
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
class _Made:
    """A curve, and what it was made from."""

    stamp: int
    """Editions of its levels and those of its guess."""
    asked_at: int
    """The version of the widest level when those were last looked at: nothing is learned that it does not see."""
    curve: Curve


def bucket_of(ran_ms: int) -> int:
    """The bucket that a job is in which ran so long."""
    return bisect_right(EDGES_MS, ran_ms) - 1 if ran_ms > 0 else 0


def ran_ms(job: Job, now_ms: int) -> int:
    """How long the job has run, all attempts together."""
    return job.ran_ms + (max(0, now_ms - job.running_since_ms) if job.phase is Phase.RUNNING else 0)


@dataclass(frozen=True, slots=True)
class Noted:
    """What `Estimates` had learned, as values; `live`: job, buckets passed, place of its campaign, where
    that is not what the rest implies."""

    tallies: tuple[tuple[Key, tuple[int, ...], tuple[int, ...]], ...] = ()
    campaigns: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    families: tuple[tuple[Key, int, int], ...] = ()
    """Family, its last submission, the place of the campaign that was of."""
    live: tuple[tuple[JobId, int, int], ...] = ()
    reports: tuple[tuple[Key, int, int], ...] = ()
    """How many jobs of a level told how far they are of how much, and how many did not."""


FAMILIES_NOTED = 5_000
"""Levels that are noted, those that saw most."""
KIN_KEPT = 10_000


@dataclass(slots=True)
class _Known:
    """A live job: its levels, widest first, and how many buckets it has passed."""

    levels: tuple[Tally, ...]
    habits: tuple[Tally, ...] = ()
    """The same for its guess; none: it did not guess."""
    guess: int = 0
    """The guess, in steps."""
    passed: int = 0
    told: bool = False


@dataclass(slots=True)
class _Report:
    """Progress of one attempt: first and latest report."""

    attempt: int
    first_step: int
    first_at_ms: int
    step: int
    at_ms: int
    total: int
    earlier_pace: float = 0.0
    """Milliseconds a step in the attempt before; 0: not known."""

    def pace(self) -> float:
        """Milliseconds a step; 0: not known yet."""
        steps, took_ms = self.step - self.first_step, self.at_ms - self.first_at_ms
        return took_ms / steps if steps > 0 and took_ms >= REPORT_AFTER_MS else self.earlier_pace


@dataclass(slots=True)
class Estimates:
    """All that was learned. Every method costs O(buckets) at most, but `curve` after news: O(buckets squared)."""

    _tallies: dict[Key, Tally] = field(default_factory=dict)
    _live: dict[JobId, _Known] = field(default_factory=dict)
    _campaigns: dict[Key, tuple[int, Tally]] = field(default_factory=dict)
    """Family -> (its last submission, the campaign that was of)."""
    _reports: dict[JobId, _Report] = field(default_factory=dict)
    _begun: int = 0
    """Campaigns so far."""
    _learns: bool = True
    _recalled: dict[JobId, tuple[int, Tally]] = field(default_factory=dict)
    """Jobs that lived when this was noted: buckets passed, campaign."""
    _kin_of: dict[tuple[int, str], tuple[JobSpec, Key, tuple[Tally, ...]]] = field(default_factory=dict)
    """By identity of the spec, which is kept alive, and owner."""

    def noted(self, now_ms: int) -> Noted:
        """What was learned so far; of campaigns, those that go on. O(families + live jobs)."""
        most = nlargest(FAMILIES_NOTED, self._tallies.items(), key=lambda item: item[1].version)
        going = [
            (family, last_ms, tally) for family, (last_ms, tally) in self._campaigns.items()
            if now_ms - last_ms <= CAMPAIGN_GAP_MS
        ]  # fmt: skip
        campaigns: dict[int, Tally] = {id(tally): tally for _, _, tally in going}
        taught = {
            job_id: known for job_id, known in self._live.items()
            if known.passed or known.levels[-1].version or id(known.levels[-1]) not in campaigns
        }  # fmt: skip
        campaigns |= {id(known.levels[-1]): known.levels[-1] for known in taught.values()}
        place = {key: at for at, key in enumerate(campaigns)}
        return Noted(
            tuple((key, tuple(tally.entered), tuple(tally.ended)) for key, tally in most),
            tuple((tuple(t.entered), tuple(t.ended)) if t.version else ((), ()) for t in campaigns.values()),
            tuple((family, last_ms, place[id(tally)]) for family, last_ms, tally in going),
            tuple((job_id, known.passed, place[id(known.levels[-1])]) for job_id, known in taught.items()),
            tuple((key, tally.told, tally.silent) for key, tally in most if tally.told or tally.silent),
        )

    @classmethod
    def of(cls, noted: Noted) -> Estimates:
        """As it was when that was noted. What came since is to be told: jobs that live, jobs that ended."""
        tallies = {as_key(key): _tally(entered, ended) for key, entered, ended in noted.tallies}
        for key, told, silent in noted.reports:
            if (tally := tallies.get(as_key(key))) is not None:
                tally.told, tally.silent = told, silent
        campaigns = [_tally(*each) for each in noted.campaigns]
        for number, campaign in enumerate(campaigns):
            campaign.number = number
        families = {as_key(family): (last_ms, campaigns[at]) for family, last_ms, at in noted.families}
        found = cls(tallies, {}, families, {}, len(campaigns))
        found._recalled = {job_id: (passed, campaigns[at]) for job_id, passed, at in noted.live}
        return found

    def as_they_are(self, job_ids: Iterable[JobId]) -> Estimates:
        """What is known of these jobs and of whatever is like them, for copies of a cluster: nothing that happens there
        is learned from. O(jobs named)."""
        live = {job_id: self._live[job_id] for job_id in job_ids if job_id in self._live}
        return Estimates(self._tallies, live, self._campaigns, self._reports, self._begun, _learns=False)

    # ---- learning ----

    def submitted(self, job: Job) -> None:
        """A job came."""
        if job.id not in self._live:
            passed, campaign = self._recalled.pop(job.id, (0, None))
            levels = self._levels(job, campaign)
            known = self._live[job.id] = _Known(levels, passed=passed)
            if guess_ms := job.spec.expected:
                known.habits = self._tables((("guess",), ("guess", job.spec.queue, job.owner)))
                known.guess = max(1, round(GUESS_STEPS * log2(max(2, guess_ms))))

    def _levels(self, job: Job, campaign: Tally | None) -> tuple[Tally, ...]:
        kin = self._kin_of.get((id(job.spec), job.owner)) if self._learns and not job.wanted else None
        _, family, tables = kin or self._kin(job)
        return (*tables, campaign if campaign is not None else self._campaign(family, job))

    def _kin(self, job: Job) -> tuple[JobSpec, Key, tuple[Tally, ...]]:
        """Its family and the tables of whatever it belongs to; looked up once for those who share spec and owner."""
        family = family_of(job)
        name = _COUNTER.sub("", str(job.spec.name)) if job.spec.name else ""
        found = (job.spec, family, self._tables(((), (family[-1],), family, (*family, name))))
        if self._learns and not job.wanted:
            if len(self._kin_of) >= KIN_KEPT:
                self._kin_of.clear()
            self._kin_of[id(job.spec), job.owner] = found
        return found

    def _tables(self, keys: Sequence[Key]) -> tuple[Tally, ...]:
        tallies = self._tallies
        if not self._learns:
            return tuple([tallies.get(key) or Tally() for key in keys])
        return tuple([tallies.get(key) or tallies.setdefault(key, Tally()) for key in keys])

    def _campaign(self, family: Key, job: Job) -> Tally:
        last_ms, campaign = self._campaigns.get(family, (0, None))
        if campaign is None or job.submitted_at_ms - last_ms > CAMPAIGN_GAP_MS:
            self._begun += 1
            campaign = Tally(number=self._begun)
        if self._learns:
            self._campaigns[family] = (max(last_ms, job.submitted_at_ms), campaign)
        return campaign

    def ran(self, job: Job, for_ms: int) -> None:
        """A live job has run so long and goes on."""
        known = self._live.get(job.id)
        if known is None or not self._learns:
            return
        bucket = bucket_of(for_ms)
        if bucket > known.passed:
            for tally in known.levels:
                tally.add(known.passed, bucket, ends=False)
            if known.habits:
                first, last = _parts(job, EDGES_MS[known.passed]), _parts(job, EDGES_MS[bucket])
                for tally in known.habits:
                    tally.add(first, last, ends=False)
            known.passed = bucket

    def ended(self, job: Job) -> None:
        """A job ended, however it did; one that never ran teaches nothing."""
        if not self._learns:
            return
        self._reports.pop(job.id, None)
        known = self._live.pop(job.id, None)
        if known is not None and job.ran_ms > 0:
            bucket, silent = bucket_of(job.ran_ms), not known.told and job.ran_ms >= PROBE_MS
            for tally in known.levels:
                tally.add(known.passed, bucket, ends=True)
                tally.silent += silent
            for tally in known.habits:
                tally.add(_parts(job, EDGES_MS[known.passed]), _parts(job, job.ran_ms), ends=True)

    def learn(self, jobs: Iterable[Job]) -> None:
        """What ended before a leader began, oldest first."""
        for job in jobs:
            self.submitted(job)
            self.ended(job)

    def reported(self, job: Job, step: int, total: int, at_ms: int) -> bool:
        """A running job told how far it is; whether that makes its time to the end known for the first time."""
        report, known = self._reports.get(job.id), self._live.get(job.id)
        if known is not None and not known.told:
            known.told = True
            for tally in known.levels:
                tally.told += 1
        if report is None or report.attempt != job.attempt or step < report.first_step:
            pace = report.pace() if report is not None else 0.0
            self._reports[job.id] = _Report(job.attempt, step, at_ms, step, at_ms, total, pace)
            return False
        before = report.pace()
        report.step, report.at_ms, report.total = step, at_ms, total
        return not before and report.pace() > 0

    # ---- answers ----

    def step_ms(self, job: Job) -> float:
        """Milliseconds a step in the present attempt, as reported; 0: not known yet."""
        report = self._reports.get(job.id)
        return replace(report, earlier_pace=0.0).pace() if report and report.attempt == job.attempt else 0.0

    def outlook(self, job: Job) -> tuple[int, ...]:
        """Equal for waiting jobs of which the same is expected; `Policy.rank` orders those that told something of
        their own."""
        known = self._live.get(job.id)
        if known is None or self.reported_left_ms(job, 0) is not None:
            return ()
        return (known.levels[-1].number, known.guess, bucket_of(job.ran_ms))

    def will_report(self, job: Job) -> bool:
        """Whether the job's like usually report how far they are of how much."""
        known = self._live.get(job.id)
        likely = 0.0
        for tally in known.levels if known is not None and known.levels[0].told else ():
            likely = (tally.told + likely) / (tally.told + tally.silent + 1)
        return likely > 0.5

    def curve(self, job: Job) -> Curve:
        """What is known of this job's run time."""
        known = self._live.get(job.id)
        levels = known.levels if known is not None else (self._tallies.get(()) or Tally(),)
        habits, guess = (known.habits, known.guess) if known is not None else ((), 0)
        made = levels[-1].made.get(guess)
        if made is not None and made.asked_at == levels[0].version:
            return made.curve
        stamp = sum([tally.edition for tally in (*levels, *habits)])
        if made is not None and made.stamp == stamp:
            made.asked_at = levels[0].version
            return made.curve
        hazard = _nested(levels, TRUST, _PRIOR)
        if guess:
            of_all, of_guess = _nested(levels[:1], TRUST, _PRIOR), _nested(habits, HABIT_TRUST, _HABIT_PRIOR)
            hazard = _product(hazard, of_all, of_guess, guess)
        curve = Curve(tuple(hazard), sum(levels[2].ended) if len(levels) > 2 else 0)
        levels[-1].made[guess] = _Made(stamp, levels[0].version, curve)
        return curve

    def reported_left_ms(self, job: Job, now_ms: int) -> int | None:
        """Time to the end at the reported rate; None before enough was reported."""
        report = self._reports.get(job.id)
        if report is None or report.total <= 0 or not (pace := report.pace()):
            return None
        left = round(max(0, report.total - report.step) * pace)
        since_ms = max(report.at_ms, job.running_since_ms)
        return max(1, left - (now_ms - since_ms if job.phase is Phase.RUNNING else 0))

    def promise(self, job: Job, ran: int) -> tuple[float, int]:
        """Ends per millisecond when a job that ran so long is given the best quantum, and the run time at which that
        is over (0: never). One that runs keeps what it promised when it was let in until that quantum is over."""
        (rates, ends), bucket = self.curve(job).index, bucket_of(ran)
        best = bucket
        if job.phase is not Phase.QUEUED:
            for k in range(bucket_of(job.ran_ms), bucket):
                if ends[k] > bucket and rates[k] >= rates[best]:
                    best = k
        return rates[best], EDGES_MS[ends[best]] if ends[best] < BUCKETS else 0

    def left_ms(self, job: Job, now_ms: int, quantile: float = 0.5) -> int:
        """Time to the end: by reported progress, else by that quantile of its family, else by its time limit; never
        longer than the limit allows."""
        limit = job.spec.time_limit
        ran = ran_ms(job, now_ms)
        left = self.reported_left_ms(job, now_ms)
        if left is None:
            curve = self.curve(job)
            tells_nothing = limit and not curve.seen and not job.spec.expected
            left = limit - ran if tells_nothing else curve.left_ms(ran, quantile)
        return max(1, min(left, limit - ran) if limit else left)

    def source(self, job: Job, now_ms: int) -> str:
        """What `left_ms` goes by: reported "progress", run times of "like" jobs, the time "limit"; "": it guesses."""
        if self.reported_left_ms(job, now_ms) is not None:
            return "progress"
        return "like" if self.seen(job) else "limit" if job.spec.time_limit else ""

    def mean_left_ms(self, job: Job) -> int:
        """Expected run time of one that has not run, never longer than its time limit."""
        mean = self.curve(job).mean_left_ms(job.ran_ms)
        return min(mean, job.spec.time_limit) if job.spec.time_limit else mean

    def seen(self, job: Job) -> int:
        """Ended jobs of the job's family."""
        return self.curve(job).seen


def _tally(entered: Sequence[int], ended: Sequence[int]) -> Tally:
    if not entered:
        return Tally()
    steps = [more - less for less, more in pairwise((0, *entered, 0))]
    return Tally(steps, list(ended), version=sum(entered))


def as_key(key: Sequence[object]) -> Key:
    """A key as it was before it was written down as lists."""
    return tuple(as_key(part) if isinstance(part, (list, tuple)) else part for part in key)


def _parts(job: Job, ms: int) -> int:
    """The bucket of a run time in the tables of guessed ones."""
    return bucket_of(ms * EXPECTED_MS // job.spec.expected)


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


def gpus_milli(job: Job) -> int:
    """GPUs that the job wants, in thousandths."""
    gpus, wanted = 0, job.wanted
    for name, role in job.spec.roles.items():
        if (gpu := role.gpu) is not None:
            gpus += gpu.milli * (wanted.get(name, role.replicas.prefer) if wanted else role.replicas.prefer)
    return gpus


_COUNTER = re.compile(r"[-_.]?[0-9a-f]*[0-9]+[0-9a-f]*$")
"""What tells the runs of one name apart; names that the server makes up end in digits too."""


def family_of(job: Job) -> Key:
    """What the job has in common with its like; its GPUs come last."""
    spec = job.spec
    runs = tuple([(name, role.image, _program(role.command)) for name, role in spec.roles.items()])
    return (spec.queue, job.owner, spec.image, runs, gpus_milli(job))


@lru_cache(maxsize=10_000)
def _program(command: tuple[str, ...] | str) -> str:
    """`python train.py` of `python train.py --lr 0.1`: a sweep's members differ in what follows."""
    words = command.split() if isinstance(command, str) else command
    return " ".join(takewhile(lambda word: not word.startswith("-"), words))
