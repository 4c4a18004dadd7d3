"""Why a job is where it is, when it will start, what would help, and what a job that is not there yet could expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jobsched.core import events as ev
from jobsched.core import explain
from jobsched.core.alternatives import later, sooner
from jobsched.core.answers import PlanAnswer, Verdict, WhyAnswer
from jobsched.core.cluster import Cluster
from jobsched.core.forecast import expected, picture_for, sooner_with, time_left
from jobsched.core.job import Job, Phase, Reason
from jobsched.core.launch import parse_key
from jobsched.core.lifecycle import evolve_job
from jobsched.core.observation import Incident
from jobsched.core.plan import Forecast
from jobsched.core.rehearsal import PROBE, Picture, picture_of, plan
from jobsched.core.resources import NodeName
from jobsched.core.story import story
from jobsched.errors import NotFound
from jobsched.live import LiveView
from jobsched.ports import Backend, Chronicle, Clock, Store
from jobsched.service.answering import Answers
from jobsched.service.entry import completed, unknown_queue
from jobsched.service.finding import resolve
from jobsched.spec.job import JobSpec

MAX_IMAGINED = 2_000
"""Among more jobs than this, changes of a request are not played through."""
MAX_WARNINGS = 5
CATCH_UP_S = 15.0
"""How long an answer may wait for a pass to look at what has just been submitted: milliseconds, but on a machine that
is busy with other things the pass may be late."""
LATELY_MS = 15 * 60_000
"""How long a warning of the engine may explain what is so now."""


class Explanations:
    def __init__(
        self, answers: Answers, store: Store, live: LiveView, backend: Backend, clock: Clock, classes: Mapping[str, int]
    ) -> None:
        self._answers = answers
        self._store = store
        self._live = live
        self._backend = backend
        self._clock = clock
        self._classes = classes

    def why(self, ref: str, *, owner: str = "", at_ms: int = 0) -> WhyAnswer:
        """The present in a sentence, the verdict, and the story so far. `at_ms`: as it was at that instant, computed
        again from the log: O(events until then). Raises `NotFound` when the job was not there yet."""
        job = resolve(self._store, ref, owner=owner)
        if at_ms:
            return self._why_then(job, at_ms)
        if job.phase is Phase.QUEUED and self._live.caught_up(self._store.last_seq(), CATCH_UP_S):
            job = self._store.job(job.id) or job
        answer = self._answers.answer(job)
        verdict, now_ms = answer.verdict, self._clock.now_ms()
        starts, left = Forecast(now_ms, now_ms) if answer.job.phase.runs else Forecast(), None
        with self._live.view() as (cluster, _):
            known = cluster.jobs.get(answer.job.id)
            if known is not None:
                left = time_left(cluster, known, now_ms)
            if verdict is not None and answer.job.phase is Phase.QUEUED:
                if known is None or known.phase is not Phase.QUEUED:
                    return WhyAnswer(answer.job, answer.headline, None, story(self._answers.events(answer.job.id)))
                ways = sooner(cluster, known, now_ms) if cluster.waits(known.id) else ()
                others = later(cluster, known)
                picture = picture_for(cluster, known, now_ms, self._live.policy)
        if verdict is not None and known is not None and known.phase is Phase.QUEUED:
            verdict = self._expecting(replace(verdict, sooner=ways), known, picture, now_ms, others)
            starts = Forecast(verdict.starts_after_ms, verdict.starts_before_ms)
        told, due = story(self._answers.events(answer.job.id)), explain.punctual(answer.job, starts, left, now_ms)
        return WhyAnswer(answer.job, answer.headline, verdict, told, self._warnings(answer.job), due)

    def plan(self, spec: JobSpec, *, owner: str = "") -> PlanAnswer:
        """Where and when the job would run if it were submitted now, and who would give way; changes nothing."""
        spec = completed(spec, self._classes)
        self._live.caught_up(self._store.last_seq(), CATCH_UP_S)
        with self._live.view() as (cluster, _):
            if unknown := unknown_queue(spec.queue, cluster.queues):
                raise unknown
            policy, now_ms = self._live.policy, self._clock.now_ms()
            twin = picture_of(cluster)
            probe = evolve_job(None, ev.JobSubmitted(now_ms, PROBE, spec.name or str(PROBE), owner, spec))
            picture = picture_for(cluster, probe, now_ms, policy)
            others, left = later(cluster, probe), time_left(cluster, probe, now_ms)
        answer = plan(twin.cluster(), spec, owner, now_ms, policy)
        starts = Forecast(now_ms, now_ms) if answer.code != 8 else Forecast()
        if answer.code == 10 and answer.verdict is not None and not answer.victims:
            waits = self._expecting(answer.verdict, probe, picture, now_ms, others)
            answer, starts = replace(answer, verdict=waits), Forecast(waits.starts_after_ms, waits.starts_before_ms)
        return replace(answer, deadline=explain.punctual(probe, starts, left, now_ms))

    def incidents(self, ref: str, *, owner: str = "") -> Sequence[Incident]:
        """What the engine says of a job's replicas, and of their nodes since it was submitted: oldest first, only what
        it still remembers. Empty where engines say nothing."""
        job = resolve(self._store, ref, owner=owner)
        if not isinstance(self._backend, Chronicle):
            return ()
        nodes = [replica.binding.node for replica in job.replicas.values() if replica.binding is not None]
        nodes += [NodeName(job.cause.node)] if job.cause is not None and job.cause.node else []
        found = self._backend.incidents(job.id, list(dict.fromkeys(nodes)))
        return [one for one in found if one.key or one.at_ms >= job.submitted_at_ms]

    def _warnings(self, job: Job) -> tuple[Incident, ...]:
        """Those that may explain where the job is now: of its last attempt, lately if it runs."""
        if job.phase in (Phase.SUCCEEDED, Phase.CANCELLED):
            return ()
        since_ms = self._clock.now_ms() - LATELY_MS
        return tuple(
            one for one in self.incidents(job.id)
            if one.warning and (not one.key or parse_key(one.key).attempt == job.attempt)
            and (one.at_ms >= since_ms or (one.key and job.phase is not Phase.RUNNING))
        )[-MAX_WARNINGS:]

    def _expecting(
        self, verdict: Verdict, job: Job, picture: Picture | None, now_ms: int, others: Sequence[tuple[str, Job]] = ()
    ) -> Verdict:
        """The verdict with the expected start, and what else would help and when. Nobody waits for it but who asks."""
        if any(why.reason in (Reason.UNPLACEABLE, Reason.QUEUE_PAUSED) for why in verdict.reasons):
            return verdict
        policy = self._live.policy
        when = expected(picture, job, now_ms, policy)
        ways = verdict.sooner
        if picture is not None and len(picture.jobs) <= MAX_IMAGINED and not job.held:
            # Whatever helps at once in one way need not be told of for later in the same way.
            at_once = {_kind_of_way(way) for way in ways}
            others = [(text, changed) for text, changed in others if _kind_of_way(text) not in at_once]
            ways += tuple(
                f"{text}: {explain.moment(at_ms, now_ms)}"
                for text, at_ms in sooner_with(picture, job, others, now_ms, policy, when)
            )
        return replace(
            verdict, starts_after_ms=when.after_ms, starts_before_ms=when.before_ms,
            starts=explain.starting(when, now_ms), sooner=ways,
        )  # fmt: skip

    def _why_then(self, job: Job, at_ms: int) -> WhyAnswer:
        policy = self._live.policy
        cluster, seq = Cluster(rank=policy.rank, alike=policy.alike), 0
        while page := self._store.read(seq, 5_000):
            for item in page:
                if item.event.at_ms > at_ms:
                    break
                cluster.evolve(item.event, item.seq)
            if cluster.seq != page[-1].seq:
                break
            seq = cluster.seq
        told = [item for item in self._answers.events(job.id) if item.seq <= cluster.seq]
        if not told:
            raise NotFound(f"job {job.name!r} ({job.id}) was not there yet", hint="give a later time")
        then: Job | None = None
        for item in told:
            then = evolve_job(then, ev.of_job(item.event))
        assert then is not None
        cluster.unpark(at_ms)
        waits, order = then.phase is Phase.QUEUED, policy.order(cluster, at_ms)
        verdict = explain.verdict(cluster, then, at_ms, order) if waits else None
        return WhyAnswer(then, explain.headline(then, verdict), verdict, story(told))


def _kind_of_way(text: str) -> str:
    """`worker replicas`, `h100`: what a change is about."""
    return text.partition(" instead of ")[2].partition(":")[0].partition(" (")[0]
