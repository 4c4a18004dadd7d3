"""Jobs as people see them: each with its progress, its headline and, while it waits, the verdict. Listings, events and
samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from jobsched.core import explain
from jobsched.core.answers import JobAnswer, JobPage, JobProgress, Verdict
from jobsched.core.events import Stored
from jobsched.core.job import Job, Phase
from jobsched.core.resources import JobId
from jobsched.live import LiveView
from jobsched.ports import OWN_METRICS, Clock, JobQuery, Sample, Store
from jobsched.service.finding import resolve

MAX_PAGE = 1_000
MAX_VERDICTS = 16


class Answers:
    def __init__(self, store: Store, live: LiveView, clock: Clock) -> None:
        self._store = store
        self._live = live
        self._clock = clock

    def get(self, ref: str, *, owner: str = "") -> JobAnswer:
        return self.answer(resolve(self._store, ref, owner=owner))

    def jobs(self, query: JobQuery) -> JobPage:
        """Newest first. At most `MAX_PAGE` of them; `more` tells whether the next page has any."""
        limit = max(1, min(query.limit, MAX_PAGE))
        jobs = self._store.jobs(replace(query, limit=limit + 1))
        return JobPage(self._listed(jobs[:limit]), more=len(jobs) > limit)

    def lively(self, also: Iterable[JobId] = ()) -> tuple[JobAnswer, ...]:
        """Every job that holds resources, and those named, for live views; at most `MAX_PAGE`."""
        with self._live.view() as (cluster, _):
            holders = (job_id for node in cluster.fleet.on_node.values() for job_id, _ in node)
            ids = list(dict.fromkeys((*also, *holders)))[:MAX_PAGE]
            known = {job_id: cluster.jobs.get(job_id) for job_id in ids}
        return self._listed([job for job_id in ids if (job := known[job_id] or self._store.job(job_id))])

    def events(self, ref: str, *, after: int = 0, limit: int = 10_000, owner: str = "") -> Sequence[Stored]:
        return self._store.history(resolve(self._store, ref, owner=owner).id, after, max(1, min(limit, 10_000)))

    def samples(self, ref: str, *, limit: int = 1_000, owner: str = "") -> Sequence[Sample]:
        found = self._store.samples(resolve(self._store, ref, owner=owner).id, max(1, min(limit, 10_000)))
        return [replace(sample, metrics=_shown(sample)) for sample in found]

    def answer(self, job: Job) -> JobAnswer:
        now_ms, verdict = self._clock.now_ms(), None
        if not job.phase.terminal:
            with self._live.view() as (cluster, _):
                known = cluster.jobs.get(job.id)
                if known and (known.phase is Phase.QUEUED or job.id in cluster.growing):
                    verdict = explain.verdict(cluster, known, now_ms, self._live.policy.order(cluster, now_ms))
        progress = self._last_progress(job) if job.phase.terminal else self._progress(job)
        return JobAnswer(job, progress, verdict, self._headline(job, verdict))

    def _listed(self, jobs: Sequence[Job]) -> tuple[JobAnswer, ...]:
        """For listings. Jobs of one line wait for the same thing, so one verdict a line does (without the place in
        line, which is each job's own), and at most `MAX_VERDICTS` of them; the rest show their reason."""
        now_ms = self._clock.now_ms()
        found: dict[object, Verdict] = {}
        verdicts: dict[JobId, Verdict] = {}
        with self._live.view() as (cluster, _):
            order = self._live.policy.order(cluster, now_ms)
            for job in jobs:
                if job.phase is Phase.QUEUED and (known := cluster.jobs.get(job.id)):
                    line = cluster.line_of(job.id)
                    key = line.key if line else job.id
                    if key not in found and len(found) < MAX_VERDICTS:
                        found[key] = replace(explain.verdict(cluster, known, now_ms, order), position=0)
                    if key in found:
                        verdicts[job.id] = replace(found[key], job_id=job.id)
        return tuple(
            JobAnswer(job, self._progress(job), verdict := verdicts.get(job.id), self._headline(job, verdict))
            for job in jobs
        )

    def _headline(self, job: Job, verdict: Verdict | None) -> str:
        """While the engine is away, that is what every job that has not ended is about."""
        away = "" if job.phase.terminal else self._live.health.backend_error
        return f"{away}; until it answers nothing starts, and what runs is left alone" if away else explain.headline(
            job, verdict)

    def _progress(self, job: Job) -> JobProgress | None:
        return None if job.phase is Phase.QUEUED else self._live.progress(job.id)

    def _last_progress(self, job: Job) -> JobProgress | None:
        """How far a job had come that has ended; None when it never told."""
        for last in self._store.samples(job.id, 1):
            return JobProgress(last.step, last.total, last.world_size, _shown(last))
        return None


def receipt(job: Job) -> JobAnswer:
    """The answer to a wish: the job as the log has it now. What is only known live is not waited for."""
    return JobAnswer(job, headline=explain.headline(job))


def _shown(sample: Sample) -> tuple[tuple[str, float], ...]:
    """A sample's metrics without those that are our own."""
    return tuple((name, value) for name, value in sample.metrics if not name.startswith(OWN_METRICS))
