"""Lines that are worth a try in a pass, and their heads in the order in which they go.

A line whose head did not fit is not looked at again until something became free (`Ledger.freed`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from jobsched.core.cluster import Cluster
from jobsched.core.job import Job, Shape
from jobsched.core.lines import Line
from jobsched.core.passes import Pass, Policy
from jobsched.core.policies.admission import least_needs
from jobsched.core.policies.fairness import Turn, turn
from jobsched.core.policies.ordering import OrderKey
from jobsched.core.resources import JobId

DROPS = 8
"""All lines are looked through once one in so many was dropped."""


def worth_a_try(cluster: Cluster, policy: Policy) -> list[Line]:
    """Lines whose head may fit now, or may get something else from this pass. O(lines); with `strict`, O(queues) while
    nothing changes."""
    fits_or_waits = policy.preemption is None and policy.backfill is None
    stuck, now = cluster.lines.stuck, (cluster.ledger.freed, cluster.claims_made)
    if cluster.lines.looked != now:
        cluster.lines.looked = now
        for queue in [queue for queue, first in stuck.items() if _may_fit(cluster, first)]:
            del stuck[queue]
    found: list[Line] = []
    for queue, lines in cluster.lines.of_queue.items():
        if queue in stuck:
            continue
        if policy.strict:
            first = min(lines.values(), key=lambda line: policy.ordering(line.key, line.places[0]))
            if fits_or_waits and first.key.shape.least_gpu_milli > first.stock.free_milli:
                first.blocked_at = first.stock.freed
            if not _may_fit(cluster, first):
                stuck[queue] = first
            else:
                found += lines.values()
            continue
        for line in lines.values():
            if _may_fit(cluster, line):
                found.append(line)
    return found


def _may_fit(cluster: Cluster, line: Line) -> bool:
    if line.hindered_at >= 0 and line.hindered_at != cluster.claims_made:
        return True
    return line.blocked_at != line.stock.freed and line.refused_at != cluster.ledger.freed


class Heads:
    """Lines worth a try, by their heads: queues take turns by fair share (`Policy.fair`), lines by `Policy.ordering`.

    A queue is put in anew whenever its share or its best line changes; older entries are skipped. O(log queues).
    """

    def __init__(self, run: Pass, lines: Iterable[Line]) -> None:
        self._cluster, self._settled, self._now_ms = run.cluster, run.settled, run.now_ms
        self._ordering, self._fair = run.policy.ordering, run.policy.fair
        self._lines: dict[str, list[tuple[OrderKey, int, Line, int]]] = {}
        """Queue (or "": all queues) -> heap of its lines: (order, serial, line, place in it of its head)."""
        self._count = self._dropped = 0
        """Lines in those heaps, and lines dropped one by one since all were looked through."""
        for line in lines:
            at = self._first(line, 0)
            if at < len(line.places):
                group = self._lines.setdefault(line.key.queue if self._fair is not None else "", [])
                group.append((self._ordering(line.key, line.places[at]), self._count, line, at))
                self._count += 1
        self._serial = self._count
        for group in self._lines.values():
            heapq.heapify(group)
        self._turns: dict[str, tuple[int, Shape, Turn]] = {}
        """Queue -> its turn when so much was booked in its tree, for a head of such a shape."""
        self._queued: dict[str, Turn] = {}
        """Queue -> which of its entries in `_queues` holds."""
        self._queues: list[tuple[Turn, str]] = []
        if self._fair is not None:
            for queue in self._lines:
                self._put(queue)

    def _first(self, line: Line, at: int) -> int:
        """The first place from `at` on about whose job nothing is decided."""
        if self._settled:
            while at < len(line.places) and line.places[at].job_id in self._settled:
                at += 1
        return at

    def _turn(self, queue: str) -> Turn:
        assert self._fair is not None
        account = self._cluster.quotas.account(queue)
        root, shape = account.root, self._lines[queue][0][2].key.shape
        known = self._turns.get(queue)
        if known is None or known[0] != root.booked or (known[1] is not shape and root.nominal):
            needs = least_needs(self._cluster, account, shape)
            found = turn(account, self._cluster.fleet.capacity(), needs, self._fair, self._now_ms)
            known = self._turns[queue] = (root.booked, shape, found)
        return known[2]

    def _put(self, queue: str) -> None:
        if self._fair is not None and self._lines[queue]:
            now = self._turn(queue)
            if self._queued.get(queue) != now:
                self._queued[queue] = now
                heapq.heappush(self._queues, (now, queue))

    def pop(self) -> tuple[OrderKey, Line, int] | None:
        """The line whose head goes next, taken out, with the head's order and its place in it; None at the end."""
        entry = self._pop() if self._fair is not None else self._best("")
        if entry is None:
            return None
        self._count -= 1
        order, _, line, at = entry
        return order, line, at

    def _best(self, queue: str) -> tuple[OrderKey, int, Line, int] | None:
        lines = self._lines.get(queue)
        return heapq.heappop(lines) if lines else None

    def _pop(self) -> tuple[OrderKey, int, Line, int] | None:
        while self._queues:
            known, queue = heapq.heappop(self._queues)
            if self._queued.get(queue) != known:
                continue
            del self._queued[queue]
            entry = self._best(queue) if self._lines[queue] and self._turn(queue) == known else None
            self._put(queue)
            if entry is not None:
                return entry
        return None

    def drop(self, unwanted: Callable[[Line, JobId], bool]) -> None:
        """A line that was taken out is not wanted, nor are others of which the same is true: they are looked through
        whenever so many went one by one."""
        self._dropped += 1
        if self._dropped * DROPS < self._count:
            return
        self._count = self._dropped = 0
        for queue, lines in self._lines.items():
            lines[:] = [entry for entry in lines if not unwanted(entry[2], entry[2].places[entry[3]].job_id)]
            heapq.heapify(lines)
            self._count += len(lines)
            self._put(queue)

    def seek(self, line: Line, at: int, most: int, wanted: Callable[[Job], bool]) -> tuple[int, bool]:
        """Look at so many jobs behind the head for one that is wanted; it becomes the head. (How many were looked at,
        whether one was found.)"""
        for looked in range(1, most + 1):
            at = self._first(line, at + 1)
            if at >= len(line.places):
                return looked - 1, False
            if wanted(self._cluster.jobs[line.places[at].job_id]):
                self.push(line, at)
                return looked, True
        return most, False

    def push(self, line: Line, at: int) -> None:
        """A line has another head, from that place on."""
        at = self._first(line, at)
        if at < len(line.places):
            queue = line.key.queue if self._fair is not None else ""
            order = self._ordering(line.key, line.places[at])
            heapq.heappush(self._lines[queue], (order, self._serial, line, at))
            self._count += 1
            self._serial += 1
            self._put(queue)
