"""The durable store: event log and projections in one SQL database, by SQLAlchemy Core. SQLite is the default;
PostgreSQL differs only in `_BEGIN` and in `statements.put`.

Made by `wiring`, called by service, controller and API threads alike. Writers are let in one at a time (`BEGIN
IMMEDIATE`; an advisory lock on PostgreSQL), so numbers have no gaps and readers see the log grow only at its end.
Appends of threads that wait for their turn are committed together, with one fsync (group commit). Several processes
may share a database. Decides nothing: what an append means is in `projections.py`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from pydantic import ValidationError
from sqlalchemy import URL, Connection, Executable, Row, Select, create_engine, event, func, make_url, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from jobsched.core.events import (
    EVENT,
    AttemptEnded,
    Event,
    JobEdited,
    JobEvent,
    JobSubmitted,
    QueueDefined,
    Stored,
)
from jobsched.core.job import Job, Phase
from jobsched.core.recall import Recall
from jobsched.core.resources import JobId
from jobsched.errors import StoreUnavailable
from jobsched.ports import Appended, JobQuery, Lease, Loaded, Sample, Usage
from jobsched.store import codec, schema, statements
from jobsched.store.projections import (
    NodeEvent,
    Projections,
    assert_wishes,
    check_fence,
    loaded,
    next_lease,
    node_of,
    request_of,
)

Durability = Literal["FULL", "NORMAL"]
"""FULL: an append that returned survives a power cut (one fsync per commit). NORMAL: it survives any crash of jobsched,
but the last moments before a power cut may be lost; whole commits from the end, never a part."""

Mode = Literal["read", "write", "lossy"]
"""lossy: a write that need not survive a power cut."""

CHUNK: Final = 500
"""Values in one `IN (…)`."""
LIVE: Final = tuple(p.value for p in Phase if not p.terminal)
_WRITER_LOCK: Final = 0x6A6F6273
"""Key of PostgreSQL's advisory lock that stands for "the writer"."""

_BEGIN: Final[Mapping[tuple[str, Mode], tuple[str, ...]]] = {
    ("sqlite", "read"): ("BEGIN",),
    ("sqlite", "write"): ("BEGIN IMMEDIATE",),
    ("sqlite", "lossy"): ("BEGIN IMMEDIATE",),
    ("postgresql", "read"): ("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",),
    ("postgresql", "write"): (f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})",),
    ("postgresql", "lossy"): ("SET LOCAL synchronous_commit = off", f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})"),
}
"""What opens a transaction: one snapshot for readers, one writer at a time."""

_HINTS: Final = {
    "SQLITE_BUSY": "another process holds the database; end it, or try again",
    "SQLITE_LOCKED": "another process holds the database; end it, or try again",
    "SQLITE_FULL": "the disk is full: make room, nothing was lost",
    "SQLITE_IOERR": "the disk reports errors or is full; look at the system's log",
    "SQLITE_READONLY": "the database cannot be written; look at the owner and mode of the file and its directory",
    "SQLITE_CANTOPEN": "create the directory, or look at the owner and mode of the file",
    "SQLITE_CORRUPT": "the file is damaged; restore a backup",
    "SQLITE_NOTADB": "the file is not a jobsched database; restore a backup, or name another file",
}


@dataclass(slots=True, eq=False)
class _Append:
    """One caller's events waiting for a commit; `bodies` by the `id` of the event."""

    events: Sequence[Event]
    expected: Mapping[JobId, int]
    fence: int | None
    bodies: Mapping[int, str]
    answer: Future[Appended] = field(default_factory=Future)
    turn: threading.Event = field(default_factory=threading.Event)
    """Set when the answer is there, or it is up to this caller to commit."""


class SqlStore:
    """A `Store` on the database at `url`, for example `sqlite:////var/lib/jobsched/jobsched.db`; made when missing, and
    brought to the newest schema.

    `remember` bounds how many recently folded jobs are kept decoded. Raises `StoreUnavailable`.
    """

    def __init__(
        self,
        url: str | URL,
        *,
        synchronous: Durability = "FULL",
        busy_timeout_ms: int = 20_000,
        remember: int = 10_000,
    ) -> None:
        address = make_url(url)
        self._dialect = address.get_backend_name()
        self._what = address.render_as_string(hide_password=True)
        self._synchronous = synchronous
        self._writer = threading.Lock()
        """Held while writing, so that threads of this process do not meet in SQLite's busy loop."""
        self._gate = threading.Lock()
        """Guards the two that follow."""
        self._waiting: list[_Append] = []
        self._led = False
        """Whether somebody commits, or is about to."""
        self._recent: OrderedDict[JobId, Job] = OrderedDict()
        """Guarded by `_writer`; a job counts only if the row still has its version."""
        self._remember = remember
        self._written: dict[int, Stored] = {}
        self._put_node = statements.put(schema.nodes, self._dialect)
        self._put_recall = statements.put(schema.recall, self._dialect)
        self._put_queue = statements.put(schema.queues, self._dialect)
        connect: dict[str, object] = {}
        if self._dialect == "sqlite":
            # isolation_level None: the driver never begins a transaction behind SQLAlchemy's back.
            connect = {"timeout": busy_timeout_ms / 1_000, "isolation_level": None}
        self._engine = create_engine(address, connect_args=connect, pool_size=16, max_overflow=64)
        event.listen(self._engine, "connect", self._connected)
        event.listen(self._engine, "begin", self._begin)
        self._open(address)

    def _open(self, address: URL) -> None:
        with self._translated():
            if self._dialect == "sqlite":
                self._prepare_file(address)
            with self._transaction("read") as connection:
                version = schema.version(connection)
            if version != schema.HEAD:
                with self._transaction("write") as connection:
                    schema.migrate(connection)

    def _prepare_file(self, address: URL) -> None:
        """Make the file for its owner alone (jobs carry environments), and switch it to write-ahead logging."""
        if address.database and not address.database.startswith("file:"):
            try:
                os.close(os.open(address.database, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as exc:
                raise StoreUnavailable(
                    f"the store {self._what} cannot be opened: {exc.strerror}", hint=_HINTS["SQLITE_CANTOPEN"]
                ) from exc
        raw = self._engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA journal_mode = WAL")
        finally:
            raw.close()

    def _connected(self, raw: Any, _: object) -> None:
        if self._dialect == "sqlite":
            raw.execute("PRAGMA foreign_keys = ON")

    def _begin(self, connection: Connection) -> None:
        mode: Mode = connection.get_execution_options()["mode"]
        if self._dialect == "sqlite" and mode != "read":
            level = "NORMAL" if mode == "lossy" else self._synchronous
            if connection.info.get("synchronous") != level:
                connection.exec_driver_sql(f"PRAGMA synchronous = {level}")
                connection.info["synchronous"] = level
        for statement in _BEGIN[self._dialect, mode]:
            connection.exec_driver_sql(statement)

    @contextmanager
    def _transaction(self, mode: Mode) -> Iterator[Connection]:
        with self._translated(), self._engine.connect() as connection:
            connection.execution_options(mode=mode)
            with connection.begin():
                yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Driver errors and unreadable documents become `StoreUnavailable`, chained."""
        try:
            yield
        except (DBAPIError, sqlite3.Error) as exc:
            cause = exc.orig if isinstance(exc, DBAPIError) else exc
            name = getattr(cause, "sqlite_errorname", "")
            hint = next((text for prefix, text in _HINTS.items() if name.startswith(prefix)), "is the database up?")
            raise StoreUnavailable(f"the store {self._what} failed: {cause}", hint=hint) from exc
        except PoolTimeout as exc:
            raise StoreUnavailable(f"the store {self._what} is overloaded", hint="try again") from exc
        except ValidationError as exc:
            raise StoreUnavailable(
                f"the store {self._what} holds a document that cannot be read: {exc}", hint=_HINTS["SQLITE_CORRUPT"]
            ) from exc

    # ---- append ----

    def append(
        self, events: Sequence[Event], expected: Mapping[JobId, int] | None = None, fence: int | None = None
    ) -> Appended:
        if fence is None:
            assert_wishes(events)
        mine = _Append(events, expected or {}, fence, {id(e): EVENT.dump_json(e).decode() for e in events})
        try:
            with self._gate:
                self._waiting.append(mine)
                if not self._led:
                    mine.turn.set()  # before the mark: Ctrl-C may come between the two
                    self._led = True
            mine.turn.wait()
            if not mine.answer.done():
                self._lead()
        except BaseException:  # Ctrl-C while waiting: nobody must wait for a leader who has left
            with self._gate:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                    if mine.turn.is_set():
                        self._hand_over()
            raise
        return mine.answer.result()

    def _lead(self) -> None:
        """Commit for all who wait, then let the first of those who came meanwhile lead. Those answered go their way
        without another lock: where all pass through one, they queue up there and come back one by one."""
        with self._writer:
            with self._gate:
                appends, self._waiting = self._waiting, []
            try:
                self._commit(appends)
            finally:
                with self._gate:
                    self._hand_over()

    def _hand_over(self) -> None:
        if self._waiting:
            self._waiting[0].turn.set()
        else:
            self._led = False

    def _commit(self, appends: Sequence[_Append]) -> None:
        """One transaction for all. An append that is refused leaves the others alone; every one gets its answer."""
        answers: list[Appended | Exception] = []
        fresh: dict[int, tuple[Event, str]] = {}
        try:
            with self._transaction("write") as connection:
                head = connection.execute(statements.HEAD).one()
                now = self._touched(connection, head.seq or 0, [e for a in appends for e in a.events])
                for one in appends:
                    end = now.seq
                    try:
                        check_fence(one.fence, head.fence)
                        answers.append(appended := now.append(one.events, one.expected))
                    except Exception as exc:  # this caller's mistake or bad luck, not the others'
                        answers.append(exc)
                    else:
                        fresh |= {s.seq: (s.event, one.bodies[id(s.event)]) for s in appended.stored if s.seq > end}
                self._write(connection, now, fresh)
        except BaseException as exc:
            answers = [exc if isinstance(exc, Exception) else StoreUnavailable("interrupted")] * len(appends)
            if not isinstance(exc, Exception):
                raise
        else:
            self._keep(now.jobs.values())
            self._keep_events({seq: Stored(seq, event) for seq, (event, _) in fresh.items()})
        finally:
            for one, answer in zip(appends, answers, strict=True):
                if isinstance(answer, Appended):
                    one.answer.set_result(answer)
                else:
                    one.answer.set_exception(answer)
                one.turn.set()

    def _keep_events(self, fresh: Mapping[int, Stored]) -> None:
        """What this process wrote, its own leader reads next: no need to decode it."""
        self._written |= fresh
        while len(self._written) > self._remember:
            del self._written[next(iter(self._written))]

    def _touched(self, connection: Connection, seq: int, events: Sequence[Event]) -> Projections:
        """The projections as far as these events need them."""
        ids = dict.fromkeys(e.job_id for e in events if isinstance(e, JobEvent))
        names = dict.fromkeys(node_of(e) for e in events if isinstance(e, NodeEvent))
        requests = dict.fromkeys(r for e in events if (r := request_of(e)) is not None)
        return Projections(
            seq,
            self._jobs_now(connection, list(ids)),
            codec.nodes(_rows_in(connection, statements.NODES_OF, list(names))),
            {},
            {
                (row.owner, row.request_id): codec.stored(row)
                for row in _rows_in(connection, statements.REQUESTS_OF, list(requests))
            },
        )

    def _jobs_now(self, connection: Connection, ids: Sequence[JobId]) -> dict[JobId, Job]:
        """Jobs as they are in the database; those folded lately by this process need no decoding."""
        jobs: dict[JobId, Job] = {}
        unknown: list[JobId] = []
        for job_id, version in _rows_in(connection, statements.VERSIONS_OF, ids):
            job = self._recent.get(job_id)
            if job is not None and job.version == version:
                jobs[job_id] = job
            else:
                unknown.append(job_id)
        return jobs | _decoded(connection, unknown)

    def _keep(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._recent[job.id] = job
            self._recent.move_to_end(job.id)
        while len(self._recent) > self._remember:
            self._recent.popitem(last=False)

    def _write(self, connection: Connection, now: Projections, fresh: Mapping[int, tuple[Event, str]]) -> None:
        """The log's new rows, and the rows of what they changed."""
        events = [e for e, _ in fresh.values()]
        new = {e.job_id: now.jobs[e.job_id] for e in events if isinstance(e, JobSubmitted)}
        changed = {e.job_id: now.jobs[e.job_id] for e in events if isinstance(e, JobEvent) and e.job_id not in new}
        names = dict.fromkeys(node_of(e) for e in events if isinstance(e, NodeEvent))
        queues = dict.fromkeys(e.queue.name for e in events if isinstance(e, QueueDefined))
        _execute(connection, statements.INSERT_EVENT, [
            {"seq": seq, "at_ms": e.at_ms, "job_id": e.job_id, "kind": e.kind, "body": body}
            for seq, (e, body) in fresh.items()
        ])  # fmt: skip
        _execute(connection, statements.INSERT_JOB, [codec.new_job_row(job) for job in new.values()])
        _execute(connection, statements.UPDATE_JOB, [codec.job_row(job) for job in changed.values()])
        edited = {e.job_id: now.jobs[e.job_id] for e in events
                  if isinstance(e, JobEdited | AttemptEnded) and now.jobs[e.job_id].edits}  # fmt: skip
        _execute(connection, statements.UPDATE_SPEC, [codec.edited_row(job) for job in edited.values()])
        _execute(connection, statements.DELETE_LABELS, [{"key": job_id} for job_id in edited])
        labelled = new | edited
        labels = [row for job in labelled.values() for row in codec.label_rows(job)]
        _execute(connection, statements.INSERT_LABEL, labels)
        _execute(connection, statements.INSERT_REQUEST, [
            {"owner": request[0], "request_id": request[1], "seq": seq}
            for seq, (e, _) in fresh.items() if (request := request_of(e)) is not None
        ])  # fmt: skip
        _execute(connection, self._put_node, [codec.node_row(name, now.nodes[name]) for name in names])
        _execute(connection, self._put_queue, [
            {"name": name, "doc": now.queues[name].model_dump_json()} for name in queues
        ])  # fmt: skip

    # ---- the log ----

    def read(self, after: int, limit: int = 10_000) -> Sequence[Stored]:
        with self._transaction("read") as connection:
            rows = connection.execute(statements.NEWS, {"after": after, "limit": limit}).all()
        return tuple(self._written.get(row.seq) or codec.stored(row) for row in rows)

    def history(self, job_id: JobId, after: int = 0, limit: int = 10_000) -> Sequence[Stored]:
        return self._log(statements.LOG.where(schema.events.c.job_id == job_id, schema.events.c.seq > after), limit)

    def _log(self, statement: Select[int, str], limit: int) -> Sequence[Stored]:
        with self._transaction("read") as connection:
            rows = connection.execute(statement.limit(limit)).all()
        return tuple(self._written.get(row.seq) or codec.stored(row) for row in rows)

    def last_seq(self) -> int:
        with self._transaction("read") as connection:
            return connection.execute(statements.HEAD).one().seq or 0

    # ---- projections ----

    def load(self) -> Loaded:
        live = statements.DOCS.where(schema.jobs.c.phase.in_(LIVE)).order_by(*statements.PLACE)
        with self._transaction("read") as connection:
            return loaded(
                connection.execute(statements.HEAD).one().seq or 0,
                [codec.decode_job(spec, doc) for spec, doc in connection.execute(live)],
                codec.nodes(connection.execute(statements.NODES)),
                [codec.QUEUE.validate_json(doc) for doc in connection.scalars(select(schema.queues.c.doc))],
            )

    def job(self, job_id: JobId) -> Job | None:
        with self._transaction("read") as connection:
            row = connection.execute(statements.DOCS.where(schema.jobs.c.id == job_id)).one_or_none()
            return None if row is None else codec.decode_job(*row)

    def jobs(self, query: JobQuery) -> Sequence[Job]:
        with self._transaction("read") as connection:
            before = None
            if query.before is not None:
                place = select(*statements.PLACE).where(schema.jobs.c.id == query.before)
                before = connection.execute(place).one_or_none()
                if before is None:
                    return ()
            # One walk down an index for each phase costs a page each; `phase IN (…)` would sort all that is in them.
            phases = query.phases or (tuple(Phase) if query.owner or query.queue else (None,))
            places = [
                (row.submitted_at_ms, row.id)
                for phase in dict.fromkeys(phases)
                for row in connection.execute(statements.listing(query, phase, before))
            ]
            page = [job_id for _, job_id in sorted(places, reverse=True)[: query.limit]]
            jobs = _decoded(connection, page)
            return tuple(jobs[job_id] for job_id in page)

    def count(self, by: Literal["phase", "queue"] = "phase") -> Mapping[str, int]:
        column = schema.jobs.c[by]
        statement = select(column, func.count()).group_by(column)
        if by == "queue":
            statement = statement.where(schema.jobs.c.phase.in_(LIVE))
        with self._transaction("read") as connection:
            return {name: number for name, number in connection.execute(statement)}  # noqa: C416  # dict() of rows has no types

    def usage(self, since_ms: int, now_ms: int) -> Sequence[Usage]:
        with self._transaction("read") as connection:
            rows = connection.execute(statements.USAGE, {"since_ms": since_ms, "now_ms": now_ms})
            return tuple(Usage(queue, owner, *map(int, sums)) for queue, owner, *sums in rows)

    # ---- samples ----

    def add_samples(self, samples: Sequence[Sample]) -> None:
        ids = list(dict.fromkeys(s.job_id for s in samples))
        with self._writer, self._transaction("lossy") as connection:
            last = {job_id: n or 0 for job_id, n in _rows_in(connection, statements.LAST_SAMPLE_OF, ids)}
            rows: list[dict[str, object]] = []
            for sample in samples:
                if sample.job_id in last:
                    last[sample.job_id] += 1
                    rows.append(asdict(sample) | {"n": last[sample.job_id], "metrics": json.dumps(sample.metrics)})
            _execute(connection, statements.INSERT_SAMPLE, rows)
            _execute(connection, statements.PRUNE_SAMPLES, [{"key": job_id, "last": n} for job_id, n in last.items()])

    def samples(self, job_id: JobId, limit: int = 1_000) -> Sequence[Sample]:
        table = schema.samples
        newest = select(table).where(table.c.job_id == job_id).order_by(table.c.n.desc()).limit(limit)
        with self._transaction("read") as connection:
            return tuple(codec.sample(row) for row in reversed(connection.execute(newest).all()))

    # ---- what a leader knows besides ----

    def keep_recall(self, recall: Recall, fence: int) -> None:
        row = {"id": 1, "body": codec.RECALL.dump_json(recall).decode()}
        with self._writer, self._transaction("lossy") as connection:
            check_fence(fence, connection.execute(statements.LEASE).one().fence)
            connection.execute(self._put_recall, row)

    def recall(self) -> Recall | None:
        with self._transaction("read") as connection:
            body = connection.execute(select(schema.recall.c.body)).scalar()
        try:
            return codec.RECALL.validate_json(body) if body else None
        except ValidationError:  # of another version: it is learned anew
            return None

    # ---- lease ----

    def lease(self, holder: str, ttl_ms: int, now_ms: int) -> Lease | None:
        with self._writer, self._transaction("write") as connection:
            granted = next_lease(Lease(*connection.execute(statements.LEASE).one()), holder, ttl_ms, now_ms)
            if granted is not None:
                connection.execute(update(schema.lease).values(asdict(granted)))
            return granted

    def release(self, holder: str) -> None:
        freed = update(schema.lease).where(schema.lease.c.holder == holder).values(holder="", expires_ms=0)
        with self._writer, self._transaction("write") as connection:
            connection.execute(freed)

    def close(self) -> None:
        self._engine.dispose()


def _execute(connection: Connection, statement: Executable, rows: Sequence[Mapping[str, object]]) -> None:
    if rows:
        connection.execute(statement, rows)


def _rows_in(
    connection: Connection, statement: Select[*tuple[Any, ...]], keys: Sequence[object]
) -> Iterator[Row[*tuple[Any, ...]]]:
    """The rows of a statement with `statements.among`, for any number of keys."""
    for at in range(0, len(keys), CHUNK):
        yield from connection.execute(statement, {"keys": keys[at : at + CHUNK]})


def _decoded(connection: Connection, ids: Sequence[JobId]) -> dict[JobId, Job]:
    jobs = (codec.decode_job(spec, doc) for spec, doc in _rows_in(connection, statements.DOCS_OF, ids))
    return {job.id: job for job in jobs}
