"""Queues: how full they are, what was used in them, and their definition."""

from __future__ import annotations

from jobsched.core import events as ev
from jobsched.core.answers import QueueAnswer, UsageAnswer
from jobsched.core.policies.quota import HOUR_MS
from jobsched.core.shares import queue_answers
from jobsched.errors import Problem, SpecError
from jobsched.live import LiveView
from jobsched.ports import Clock, Store
from jobsched.spec.queue import QueueSpec, distinct_queues


class Queues:
    def __init__(self, store: Store, live: LiveView, clock: Clock) -> None:
        self._store = store
        self._live = live
        self._clock = clock

    def every(self) -> tuple[QueueAnswer, ...]:
        with self._live.view() as (cluster, _):
            return queue_answers(cluster, self._clock.now_ms())

    def usage(self, since_ms: int = 0) -> tuple[UsageAnswer, ...]:
        """GPU time and waits by queue and user, of the jobs that live or ended at `since_ms` or later."""
        return tuple(
            UsageAnswer(
                u.queue, u.owner, u.jobs, u.succeeded, u.failed, u.cancelled,
                gpu_hours=round(u.gpu_milli_ms / 1_000 / HOUR_MS, 3),
                mean_wait_s=round(u.waited_ms / u.placed / 1_000, 3) if u.placed else 0.0,
                longest_wait_s=u.longest_wait_ms / 1_000,
            )
            for u in self._store.usage(since_ms, self._clock.now_ms())
        )  # fmt: skip

    def define(self, queue: QueueSpec) -> QueueAnswer:
        """A queue, new or changed. `SpecError` when it does not go with the others (a cohort inside itself)."""
        with self._live.view() as (cluster, _):
            others = tuple(q for q in cluster.queues.values() if q.name != queue.name)
            known = cluster.queues.get(queue.name)
        try:
            distinct_queues((*others, queue))
        except ValueError as exc:
            raise SpecError([Problem(str(exc), field="cohort")]) from exc
        if queue != known:
            self._store.append([ev.QueueDefined(self._clock.now_ms(), queue)])
            self._live.wake()
        return QueueAnswer(queue)
