"""The statements of the durable store, alike for both databases; built once, as building one costs more than
running it."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    Row,
    Select,
    Table,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from jobsched.core.job import Phase
from jobsched.core.resources import JobId
from jobsched.ports import JobQuery
from jobsched.store import schema
from jobsched.store.projections import SAMPLES_KEPT


def among(*columns: ColumnElement[Any]) -> ColumnElement[bool]:
    """`column IN :keys`, run by `sql._rows_in`."""
    return (columns[0] if len(columns) == 1 else tuple_(*columns)).in_(bindparam("keys", expanding=True))


LOG: Final = select(schema.events.c.seq, schema.events.c.body).order_by(schema.events.c.seq)
NEWS: Final = LOG.where(schema.events.c.seq > bindparam("after")).limit(bindparam("limit"))
HEAD: Final = select(
    select(func.max(schema.events.c.seq)).scalar_subquery().label("seq"),
    select(schema.lease.c.fence).scalar_subquery().label("fence"),
)
DOCS: Final = select(schema.jobs.c.spec, schema.jobs.c.doc)
DOCS_OF: Final = DOCS.where(among(schema.jobs.c.id))
VERSIONS_OF: Final = select(schema.jobs.c.id, schema.jobs.c.version).where(among(schema.jobs.c.id))
NODES: Final = select(schema.nodes)
NODES_OF: Final = NODES.where(among(schema.nodes.c.name))
REQUESTS_OF: Final = (
    select(schema.requests.c.owner, schema.requests.c.request_id, schema.events.c.seq, schema.events.c.body)
    .join(schema.events)
    .where(among(schema.requests.c.owner, schema.requests.c.request_id))
)
INSERT_EVENT: Final = insert(schema.events)
INSERT_JOB: Final = insert(schema.jobs)
INSERT_LABEL: Final = insert(schema.labels)
INSERT_REQUEST: Final = insert(schema.requests)
UPDATE_JOB: Final = (
    update(schema.jobs)
    .where(schema.jobs.c.id == bindparam("key"))
    .values({
        name: bindparam(name)
        for name in ("version", "phase", "priority", "ended_at_ms", "first_placed_at_ms", "gpu_milli", "gpu_milli_ms",
                     "gpu_since_ms", "doc")
    })
)
UPDATE_SPEC: Final = (
    update(schema.jobs)
    .where(schema.jobs.c.id == bindparam("key"))
    .values({name: bindparam(name) for name in ("queue", "spec")})
)
DELETE_LABELS: Final = delete(schema.labels).where(schema.labels.c.job_id == bindparam("key"))
PLACE: Final = (schema.jobs.c.submitted_at_ms, schema.jobs.c.id)
"""What listings are ordered by."""
LEASE: Final = select(schema.lease.c.holder, schema.lease.c.fence, schema.lease.c.expires_ms)
LAST_SAMPLE_OF: Final = select(
    schema.jobs.c.id,
    select(func.max(schema.samples.c.n)).where(schema.samples.c.job_id == schema.jobs.c.id).scalar_subquery(),
).where(among(schema.jobs.c.id))
INSERT_SAMPLE: Final = insert(schema.samples)
PRUNE_SAMPLES: Final = delete(schema.samples).where(
    schema.samples.c.job_id == bindparam("key"), schema.samples.c.n <= bindparam("last") - SAMPLES_KEPT
)


def _usage() -> Select[*tuple[Any, ...]]:
    """Sums by queue and owner; parameters `since_ms` and `now_ms`."""
    jobs = schema.jobs.c
    placed = jobs.first_placed_at_ms > 0
    waited = jobs.first_placed_at_ms - jobs.submitted_at_ms
    gpu_time = jobs.gpu_milli_ms + jobs.gpu_milli * (bindparam("now_ms", type_=BigInteger) - jobs.gpu_since_ms)

    def number(condition: ColumnElement[bool]) -> ColumnElement[int]:
        return func.sum(case((condition, 1), else_=0))

    return (
        select(
            jobs.queue, jobs.owner, func.count(),
            *(number(jobs.phase == phase.value) for phase in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)),
            func.sum(gpu_time), number(placed),
            func.sum(case((placed, waited), else_=0)), func.max(case((placed, waited), else_=0)),
        )
        .where((jobs.ended_at_ms == 0) | (jobs.ended_at_ms >= bindparam("since_ms")))
        .group_by(jobs.queue, jobs.owner)
        .order_by(jobs.queue, jobs.owner)
    )  # fmt: skip


USAGE: Final = _usage()


def put(table: Table, dialect: str) -> Executable:
    """INSERT, or UPDATE where the key is there."""
    statement = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    rest = {c.name: statement.excluded[c.name] for c in table.c if not c.primary_key}
    return statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=rest)


def listing(query: JobQuery, phase: Phase | None, before: Row[int, JobId] | None) -> Select[*tuple[Any, ...]]:
    """The places of one page of one phase (None: whatever phase), newest first, from indexes that hold this order."""
    jobs = schema.jobs
    at_ms: ColumnElement[int] = jobs.c.submitted_at_ms
    job_id: ColumnElement[JobId] = jobs.c.id
    statement = select(jobs.c.submitted_at_ms, jobs.c.id)
    for place, (key, value) in enumerate(query.labels):
        label = schema.labels.alias()
        statement = statement.join(label, label.c.job_id == jobs.c.id).where(label.c.key == key, label.c.value == value)
        if place == 0:
            at_ms, job_id = label.c.submitted_at_ms, label.c.job_id
    equal = {
        jobs.c.phase: phase.value if phase else "",
        jobs.c.queue: query.queue,
        jobs.c.owner: query.owner,
        jobs.c.name: query.name,
        jobs.c.array_id: query.array_id,
    }
    statement = statement.where(*(column == value for column, value in equal.items() if value))
    if query.submitted_after_ms:
        statement = statement.where(at_ms > query.submitted_after_ms)
    if before is not None:
        statement = statement.where(tuple_(at_ms, job_id) < tuple_(*before))
    if query.id_prefix:
        # `+ 0` keeps the planner from walking all jobs in listing order: few have the prefix.
        statement = statement.where(jobs.c.id >= query.id_prefix, jobs.c.id < query.id_prefix + chr(0x10FFFF))
        at_ms = at_ms + 0
    return statement.order_by(at_ms.desc(), job_id.desc()).limit(query.limit)
