"""Live streams as server-sent events: the event log with resume, progress at most five times a second, log lines.

Called by the routes. Watchers pull at their own pace from a shared ring of recent events (from the store when they are
further behind), so a slow client holds nothing but its own connection, and ten watchers cost little more than one.
Never writes anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace

import anyio
import anyio.to_thread

from jobsched.api.wire import dump
from jobsched.core.answers import JobAnswer, LogLine
from jobsched.core.events import Stored
from jobsched.core.resources import JobId
from jobsched.errors import JobschedError
from jobsched.service import Service

KEEP_ALIVE_S = 10.0
BEAT_S = 0.2
"""Least time between two progress reports."""
PAGE = 1_000
RING = 4_096
MAX_LOG_READERS = 128
"""Threads that wait for log lines; further readers take turns."""
KEEP_ALIVE = b": keep-alive\n\n"
END = b"event: end\ndata: {}\n\n"



def frame(data: bytes, *, event: str = "", seq: int = 0) -> bytes:
    """One server-sent event; `data` is JSON on one line."""
    head = (f"event: {event}\n" if event else "") + (f"id: {seq}\n" if seq else "")
    return head.encode() + b"data: " + data + b"\n\n"


@dataclass(frozen=True, slots=True)
class Shown:
    """A job as a progress watcher sees it; equal `key`s look alike."""

    key: object
    answer: JobAnswer
    data: bytes


class Feed:
    """Carries the controller's notifications from its thread to the watchers on the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ring: deque[Stored] = deque(maxlen=RING)
        self._turn, self._beat = asyncio.Event(), asyncio.Event()
        self._beat_at = 0.0
        self._beat_due = False
        self._dirty: set[JobId] = set()
        self._shown: dict[JobId | None, asyncio.Future[tuple[Shown, ...]]] = {}
        self._log_threads = anyio.CapacityLimiter(MAX_LOG_READERS)
        self.closed = False
        self.watchers = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listens to the controller while the application lives."""
        loop = asyncio.get_running_loop()

        def listener(batch: Sequence[Stored], progressed: frozenset[JobId]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended; nobody watches any more
                loop.call_soon_threadsafe(self._publish, tuple(batch), progressed)

        unsubscribe = self._service.live.subscribe(listener)
        try:
            yield
        finally:
            unsubscribe()
            self.close()

    def close(self) -> None:
        """End every stream, without `end`: clients come back when the server does. On the event loop only."""
        self.closed = True
        self._turn.set()
        self._beat.set()

    def _publish(self, batch: Sequence[Stored], progressed: frozenset[JobId]) -> None:
        if batch and self._ring and batch[0].seq != self._ring[-1].seq + 1:
            self._ring.clear()  # a gap: watchers read the store instead
        self._ring.extend(batch)
        self._dirty |= progressed
        self._dirty.update(job_id for s in batch if (job_id := s.event.job_id))
        if batch:
            self._turn, turn = asyncio.Event(), self._turn
            turn.set()
        if not self._beat_due:
            self._beat_due = True
            wait_s = max(0.0, self._beat_at + BEAT_S - time.monotonic())
            asyncio.get_running_loop().call_later(wait_s, self._strike)

    def _strike(self) -> None:
        self._beat_at, self._beat_due = time.monotonic(), False
        self._shown = {}
        self._beat, beat = asyncio.Event(), self._beat
        beat.set()

    async def _wait(self, signal: asyncio.Event) -> bool:
        """Whether there is news; False when it is time for a keep-alive."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KEEP_ALIVE_S):
                await signal.wait()
                return True
        return False

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        self.watchers += 1
        try:
            yield
        finally:
            self.watchers -= 1

    # ---- events ----

    async def events(self, after: int, job_id: JobId | None) -> AsyncIterator[bytes]:
        """Every event with seq > after (of one job), its seq being the id. The stream of one job ends with the job."""
        cursor, overdue = after, True
        with self._watching():
            yield b": connected\n\n"
            while not self.closed:
                turn = self._turn
                stored, cursor, more = await self._since(cursor, job_id, overdue)
                if stored:
                    yield b"".join(frame(dump(Stored, s), seq=s.seq) for s in stored)
                if more:
                    continue
                if job_id is not None and (stored or overdue) and (await self._look(job_id)).job.phase.terminal:
                    late, cursor, _ = await self._since(cursor, job_id, True)  # what came between the two looks
                    yield b"".join(frame(dump(Stored, s), seq=s.seq) for s in late) + END
                    return
                overdue = not await self._wait(turn)
                if overdue and not self.closed:
                    yield KEEP_ALIVE

    async def _since(
        self, cursor: int, job_id: JobId | None, overdue: bool
    ) -> tuple[Sequence[Stored], int, bool]:
        """Events after the cursor, the new cursor, and whether there may be more. From the ring where it reaches back
        far enough; `overdue` asks the store in any case, because another server may be the one that leads."""
        ring = self._ring
        head = ring[-1].seq if ring else 0
        if ring and ring[0].seq <= cursor + 1 and (cursor < head or not overdue):
            first = max(0, cursor + 1 - ring[0].seq)
            found = [ring[i] for i in range(first, min(len(ring), first + PAGE))]
            cursor = found[-1].seq if found else cursor
            return [s for s in found if job_id in (None, s.event.job_id)], cursor, cursor < head
        if job_id is None:
            stored = await anyio.to_thread.run_sync(self._service.read, cursor, PAGE)
        else:
            stored = await anyio.to_thread.run_sync(
                lambda: self._service.events(job_id, after=cursor, limit=PAGE)
            )
        more = len(stored) == PAGE
        cursor = stored[-1].seq if stored else cursor
        return stored, cursor if more else max(cursor, head), more

    # ---- progress ----

    async def progress(self, job_id: JobId | None) -> AsyncIterator[bytes]:
        """The answer of one job (or of every job that is active or changes) whenever it looks different; the stream of
        one job ends with the job."""
        seen: dict[JobId, object] = {}
        with self._watching():
            yield b": connected\n\n"
            while not self.closed:
                beat = self._beat
                fresh = [s for s in await self._shown_now(job_id) if seen.get(s.answer.job.id) != s.key]
                if fresh:
                    seen |= {s.answer.job.id: s.key for s in fresh}
                    yield b"".join(frame(s.data) for s in fresh)
                for shown in fresh:
                    if shown.answer.job.phase.terminal:
                        del seen[shown.answer.job.id]
                        if job_id is not None:
                            yield END
                            return
                if not await self._wait(beat) and not self.closed:
                    yield KEEP_ALIVE

    async def _shown_now(self, job_id: JobId | None) -> tuple[Shown, ...]:
        """Looked up once a beat, whoever asks."""
        known = self._shown.get(job_id)
        if known is None:
            if job_id is None:
                dirty, self._dirty = self._dirty, set()
                looking = anyio.to_thread.run_sync(self._look_at_all, dirty)
            else:
                looking = anyio.to_thread.run_sync(self._look_at, job_id)
            known = self._shown[job_id] = asyncio.ensure_future(looking)
        return await asyncio.shield(known)

    def _look_at_all(self, dirty: set[JobId]) -> tuple[Shown, ...]:
        return tuple(map(_show, self._service.lively(dirty)))

    def _look_at(self, job_id: JobId) -> tuple[Shown, ...]:
        return (_show(self._service.get(job_id)),)

    async def _look(self, job_id: JobId) -> JobAnswer:
        return await anyio.to_thread.run_sync(self._service.get, job_id)

    # ---- logs ----

    async def lines(
        self, batches: Iterator[tuple[LogLine, ...]], batch: tuple[LogLine, ...] | None
    ) -> AsyncIterator[bytes]:
        """Log lines until there are no more, from the first `batch` on (see `next_batch`; taken before the answer
        begins, so that what is wrong from the start has its HTTP status). A later error is `event: error`."""
        told_at = time.monotonic()
        try:
            with self._watching():
                while not self.closed:
                    if batch is None:
                        yield END
                        return
                    if batch:
                        yield b"".join(frame(dump(LogLine, line)) for line in batch)
                        told_at = time.monotonic()
                    elif time.monotonic() - told_at > KEEP_ALIVE_S:
                        yield KEEP_ALIVE
                        told_at = time.monotonic()
                    batch = await self.next_batch(batches)
        except JobschedError as exc:
            yield frame(dump(dict[str, object], exc.to_wire()), event="error") + END
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    async def next_batch(self, batches: Iterator[tuple[LogLine, ...]]) -> tuple[LogLine, ...] | None:
        """The next batch, waited for on a thread of the log readers; None at the end."""
        return await anyio.to_thread.run_sync(next, batches, None, limiter=self._log_threads)


def _show(answer: JobAnswer) -> Shown:
    progress = answer.progress
    if progress is not None:  # ages change all the time and are no news
        still = tuple(replace(r, step_age_ms=0, beat_age_ms=0) for r in progress.replicas)
        progress = replace(progress, replicas=still)
    key = (answer.job.version, answer.headline, progress)
    return Shown(key, answer, dump(JobAnswer, answer))
