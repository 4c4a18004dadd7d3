"""The in-memory store: the same promises as `SqlStore`, for tests and the simulator. Nothing outlives the process.

Values are kept as they came, without encoding; appending costs O(events), whatever else the store holds. What only
readers ask for, histories and listings, is brought up to the end of the log when one asks.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

from jobsched.core.events import Event, Stored
from jobsched.core.job import Job, Phase
from jobsched.core.recall import Recall
from jobsched.core.resources import JobId
from jobsched.ports import Appended, JobQuery, Lease, Loaded, Sample, Usage
from jobsched.store.projections import SAMPLES_KEPT, Projections, assert_wishes, check_fence, loaded, next_lease


class MemoryStore:
    """A `Store` in dicts and lists."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._now = Projections()
        self._log: list[Stored] = []
        self._filed = 0
        """Events of the log that are in what follows: see `_file`."""
        self._history: defaultdict[JobId, list[Stored]] = defaultdict(list)
        self._live: dict[JobId, Job] = {}
        self._order: list[tuple[int, JobId]] = []
        """(submitted_at_ms, id) of every job, sorted: the order of listings."""
        self._ended: Counter[str] = Counter()
        """Jobs that are over, by phase."""
        self._samples: dict[JobId, deque[Sample]] = {}
        self._recall: Recall | None = None
        self._lease = Lease("", 0, 0)

    def append(
        self, events: Sequence[Event], expected: Mapping[JobId, int] | None = None, fence: int | None = None
    ) -> Appended:
        if fence is None:
            assert_wishes(events)
        with self._lock:
            check_fence(fence, self._lease.fence)
            end = self._now.seq
            appended = self._now.append(events, expected or {})
            if self._now.seq == end + len(appended.stored):
                self._log += appended.stored
                return appended
            for stored in appended.stored:
                if stored.seq > end:  # else it had been sent before
                    end = stored.seq
                    self._log.append(stored)
            return appended

    def _file(self) -> None:
        """Take what was appended since the last look into histories, listings and counts."""
        jobs, changed = self._now.jobs, dict[JobId, None]()
        for stored in self._log[self._filed :]:
            job_id = stored.event.job_id
            if job_id is not None:
                changed[job_id] = None
                if not (history := self._history[job_id]):
                    insort(self._order, (jobs[job_id].submitted_at_ms, job_id))
                history.append(stored)
        self._filed = len(self._log)
        for job_id in changed:
            job = jobs[job_id]
            if not job.phase.terminal:
                self._live[job_id] = job
            else:
                self._live.pop(job_id, None)
                self._ended[job.phase] += 1

    def read(self, after: int, limit: int = 10_000) -> Sequence[Stored]:
        if after >= len(self._log):
            return ()  # asked each tick, and mostly nothing is new
        with self._lock:
            after = max(0, after)
            return tuple(self._log[after : after + limit])

    def history(self, job_id: JobId, after: int = 0, limit: int = 10_000) -> Sequence[Stored]:
        with self._lock:
            self._file()
            events = self._history.get(job_id, [])
            start = bisect_left(events, after + 1, key=lambda s: s.seq)
            return tuple(events[start : start + limit])

    def load(self) -> Loaded:
        with self._lock:
            self._file()
            live = sorted(self._live.values(), key=lambda job: (job.submitted_at_ms, job.id))
            return loaded(self._now.seq, live, self._now.nodes, list(self._now.queues.values()))

    def job(self, job_id: JobId) -> Job | None:
        return self._now.jobs.get(job_id)

    def jobs(self, query: JobQuery) -> Sequence[Job]:
        with self._lock:
            self._file()
            return tuple(islice(self._select(query), query.limit))

    def _select(self, query: JobQuery) -> Iterator[Job]:
        end = len(self._order)
        if query.before is not None:
            last = self._now.jobs.get(query.before)
            end = 0 if last is None else bisect_left(self._order, (last.submitted_at_ms, last.id))
        for place in reversed(range(end)):
            at_ms, job_id = self._order[place]
            if query.submitted_after_ms and at_ms <= query.submitted_after_ms:
                return
            job = self._now.jobs[job_id]
            if _selected(job, query):
                yield job

    def count(self, by: Literal["phase", "queue"] = "phase") -> Mapping[str, int]:
        with self._lock:
            self._file()
            if by == "phase":
                return dict(Counter(job.phase for job in self._live.values()) + self._ended)
            return dict(Counter(job.spec.queue for job in self._live.values()))

    def ended(self) -> int:
        """How many jobs are over."""
        with self._lock:
            self._file()
            return self._ended.total()

    def usage(self, since_ms: int, now_ms: int) -> Sequence[Usage]:
        found: dict[tuple[str, str], Usage] = {}
        with self._lock:
            jobs = tuple(self._now.jobs.values())
        for job in jobs:
            if job.ended_at_ms == 0 or job.ended_at_ms >= since_ms:
                key = (job.spec.queue, job.owner)
                found[key] = _used(found.get(key, Usage(*key)), job, now_ms)
        return tuple(found[key] for key in sorted(found))

    def add_samples(self, samples: Sequence[Sample]) -> None:
        with self._lock:
            for sample in samples:
                if sample.job_id in self._now.jobs:
                    self._samples.setdefault(sample.job_id, deque(maxlen=SAMPLES_KEPT)).append(sample)

    def samples(self, job_id: JobId, limit: int = 1_000) -> Sequence[Sample]:
        with self._lock:
            kept = self._samples.get(job_id, ())
            return tuple(islice(kept, max(0, len(kept) - limit), None))

    def keep_recall(self, recall: Recall, fence: int) -> None:
        with self._lock:
            check_fence(fence, self._lease.fence)
            self._recall = recall

    def recall(self) -> Recall | None:
        return self._recall

    def lease(self, holder: str, ttl_ms: int, now_ms: int) -> Lease | None:
        with self._lock:
            lease = next_lease(self._lease, holder, ttl_ms, now_ms)
            if lease is not None:
                self._lease = lease
            return lease

    def release(self, holder: str) -> None:
        with self._lock:
            if self._lease.holder == holder:
                self._lease = replace(self._lease, holder="", expires_ms=0)

    def last_seq(self) -> int:
        return self._now.seq

    def close(self) -> None:
        """Nothing to let go of."""


def _used(usage: Usage, job: Job, now_ms: int) -> Usage:
    placed = job.first_placed_at_ms > 0
    waited = job.first_placed_at_ms - job.submitted_at_ms if placed else 0
    return replace(
        usage,
        jobs=usage.jobs + 1,
        succeeded=usage.succeeded + (job.phase is Phase.SUCCEEDED),
        failed=usage.failed + (job.phase is Phase.FAILED),
        cancelled=usage.cancelled + (job.phase is Phase.CANCELLED),
        gpu_milli_ms=usage.gpu_milli_ms + job.gpu_time(now_ms),
        placed=usage.placed + placed,
        waited_ms=usage.waited_ms + waited,
        longest_wait_ms=max(usage.longest_wait_ms, waited),
    )


def _selected(job: Job, query: JobQuery) -> bool:
    return (
        (not query.phases or job.phase in query.phases)
        and query.queue in ("", job.spec.queue)
        and query.owner in ("", job.owner)
        and query.name in ("", job.name)
        and query.array_id in ("", job.array_id)
        and job.id.startswith(query.id_prefix)
        and all(job.labels.get(key) == value for key, value in query.labels)
    )
