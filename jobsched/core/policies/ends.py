"""When running jobs are likely to end, kept in order from one pass to the next. Called by `backfill`.

How long a job still runs is estimated when it begins and again when an eighth of that time is over. So a question costs
what has come due since the last and what is asked for, not all that runs.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jobsched.core.job import Job
from jobsched.core.policies.estimate import Estimates
from jobsched.core.resources import JobId

REVISED = 250
"""Most estimates that are made anew for one question; who is due longest goes first, the others keep what they have."""
STALE = 1_000
"""Twice as many entries as held the last time, and so many more: time to tidy up."""


class End(NamedTuple):
    at_ms: int
    job_id: JobId
    attempt: int
    holds_until_ms: int


@dataclass(slots=True)
class Ends:
    """The ends of a cluster's running jobs. What no longer holds is dropped when it is met."""

    _begun: dict[JobId, None] = field(default_factory=dict)
    """Who began since the last question."""
    _of: dict[JobId, End] = field(default_factory=dict)
    _first: list[End] = field(default_factory=list)
    """Heap."""
    _due: list[tuple[int, End]] = field(default_factory=list)
    """Heap by when the estimate is to be made anew."""
    _held: int = 0
    """How many entries held when all were last looked at."""

    def begins(self, job_id: JobId) -> None:
        """A job starts or runs."""
        self._begun[job_id] = None

    def over(self, job_id: JobId) -> None:
        """A job is no more; also where nobody ever asks, nothing is kept of it."""
        self._begun.pop(job_id, None)

    def soonest(self, most: int, jobs: Mapping[JobId, Job], estimates: Estimates, now_ms: int) -> list[End]:
        """The first of the running jobs to end, when each is likely to. O((begun + due + most) log(running))."""
        for job_id in self._begun:
            job, known = jobs.get(job_id), self._of.get(job_id)
            if job is not None and job.phase.runs and (known is None or known.attempt != job.attempt):
                self._estimate(job, estimates, now_ms)
        self._begun.clear()
        for _ in range(REVISED):
            if not self._due or self._due[0][0] > now_ms:
                break
            _, end = heapq.heappop(self._due)
            if self._holds(end, jobs):
                self._estimate(jobs[end.job_id], estimates, now_ms)
        found: list[End] = []
        while self._first and len(found) < most:
            end = heapq.heappop(self._first)
            if self._holds(end, jobs):
                found.append(end)
        for end in found:
            heapq.heappush(self._first, end)
        if max(len(self._first), len(self._due)) > 2 * self._held + STALE:
            self._tidy(jobs)
        return found

    def _estimate(self, job: Job, estimates: Estimates, now_ms: int) -> None:
        left = estimates.left_ms(job, now_ms)
        end = self._of[job.id] = End(now_ms + left, job.id, job.attempt, now_ms + max(1, left // 8))
        heapq.heappush(self._first, end)
        heapq.heappush(self._due, (end.holds_until_ms, end))

    def _holds(self, end: End, jobs: Mapping[JobId, Job]) -> bool:
        if self._of.get(end.job_id) is not end:
            return False
        job = jobs.get(end.job_id)
        if job is not None and job.phase.runs and job.attempt == end.attempt:
            return True
        del self._of[end.job_id]
        return False

    def _tidy(self, jobs: Mapping[JobId, Job]) -> None:
        """O(running)."""
        self._first = [end for end in list(self._of.values()) if self._holds(end, jobs)]
        self._due = [(end.holds_until_ms, end) for end in self._first]
        heapq.heapify(self._first)
        heapq.heapify(self._due)
        self._held = len(self._first)
