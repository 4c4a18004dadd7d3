"""When a waiting job starts: the real passes on a copy of the cluster, from the end of one job to the next.

Asked by `why` and `plan`, on the thread of whoever asks. Run times are those of `policies.estimate`; when nobody can
tell how long a job runs that stands in the way, neither can this, and it says which job that is. Who leaves may be gone
at once, or take all the time that it has to save. Where very many go first, the first `AHEAD` of them are played, and
the rest is taken to go on at their pace. Jobs that are yet to be submitted, nodes that come and failures are not
foreseen. Bounded by `AHEAD` jobs, `ENDS` ends.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.converge import stop_grace_ms
from jobsched.core.job import Job, Outcome, Phase, Reason, ReplicaState, Shape
from jobsched.core.lines import Line, LineKey, Place
from jobsched.core.passes import Policy
from jobsched.core.plan import Forecast
from jobsched.core.policies.families import gpus_milli
from jobsched.core.policies.ordering import Ordering, OrderKey, multifactor
from jobsched.core.rehearsal import Picture, picture_of
from jobsched.core.resources import JobId
from jobsched.core.schedule import schedule

LIKELY, SURE = 0.5, 0.9
"""Quantiles of run times behind the two ends of a band. All jobs of a play are taken to be as slow as that at once, as
what is learned of them errs alike: with draws of each by itself, four in ten started by the end that claims nine."""
AHEAD, ENDS = 200, 400
SAMPLE = 100
"""Jobs beyond `AHEAD` whose work is looked at; the others are taken to be like them."""
LOOKS = 100_000
"""Jobs that run times how often a pass is made, in one forecast: what it may cost."""
ENDLESS = "may run for ever: no time_limit, no total reported, and no job like it has ended yet"
PASSES = 4
"""At one instant: room is made, and used."""
WORTH_MS = 60_000
"""A change of the request is told of when the job starts sooner by so much, and by a tenth of its wait."""


def picture_for(cluster: Cluster, job: Job, now_ms: int, policy: Policy) -> Picture | None:
    """The cluster with the job, which waits or is only thought of, and everybody who goes first: of its own queue the
    first `AHEAD`, and of the rest a sample. With fair shares, as many of each other queue go first by its weight. None
    when those are too many. O(what runs + nodes + lines)."""
    if policy.factors is not None:
        policy = replace(policy, ordering=multifactor(cluster, now_ms, policy.factors))
    order = policy.ordering
    mine = LineKey(job.spec.queue, job.priority, cluster.shape(job), job.array_id)
    key = order(mine, Place(cluster.rank(job, cluster.estimates), job.submitted_at_ms, job.id))
    before = _before(cluster, job.spec.queue, order, key)
    own = list(_first(before, order, AHEAD + 1))
    beyond: list[JobId] = []
    if len(own) > AHEAD:
        key, _ = own.pop()  # who goes first of other queues is told by the first of its own
        beyond = list(_some(before, SAMPLE, {job_id for _, job_id in own}))
    found = [job_id for _, job_id in own] + ([job.id] if job.id in cluster.jobs else [])
    weight = max(1, cluster.quotas.account(job.spec.queue).weight)
    for queue in cluster.lines.of_queue:
        if queue == job.spec.queue:
            continue
        if policy.fair is None:
            rivals, most = _before(cluster, queue, order, key, mine.shape), AHEAD + 1
        else:
            most = -(-(len(own) + 1) * cluster.quotas.account(queue).weight // weight)
            rivals = _before(cluster, queue, order, None, mine.shape)
        found += [job_id for _, job_id in _first(rivals, order, most)]
        if len(found) > 2 * AHEAD:
            return None
    parked = [job_id for _, job_id in cluster.parked[:AHEAD] if job_id in cluster.jobs]
    count = sum(n for _, n in before) - len(own) if beyond else 0
    picture = picture_of(cluster, [*found, *parked], beyond, count)
    return picture if job.id in cluster.jobs else replace(picture, jobs=(*picture.jobs, job))


def time_left(cluster: Cluster, job: Job, now_ms: int) -> tuple[int, int] | None:
    """Milliseconds that a job has yet to run, by the two quantiles of a band: (0, most) where only its time limit is
    known; None: nobody can tell."""
    estimates = cluster.estimates
    if job.id not in cluster.jobs:  # only thought of
        estimates = estimates.as_they_are(())
        estimates.submitted(job)
    source = estimates.source(job, now_ms)
    if not source and not job.spec.expected:
        return None
    known = source != "limit" or job.spec.expected
    return estimates.left_ms(job, now_ms, LIKELY) if known else 0, estimates.left_ms(job, now_ms, SURE)


def _before(
    cluster: Cluster, queue: str, order: Ordering, key: OrderKey | None, beside: Shape | None = None
) -> list[tuple[Line, int]]:
    """The lines of a queue, and how many of each go before a place in the order (None: all); only those that may be in
    the way of who wants to be `beside` them. O(lines * log places)."""
    found = []
    for line in cluster.lines.of_queue.get(queue, {}).values():
        if beside is not None and _apart(line.key.shape, beside):
            continue
        count = len(line.places)
        if key is not None:
            count = bisect_left(line.places, key, key=partial(order, line.key))
        if count:
            found.append((line, count))
    return found


def _first(before: Sequence[tuple[Line, int]], order: Ordering, most: int) -> Iterator[tuple[OrderKey, JobId]]:
    """The first so many of these, all lines together."""

    def each(line: Line, count: int) -> Iterator[tuple[OrderKey, JobId]]:
        return ((order(line.key, place), place.job_id) for place in islice(line.places, count))

    return islice(heapq.merge(*(each(line, count) for line, count in before)), most)


def _some(before: Sequence[tuple[Line, int]], most: int, without: Collection[JobId]) -> Iterator[JobId]:
    """About so many of the others, evenly chosen; all of them where they are few."""
    stride, at = max(1, (sum(count for _, count in before) - len(without)) // most), 0
    for line, count in before:
        ids = (line.places[index].job_id for index in range(-at % stride, count, stride))
        yield from (job_id for job_id in ids if job_id not in without)
        at += count


def _apart(one: Shape, other: Shape) -> bool:
    """Whether no node will do for both, as they ask for different values of one label."""
    wanted = dict(one.node_labels)
    return any(wanted.get(name, value) != value for name, value in other.node_labels)


def forecast(
    picture: Picture, job_id: JobId, now_ms: int, policy: Policy, instead: Job | None = None
) -> Forecast:
    """When a waiting job of the picture starts; as if it were `instead`."""
    quiet = replace(policy, elastic=None, defragmentation=None, health=None, node_pools=(), pass_every_ms=0)
    found: list[_Play] = []
    for quantile in (LIKELY, SURE):
        twin = picture.cluster({job_id: instead} if instead is not None else None)
        play = _Play(twin, job_id, now_ms, quiet, quantile)
        play.run(picture.beyond, picture.beyond_count)
        found.append(play)
    by = tuple(dict.fromkeys(source for play in found for source in play.by))
    late = max((play.started_ms for play in found if play.started_ms), default=0)
    if any(not play.started_ms for play in found):
        return Forecast(by=by, unknown=next(play.why_not for play in found if not play.started_ms))
    return Forecast(min(play.started_ms for play in found), late, by)


class _Play:
    """One run of the copy, until the job starts."""

    def __init__(self, twin: Cluster, job_id: JobId, now_ms: int, policy: Policy, quantile: float) -> None:
        self._twin, self._job_id, self._now_ms, self._policy, self._quantile = twin, job_id, now_ms, policy, quantile
        self._ends: list[tuple[int, JobId, int]] = []
        """Heap of (when, job, attempt)."""
        self._leaves: dict[JobId, int] = {}
        """Jobs that leave, or some replicas of theirs, and when they are gone."""
        self._endless: dict[JobId, None] = {}
        """Jobs of which nobody can tell when they end."""
        self._began_ms, self._moved_ms = now_ms, now_ms
        """When the play began, and when something last was decided or ended in it."""
        self.started_ms = 0
        self.by: dict[str, None] = {}
        self.why_not = ""

    def run(self, beyond: Sequence[Job], count: int) -> None:
        """`beyond`: some of as many jobs that go first as well, but are not in the copy."""
        twin, looks = self._twin, 0
        self._see_off()
        for job in list(twin.jobs.values()):
            if job.phase.runs:
                self._expect(job)
        yet_to_do = self._yet_to_do() if beyond else 0
        for _ in range(ENDS):
            if self._pass():
                self.started_ms = self._now_ms
                if beyond:
                    self._go_on(yet_to_do - self._yet_to_do(), beyond, count)
                return
            looks += len(twin.jobs)
            if looks > LOOKS:
                break
            if not self._advance():
                self.why_not = self._who_stays()
                return
        self.why_not = "too many jobs run and end before it"

    def _yet_to_do(self) -> int:
        """GPU time that is left to be done in the job's queue by the others, in thousandths, as far as can be told."""
        twin, now_ms = self._twin, self._now_ms
        queue = twin.jobs[self._job_id].spec.queue
        ends = {job_id: at_ms for at_ms, job_id, attempt in self._ends if self._runs(job_id, attempt)}
        total = 0
        for job in twin.jobs.values():
            if job.spec.queue != queue or job.id == self._job_id:
                continue
            if job.phase is Phase.QUEUED and twin.estimates.source(job, now_ms):
                total += max(1, gpus_milli(job)) * twin.estimates.left_ms(job, now_ms, self._quantile)
            elif job.id in ends:
                total += max(1, gpus_milli(job)) * (ends[job.id] - now_ms)
        return total

    def _go_on(self, done: int, beyond: Sequence[Job], count: int) -> None:
        """It starts later by the time in which the work of those beyond is done, at the pace so far."""
        estimates, now_ms = self._twin.estimates, self._now_ms
        unknown = next((job.name for job in beyond if not estimates.source(job, now_ms)), "")
        if unknown or done <= 0:
            self.started_ms = 0
            self.why_not = f"{unknown} goes first and {ENDLESS}" if unknown else "those before it do not get on"
            return
        rest = sum(max(1, gpus_milli(job)) * estimates.left_ms(job, now_ms, self._quantile) for job in beyond)
        self.started_ms += (now_ms - self._began_ms) * rest * count // len(beyond) // done
        self.by["pace"] = None

    def _see_off(self) -> None:
        """Who leaves is gone at once where that is as likely as not; to be sure, at the end of its grace."""
        twin, now_ms, known = self._twin, self._now_ms, self._leaves
        self._leaves = {}
        for job_id in list(twin.leaving):
            job, gone_ms = twin.jobs[job_id], now_ms
            if self._quantile > LIKELY:
                if job.phase is Phase.STOPPING:
                    gone_ms = job.phase_since_ms + stop_grace_ms(job)
                else:
                    gone_ms = known.get(job_id, now_ms + job.spec.checkpoint.grace)
            if gone_ms > now_ms:
                self._leaves[job_id] = gone_ms
                continue
            if gone_ms > self._began_ms:
                self.by["leaving"] = None
            self._moved_ms = now_ms
            gone = tuple(r.id for r in job.replicas.values() if r.state is ReplicaState.STOPPING)
            if job.phase is Phase.STOPPING:
                assert job.outcome is not None
                twin.evolve(ev.AttemptEnded(now_ms, job_id, job.attempt, job.outcome.phase))
            elif gone:
                twin.evolve(ev.ReplicasGone(now_ms, job_id, job.attempt, gone))

    def _expect(self, job: Job) -> None:
        estimates, now_ms = self._twin.estimates, self._now_ms
        if estimates.source(job, now_ms):
            heapq.heappush(self._ends, (now_ms + estimates.left_ms(job, now_ms, self._quantile), job.id, job.attempt))
        else:
            self._endless[job.id] = None

    def _pass(self) -> bool:
        """Decide and do, until nothing more is decided at this instant; whether the job starts."""
        twin = self._twin
        for _ in range(PASSES):
            decisions = schedule(twin, self._now_ms, self._policy).decisions
            if decisions:
                self._moved_ms = self._now_ms
            for decision in decisions:
                twin.evolve(decision)
            self._see_off()
            for decision in decisions:
                if isinstance(decision, ev.AttemptPlaced):
                    if decision.job_id == self._job_id:
                        return True
                    self._begin(twin.jobs[decision.job_id])
            if not decisions:
                return False
        return False

    def _begin(self, job: Job) -> None:
        """A job that goes first runs."""
        self._twin.evolve(ev.AttemptStarted(self._now_ms, job.id, job.attempt, tuple(job.replicas)))
        self._expect(self._twin.jobs[job.id])

    def _advance(self) -> bool:
        """To the next end, or whatever else a pass waits for; False when there is nothing more to wait for."""
        twin, instants = self._twin, []
        while self._ends and not self._runs(*self._ends[0][1:]):
            heapq.heappop(self._ends)
        if self._ends:
            instants.append(self._ends[0][0])
        instants += self._leaves.values()
        # With nobody left to end, windows of budgets that turn change something once, and not again.
        turning = twin.window_ms and twin.next_pass_ms <= self._moved_ms + twin.quotas.longest_window_ms
        if twin.next_pass_ms > self._now_ms and (self._ends or self._leaves or turning or twin.ripening):
            instants.append(twin.next_pass_ms)
        if twin.parked:
            instants.append(max(twin.parked[0][0], self._now_ms + 1))
        if not instants:
            return False
        self._now_ms = max(self._now_ms, min(instants))
        while self._ends and self._ends[0][0] <= self._now_ms:
            _, job_id, attempt = heapq.heappop(self._ends)
            if self._runs(job_id, attempt):
                self._end(twin.jobs[job_id])
        self._see_off()
        return True

    def _runs(self, job_id: JobId, attempt: int) -> bool:
        job = self._twin.jobs.get(job_id)
        return job is not None and job.phase.runs and job.attempt == attempt

    def _end(self, job: Job) -> None:
        twin, now_ms = self._twin, self._now_ms
        if source := twin.estimates.source(job, now_ms):
            self.by[source] = None
        self._moved_ms = now_ms
        followers = tuple(twin.dependents.get(job.id, ()))
        done = Outcome(Phase.SUCCEEDED, Reason.COMPLETED)
        twin.evolve(ev.AttemptStopping(now_ms, job.id, job.attempt, done))
        twin.evolve(ev.AttemptEnded(now_ms, job.id, job.attempt, Phase.SUCCEEDED))
        for job_id in followers:
            if job_id in twin.jobs:
                twin.evolve(ev.DependencyMet(now_ms, job_id, job.id))

    def _who_stays(self) -> str:
        names = [job.name for job_id in self._endless if (job := self._twin.jobs.get(job_id)) and job.phase.active]
        if not names:
            return "it would not start even when everything that runs has ended"
        who = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{who} {ENDLESS}"


def expected(picture: Picture | None, job: Job, now_ms: int, policy: Policy) -> Forecast:
    """The forecast for a job of which `picture_for` gave the picture, or why there is none."""
    if job.held:
        return Forecast(unknown="it is held")
    if job.asked is not None:
        return Forecast(unknown="it waits for nodes that are asked for")
    if picture is None:
        return Forecast(unknown=f"more than {AHEAD} jobs of other queues go first")
    known = {each.id: each.phase for each in picture.jobs}
    if any(not known.get(each, Phase.QUEUED).active for each in job.waiting_for):
        return Forecast(unknown="a job that it comes after waits itself")
    return forecast(picture, job.id, now_ms, policy)


def sooner_with(
    picture: Picture, job: Job, ways: Iterable[tuple[str, Job]], now_ms: int, policy: Policy, than: Forecast
) -> tuple[tuple[str, int], ...]:
    """Of changed requests, those with which the job starts notably sooner, and when. A forecast each."""
    found = []
    for text, changed in ways:
        start_ms = forecast(picture, job.id, now_ms, policy, changed).after_ms
        worth_ms = max(WORTH_MS, (than.after_ms - now_ms) // 10)
        if start_ms and (not than.after_ms or than.after_ms - start_ms >= worth_ms):
            found.append((text, start_ms))
    return tuple(found)
