"""Reading the logs of pods: what replicas write, the reports in it, and the last line before an end.

Used by `kubernetes`. One thread follows one log, and there are `MOST` threads at most, however many pods run: when more
wait, the logs that have been open longest make way for a while. Where a kubelet does not answer, one of its pods tries
for all of them.
"""

from __future__ import annotations

import heapq
import itertools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import structlog

from jobsched.backends.container_log import collect
from jobsched.backends.kubernetes_api import Api, Gone, Refused, Stream
from jobsched.backends.replica_table import Known, ReplicaTable
from jobsched.backends.supervisor.protocol import Layout
from jobsched.core.launch import LaunchKey
from jobsched.core.observation import ReplicaReport, Seen
from jobsched.errors import BackendUnreachable
from jobsched.spec.backends import LogLimits
from jobsched.spec.pod import CONTAINER

log = structlog.get_logger("jobsched.kubernetes")

MOST = 1_024
"""Logs that are followed at the same time."""
SLICE_S = 5.0
"""How long one may be followed while others wait."""
IDLE_S = 5.0
"""A thread without work ends after so long."""
REOPEN_S = (0.2, 30.0)
"""First and longest pause before a log that broke off is opened again."""
REFUSED_S = 2.0
"""First pause after one that could not be opened at all."""
SILENCE_S = 3_600.0
"""A log on which nothing comes for so long is opened anew."""
OVERDUE_S = 3.0
"""One that goes on this long after its container's end is cut off."""
SILENT_S = 4.0
"""A replica whose log is closed for so long, or that reports through it and did not, is silent."""
RECENT_S = 2.0
"""How long ago a log must have been tried, for its being closed to say something about its node."""
STAMPED = re.compile(rb"\d{4}-\d\d-\d\dT[0-9:.]+\S+ ")
"""How a line of a log begins."""


@dataclass(slots=True)
class Heard(Known):
    """A replica that is known through its log."""

    pod: str = ""
    """Its pod's name, once there is one."""
    end: ReplicaReport | None = None
    """How it ended; its log may still be on its way."""
    end_at: float = 0.0
    attended: bool = False
    """Somebody reads its log, or will, and then tells its end."""
    stream: Stream | None = None
    """The log that is being read."""
    blind_since: float = field(default_factory=time.monotonic)
    """Since when nothing can be heard from it; 0 while its log is open."""
    tried_at: float = 0.0
    """When its log could last not be opened."""
    opening_at: float = 0.0
    """Since when it is being opened; 0 while it is not."""
    pause_s: float = 0.0
    turn: int = 0
    """Its place among those that wait for an instant; 0 while it does not."""

    def told(self) -> ReplicaReport:
        """Silence does not count while nothing could be heard."""
        report = Known.told(self)
        if report.progress is None or not self.blind_since:
            return report
        blind_ms = int((time.monotonic() - self.blind_since) * 1000)
        step, beat = report.progress.step_age_ms - blind_ms, report.progress.beat_age_ms - blind_ms
        return replace(report, progress=replace(report.progress, step_age_ms=max(step, 0), beat_age_ms=max(beat, 0)))

    def silent(self, now: float) -> bool:
        """A log that cannot be opened, tried just now or all the while; or reports that should have come."""
        if self.blind_since:
            starting = self.report.state is Seen.STARTING
            stuck = bool(self.opening_at) and now - self.opening_at >= SILENT_S
            return now - self.blind_since >= SILENT_S and (starting or stuck or now - self.tried_at <= RECENT_S)
        return self.progress is not None and now - self.progress.beat_at >= SILENT_S


@dataclass(slots=True)
class Deaf:
    """A node whose kubelet did not answer."""

    pause_s: float
    until: float
    """When the next of its pods tries (monotonic)."""
    asked: bool = False
    """One of them tries now; failures of others are old news."""


class Readers:
    """`ended(replica)` is told once a log is whole after its replica's end. Thread-safe. Called under the table's lock,
    it never waits for it while it holds its own."""

    def __init__(
        self, api: Api, base: str, table: ReplicaTable[Any], layout: Layout, limits: LogLimits,
        ended: Callable[[Any], None], most: int,
    ) -> None:  # fmt: skip
        """`base`: the namespace's path."""
        self._api, self._base, self._table, self._layout = api, base, table, layout
        self._limits, self._ended, self._most = limits, ended, most
        self._news = threading.Condition()
        self._ready: deque[Heard] = deque()
        self._later: list[tuple[float, int, Heard]] = []
        """(instant, turn, replica); out of date where the replica's own turn differs."""
        self._turns = itertools.count(1)
        self._open: dict[LaunchKey, float] = {}
        """Logs that are followed -> since when, the longest first."""
        self._deaf: dict[str, Deaf] = {}
        self._threads = self._idle = 0
        self._closed = False

    def attend(self, replica: Heard) -> None:
        """Read its log from now on and tell its end; it may have ended already."""
        with self._news:
            if not replica.attended:
                replica.attended = True
                self._ready.append(replica)
                self._call()
            elif replica.end is not None:
                self._hasten(replica)

    def reopen(self, replicas: Sequence[Heard]) -> None:
        """Try now rather than later."""
        with self._news:
            for replica in replicas:
                self._deaf.pop(replica.report.node, None)
                self._hasten(replica)

    def deaf(self, node: str) -> bool:
        """Whether its kubelet did not answer when it was last asked."""
        with self._news:
            return node in self._deaf

    def tend(self) -> None:
        """From time to time: where others wait, the longest open logs make way."""
        now = time.monotonic()
        with self._news:
            crowd = len(self._ready) - self._idle if self._threads >= self._most else 0
            makes_way = [key for key, since in itertools.islice(self._open.items(), max(crowd, 0))
                         if now - since >= SLICE_S]
        for key in makes_way:
            replica = self._table.get(key)
            if replica is not None and replica.stop is None and (stream := replica.stream) is not None:
                stream.close()

    def close(self) -> None:
        with self._news:
            self._closed = True
            self._news.notify_all()
        for replica in self._table.all():
            if (stream := replica.stream) is not None:
                stream.close()

    # who is next ------------------------------------------------------------------------------------------------------

    def _call(self) -> None:
        """Somebody for what is ready (under the lock)."""
        if len(self._ready) > self._idle and self._threads < self._most and not self._closed:
            self._threads += 1
            threading.Thread(target=self._work, name="kubernetes-log", daemon=True).start()
        self._news.notify()

    def _hasten(self, replica: Heard) -> None:
        """If it waits for an instant, that is now (under the lock)."""
        if replica.turn:
            replica.turn = 0
            self._ready.appendleft(replica)
            self._call()

    def _put_off(self, replica: Heard, until: float) -> None:
        """Under the lock."""
        replica.turn = next(self._turns)
        heapq.heappush(self._later, (until, replica.turn, replica))
        self._news.notify()

    def _take(self) -> Heard | None:
        """The next one; None when there has been nothing to do for a while."""
        with self._news:
            self._idle += 1
            leave_at = time.monotonic() + IDLE_S
            try:
                while not self._closed:
                    now = time.monotonic()
                    while self._later and self._later[0][0] <= now:
                        _, turn, replica = heapq.heappop(self._later)
                        if replica.turn == turn:
                            replica.turn = 0
                            self._ready.append(replica)
                    if len(self._ready) > 1:
                        self._call()
                    if self._ready:
                        return self._ready.popleft()
                    if now >= leave_at and (not self._later or self._idle > 1):
                        break
                    soonest = self._later[0][0] if self._later else now + IDLE_S
                    self._news.wait(max(0.01, min(soonest, max(leave_at, now + 1.0)) - now))
                self._threads -= 1
                return None
            finally:
                self._idle -= 1

    def _work(self) -> None:
        while (replica := self._take()) is not None:
            try:
                self._attend_to(replica)
            except Exception:
                log.exception("a log could not be read", key=replica.key)
                self._leave(replica)

    # one log ----------------------------------------------------------------------------------------------------------

    def _attend_to(self, replica: Heard) -> None:
        ended = replica.end is not None  # asked before reading: what is written before the end is read
        if not ended and (until := self._turned_away(replica.report.node)):
            with self._news:
                self._put_off(replica, until)
            return
        heard = self._collect(replica, follow=not ended)
        if ended or self._closed:
            self._leave(replica)
            return
        with self._news:
            now = time.monotonic()
            replica.tried_at = now
            replica.pause_s = REOPEN_S[0] if heard else min(max(replica.pause_s * 2, REFUSED_S), REOPEN_S[1])
            self._put_off(replica, now if replica.end is not None else now + replica.pause_s)

    def _leave(self, replica: Heard) -> None:
        try:
            if replica.end is not None and not self._closed:
                self._ended(replica)
        finally:
            with self._table.changed:
                replica.attended = False
                if not replica.alive:
                    self._table.mark(replica)

    def _turned_away(self, node: str) -> float:
        """When to come again, where the kubelet does not answer; 0: go on, for all of its node."""
        now = time.monotonic()
        with self._news:
            deaf = self._deaf.get(node)
            if deaf is None:
                return 0.0
            if now < deaf.until:
                return deaf.until
            deaf.until, deaf.asked = now + deaf.pause_s, True
            return 0.0

    def _learnt(self, node: str, answers: bool) -> None:
        now = time.monotonic()
        with self._news:
            deaf = self._deaf.get(node)
            if answers and deaf is not None:
                del self._deaf[node]
                for _, turn, replica in list(self._later):
                    if replica.turn == turn and replica.report.node == node:
                        self._hasten(replica)
            elif not answers and deaf is None:
                self._deaf[node] = Deaf(REFUSED_S, now + REFUSED_S)
            elif not answers and deaf is not None and deaf.asked:
                pause_s = min(deaf.pause_s * 2, REOPEN_S[1])
                self._deaf[node] = Deaf(pause_s, now + pause_s)

    def _collect(self, replica: Heard, follow: bool) -> bool:
        """Read its log to the end; whether it could be opened."""
        path, heard = f"{self._base}/pods/{replica.pod}/log", False

        def opened(since_s: int) -> Iterator[bytes]:
            nonlocal heard
            query = {"container": CONTAINER, "timestamps": "true"} | ({"follow": "true"} if follow else {})
            if since_s:
                query["sinceTime"] = datetime.fromtimestamp(since_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            replica.opening_at = time.monotonic()
            stream = replica.stream = self._api.stream(path, query, SILENCE_S if follow else 5.0)
            if self._closed:  # it came too late for `close` to see it
                stream.close()
            heard = True
            self._learnt(replica.report.node, True)
            self._sees(replica)
            for line in stream.lines():
                if STAMPED.match(line):
                    yield line
                else:  # the kubelet's own words: "unable to retrieve container logs"
                    heard = False

        with self._news:
            self._open[replica.key] = time.monotonic()
        try:
            collect(self._layout.log(replica.key), opened, self._table.take, self._limits, lambda: self._closed)
        except BackendUnreachable:
            if not heard:
                self._learnt(replica.report.node, False)
        except (Gone, Refused):
            pass  # it is tried again, or it has ended
        finally:
            replica.stream, replica.opening_at = None, 0.0
            with self._news:
                self._open.pop(replica.key, None)
            with self._table.lock:
                replica.blind_since = replica.blind_since or time.monotonic()
        return heard

    def _sees(self, replica: Heard) -> None:
        """Its log is open (again): what it did not say meanwhile is not held against it."""
        with self._table.lock:
            blind_s = time.monotonic() - replica.blind_since if replica.blind_since else 0.0
            replica.blind_since = replica.opening_at = 0.0
            if replica.progress is not None:
                replica.progress.step_at += blind_s
                replica.progress.beat_at += blind_s
