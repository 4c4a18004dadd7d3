"""Logs of a job: which replicas ever ran, read from the event log, and their output merged into one stream of lines.

Called by `service` for `jobsched logs`. Reads through the Store and Backend ports, with one thread per replica that is
followed; never writes anything, never decides anything.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jobsched.core import events as ev
from jobsched.core.answers import LogLine
from jobsched.core.events import Stored
from jobsched.core.job import Job, Replica, ReplicaId, ReplicaState, replica_id
from jobsched.core.judge import ranks
from jobsched.core.launch import LaunchKey, launch_key
from jobsched.core.lifecycle import evolve_job
from jobsched.core.resources import JobId
from jobsched.errors import BackendUnreachable, UsageError
from jobsched.ports import Backend, LogChunk, Store

MAX_FOLLOWED = 64
"""Replicas that one reader may follow at once; each takes a thread here and a connection to the engine."""
BATCH_LINES = 500
LONGEST_LINE = 64 * 1024
BEAT_S = 0.5
"""A follower yields at least this often, if only an empty batch, so that its reader can stop or send a keep-alive."""

Listener = Callable[[Sequence[Stored], frozenset[JobId]], None]
"""Told of new events, and of the jobs whose progress changed."""
Subscribe = Callable[[Listener], Callable[[], None]]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which replicas; None and "" select all. `attempt` None: the last one, 0: every one."""

    role: str = ""
    index: int | None = None
    rank: int | None = None
    attempt: int | None = None
    grep: str = ""
    """Only lines that hold this text."""

    def takes(self, source: Source) -> bool:
        return (
            self.role in ("", source.role)
            and self.index in (None, source.index)
            and self.rank in (None, source.rank)
            and self.attempt in (None, 0, source.attempt)
        )


@dataclass(frozen=True, slots=True)
class Source:
    """One start of one replica."""

    key: LaunchKey
    attempt: int
    role: str
    index: int
    restart: int
    rank: int


class Roster:
    """Folds a job's events into the list of everything that ever ran."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.seq = 0
        self.sources: dict[LaunchKey, Source] = {}
        self._ranks: dict[ReplicaId, int] = {}

    def feed(self, stored: Iterable[Stored]) -> list[Source]:
        """Apply events; returns the sources that are new."""
        before = len(self.sources)
        for item in stored:
            event, self.seq = item.event, item.seq
            assert not isinstance(event, ev.ClusterEvent)
            self.job = evolve_job(self.job, event)
            match event:
                case ev.AttemptPlaced() | ev.ReplicasBound() | ev.ReplicasGone():
                    self._ranks = ranks(self.job)
                case ev.ReplicasStarted() | ev.AttemptStarted() | ev.ReplicasLost():
                    for rid in event.replicas:
                        self._add(self.job.replicas[rid])
                case ev.ReplicaExited():
                    self._add(self.job.replicas[replica_id(event.role, event.index)])
                case _:
                    pass
        return list(self.sources.values())[before:]

    def live(self, source: Source) -> bool:
        """Whether this start of the replica has not ended yet, as far as the log tells."""
        if self.job is None or source.attempt != self.job.attempt:
            return False
        replica = self.job.replicas.get(replica_id(source.role, source.index))
        return (
            replica is not None
            and replica.restart == source.restart
            and replica.state in (ReplicaState.RUNNING, ReplicaState.STOPPING)
        )

    def _add(self, replica: Replica) -> None:
        assert self.job is not None
        key = launch_key(self.job.id, self.job.attempt, replica.role, replica.index, replica.restart)
        rank = self._ranks.get(replica.id, -1)
        self.sources.setdefault(
            key, Source(key, self.job.attempt, replica.role, replica.index, replica.restart, rank)
        )


class LogReader:
    """Reads the logs of jobs. Thread-safe; every call of `read` stands alone."""

    def __init__(self, store: Store, backend: Backend, subscribe: Subscribe) -> None:
        self._store = store
        self._backend = backend
        self._subscribe = subscribe

    def read(
        self, job_id: JobId, selection: Selection, *, follow: bool = False, tail: int | None = None
    ) -> Iterator[tuple[LogLine, ...]]:
        """Batches of lines: replica after replica without `follow`, as they are written with it (then until the job is
        terminal, across restarts and attempts, with an empty batch at least every `BEAT_S`). `tail` keeps the last
        lines of every replica that has any."""
        roster = Roster()
        for page in self._history(job_id, roster):
            roster.feed(page)
        attempts = [s.attempt for s in roster.sources.values()]
        first = selection.attempt if selection.attempt is not None else max(attempts, default=0)
        chosen = [s for s in roster.sources.values() if selection.takes(s) and (first == 0 or s.attempt >= first)]
        chosen.sort(key=lambda s: (s.attempt, s.rank < 0, s.rank, s.role, s.index, s.restart))
        if follow:
            yield from self._follow(job_id, selection, roster, chosen, tail)
        else:
            for source in chosen:
                yield from self._whole(source, selection, tail)

    def _history(self, job_id: JobId, roster: Roster) -> Iterator[Sequence[Stored]]:
        while page := self._store.history(job_id, after=roster.seq):
            yield page

    # ---- what has been written ----

    def _whole(self, source: Source, selection: Selection, tail: int | None) -> Iterator[tuple[LogLine, ...]]:
        if tail is not None:
            lines, _ = self._tail(source, selection, tail, whole_lines=False)
            yield tuple(lines)
            return
        splitter = Splitter(source, selection.grep)
        with suppress(BackendUnreachable):  # one node that does not answer must not hide the others' logs
            for chunk in self._backend.logs(source.key):
                yield from splitter.feed(chunk)
        yield from splitter.rest()

    def _tail(
        self, source: Source, selection: Selection, count: int, *, whole_lines: bool
    ) -> tuple[list[LogLine], int]:
        """The last `count` lines and the offset behind them; reads backwards in growing steps."""
        reach = max(64 * 1024, 200 * count)
        while True:
            splitter, start = Splitter(source, selection.grep), 0
            kept: deque[LogLine] = deque(maxlen=count)
            for number, chunk in enumerate(self._backend.logs(source.key, offset=-reach)):
                start = chunk.offset if number == 0 else start
                for batch in splitter.feed(chunk):
                    kept.extend(batch)
            if not whole_lines:
                for batch in splitter.rest():
                    kept.extend(batch)
            cut = bool(start and kept and kept[0].offset == start)  # the first line began before what was read
            if start == 0 or (len(kept) == count and not cut) or reach >= 1 << 30:
                return list(kept), splitter.offset
            reach *= 8

    # ---- what is being written ----

    def _follow(
        self, job_id: JobId, selection: Selection, roster: Roster, chosen: Sequence[Source], tail: int | None
    ) -> Iterator[tuple[LogLine, ...]]:
        inbox: queue.Queue[tuple[LogLine, ...] | None] = queue.Queue(maxsize=64)
        closed, news = threading.Event(), threading.Event()
        readers: list[threading.Thread] = []

        def on_events(batch: Sequence[Stored], _: frozenset[JobId]) -> None:
            if any(s.event.job_id == job_id for s in batch):
                news.set()
                with suppress(queue.Full):
                    inbox.put_nowait(None)

        unsubscribe = self._subscribe(on_events)
        try:
            fresh: Sequence[Source] = chosen
            quiet = 0
            while True:
                for source in fresh:
                    if not roster.live(source):
                        yield from self._whole(source, selection, tail)
                        continue
                    if len(readers) >= MAX_FOLLOWED:
                        raise UsageError(
                            f"more than {MAX_FOLLOWED} replicas would be followed at once",
                            hint="choose some with --role, --index or --rank",
                        )
                    readers.append(self._spawn(source, selection, tail, inbox, closed))
                tail = None  # replicas that start from now on are read from their beginning
                try:
                    yield inbox.get(timeout=BEAT_S) or ()
                    quiet = 0
                except queue.Empty:
                    quiet += 1
                    yield ()
                readers = [r for r in readers if r.is_alive()]
                fresh = ()
                if news.is_set() or quiet >= 4:  # news may be missed while another server leads: look anyway
                    news.clear()
                    quiet = 0
                    found = [source for page in self._history(job_id, roster) for source in roster.feed(page)]
                    fresh = [source for source in found if selection.takes(source)]
                done = roster.job is None or roster.job.phase.terminal
                if done and not fresh and not readers and inbox.empty():
                    return
        finally:
            closed.set()
            unsubscribe()

    def _spawn(
        self, source: Source, selection: Selection, tail: int | None,
        inbox: queue.Queue[tuple[LogLine, ...] | None], closed: threading.Event,
    ) -> threading.Thread:  # fmt: skip
        def put(batch: tuple[LogLine, ...]) -> None:
            while not closed.is_set():  # a slow reader slows its own threads down and nobody else
                with suppress(queue.Full):
                    inbox.put(batch, timeout=BEAT_S)
                    return

        def run() -> None:
            with suppress(BackendUnreachable):
                offset = 0
                if tail is not None:
                    lines, offset = self._tail(source, selection, tail, whole_lines=True)
                    put(tuple(lines))
                splitter = Splitter(source, selection.grep)
                for chunk in self._backend.logs(source.key, offset, follow=True, timeout_ms=int(BEAT_S * 1_000)):
                    for batch in splitter.feed(chunk):
                        put(batch)
                    if closed.is_set():
                        return
                for batch in splitter.rest():
                    put(batch)

        thread = threading.Thread(target=run, name=f"logs {source.key}", daemon=True)
        thread.start()
        return thread


class Splitter:
    """Bytes of one replica's log into lines; `\\n`, `\\r\\n` and `\\r` (progress bars) end a line."""

    def __init__(self, source: Source, grep: str = "") -> None:
        self.offset = 0
        """Where the line that is being collected begins."""
        self._source = source
        self._grep = grep
        self._rest = b""

    def feed(self, chunk: LogChunk) -> Iterator[tuple[LogLine, ...]]:
        """Whole lines so far, in batches. A gap (the head was rotated away) ends the line that was being collected."""
        if chunk.offset != self.offset + len(self._rest):
            yield from self.rest()
            self.offset = chunk.offset
        pieces = (self._rest + chunk.data).splitlines(keepends=True)
        self._rest = b""
        if pieces and not pieces[-1].endswith(b"\n") and len(pieces[-1]) < LONGEST_LINE:
            self._rest = pieces.pop()  # also after a \r: its \n may come with the next chunk
        yield from self._batches(pieces)

    def rest(self) -> Iterator[tuple[LogLine, ...]]:
        """The last line, which has no end."""
        if self._rest:
            piece, self._rest = self._rest, b""
            yield from self._batches([piece])

    def _batches(self, pieces: Sequence[bytes]) -> Iterator[tuple[LogLine, ...]]:
        source, batch = self._source, []
        for piece in pieces:
            text = piece.rstrip(b"\r\n").decode(errors="replace")
            if self._grep in text:
                batch.append(
                    LogLine(source.role, source.index, source.rank, source.attempt, source.restart, self.offset, text)
                )
            self.offset += len(piece)
            if len(batch) == BATCH_LINES:
                yield tuple(batch)
                batch = []
        if batch:
            yield tuple(batch)


