"""When to look again if nothing happens: each live job's earliest deadline, in a heap that forgets lazily."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from jobsched.core.job import Job, Phase, ReplicaState
from jobsched.core.judge import SETTLE_MS, STACKS_WAIT_MS, SUSPICION_MS, Senses
from jobsched.core.launch import launch_key
from jobsched.core.observation import Sight
from jobsched.core.resources import JobId

START_AGAIN_MS = 5_000
"""A start that was ordered but not seen is ordered again after this long; orders are idempotent."""
OVERDUE_MS = 500
"""What is overdue is looked at again after so long."""


@dataclass(slots=True)
class Timers:
    """Heap of (instant, job); the newest instant per job holds, older entries are skipped when they surface."""

    _heap: list[tuple[int, JobId]] = field(default_factory=list)
    _armed: dict[JobId, int] = field(default_factory=dict)

    def arm(self, job_id: JobId, instant_ms: int | None) -> None:
        """Set (or with None clear) the job's next deadline. O(log n)."""
        if instant_ms is None:
            self._armed.pop(job_id, None)
        elif self._armed.get(job_id) != instant_ms:
            self._armed[job_id] = instant_ms
            heapq.heappush(self._heap, (instant_ms, job_id))

    def due(self, now_ms: int) -> list[JobId]:
        """Jobs whose deadline has come; each is disarmed."""
        found = []
        while (instant := self.next_wake()) is not None and instant <= now_ms:
            _, job_id = heapq.heappop(self._heap)
            del self._armed[job_id]
            found.append(job_id)
        return found

    def next_wake(self) -> int | None:
        """The earliest deadline; None when there is none."""
        while self._heap and self._armed.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None


def deadline(job: Job, sight: Sight, now_ms: int, senses: Senses) -> int | None:
    """The earliest instant at which judge or converge could have something to say about this job without any news."""
    spec = job.spec
    instants: list[int] = []
    if not job.phase.active:
        if job.not_before_ms > now_ms:  # afterwards it waits for room, not for time
            instants.append(job.not_before_ms)
        if spec.queue_deadline and not job.attempt:
            instants.append(job.submitted_at_ms + spec.queue_deadline)
        return min(instants, default=None)
    if spec.start_timeout and job.phase is Phase.STARTING:
        instants.append(job.attempt_started_at_ms + spec.start_timeout)
    if spec.time_limit and job.running_since_ms:
        instants.append(job.running_since_ms + spec.time_limit - job.ran_ms)
    if job.suspected_since_ms:
        since = job.suspected_since_ms
        instants.append(since + SUSPICION_MS if now_ms < since + SUSPICION_MS else since + STACKS_WAIT_MS)
    tells = bool(sight.step_at_ms) and not job.suspected_since_ms
    absents = bool(sight.absent_at_ms) and not senses.absence_is_final
    for replica in job.replicas.values():
        state = replica.state
        if state is not ReplicaState.BOUND and not tells and not absents:
            continue
        key = launch_key(job.id, job.attempt, replica.role, replica.index, replica.restart)
        if state is ReplicaState.BOUND and key not in sight.replicas:
            ordered = sight.ordered_at_ms.get(key)
            instants.append(replica.not_before_ms if ordered is None else ordered + START_AGAIN_MS)
        if tells and state is ReplicaState.RUNNING and (stepped := sight.step_at_ms.get(key)) is not None:
            if spec.hang_timeout:
                instants.append(stepped + spec.hang_timeout)
            if spec.heartbeat_timeout:
                instants.append(max(sight.beat_at_ms.get(key, stepped), stepped) + spec.heartbeat_timeout)
        if absents and key in sight.absent_at_ms:
            instants.append(sight.absent_at_ms[key] + senses.lost_after_ms)
    if job.outcome is not None:
        instants.append(now_ms + SETTLE_MS)
    soonest = min(instants, default=None)
    return now_ms + OVERDUE_MS if soonest is not None and soonest <= now_ms else soonest
