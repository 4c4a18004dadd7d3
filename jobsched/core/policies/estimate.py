"""How long jobs run, learned from those that ran before: survival tables per job family, kept up one job at a time.

Kaplan-Meier hazards in doubling buckets of run time: of the jobs that entered a bucket, how many ended in it. Jobs that
still run count for every bucket they have passed, so that long jobs teach before they end. Tables are nested (all jobs
> same GPUs > same family > same name > same campaign); each level starts from the one above as if it had seen some jobs
like that, so a family with few ends leans on its parents. A family is what a user runs again and again: queue, owner,
image, programs, GPUs. A campaign is a run of submissions of one family with short gaps: siblings of a sweep run alike.
Where jobs say how long they expect to run, tables of that habit (all jobs > same owner) hold the run times in parts of
what was expected: how far such guesses are off. What is known of such a job is the product of both. Reported progress,
where a job tells its total, replaces all of that; and where its like do, a job is worth a short run to hear it.

`Cluster` folds job events into its `Estimates`; orderings, backfill and answers ask. Learned from the past only. The
tables are in `survival.py`, who is alike in `families.py`. Sources: those of `survival.py`; Helios (SC'21) and 3Sigma
(EuroSys'18) for families.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest
from itertools import pairwise
from math import log2

from jobsched.core.job import Job, Phase
from jobsched.core.policies.families import Key, as_key, family_of, unnumbered
from jobsched.core.policies.survival import (
    BUCKETS,
    EDGES_MS,
    EXPECTED_MS,
    GUESS_STEPS,
    Curve,
    Made,
    Tally,
    bucket_of,
    hazards,
)
from jobsched.core.resources import JobId
from jobsched.spec.job import JobSpec

CAMPAIGN_GAP_MS = 600_000
REPORT_AFTER_MS = 60_000
"""A reported rate counts once it was measured over so long."""
PROBE_MS = 2 * REPORT_AFTER_MS
"""A job that is likely to report is let run so long to hear it."""


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
        name = unnumbered(str(job.spec.name)) if job.spec.name else ""
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
                if silent:
                    tally.silent += 1
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
        curve = Curve(hazards(levels, habits, guess), sum(levels[2].ended) if len(levels) > 2 else 0)
        levels[-1].made[guess] = Made(stamp, levels[0].version, curve)
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


def _parts(job: Job, ms: int) -> int:
    """The bucket of a run time in the tables of guessed ones."""
    return bucket_of(ms * EXPECTED_MS // job.spec.expected)
