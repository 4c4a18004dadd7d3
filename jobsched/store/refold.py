"""Folds the jobs of a database anew from its log: what a migration does when folding has changed, as the rows of jobs
hold what it gave when their events came."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, select

from jobsched.core import events as ev
from jobsched.core.job import Job
from jobsched.core.lifecycle import evolve_job
from jobsched.store import codec, schema, statements

AT_ONCE: Final = 500
"""Jobs folded together."""
_IDS: Final = select(schema.jobs.c.id).order_by(schema.jobs.c.id)
_LOGS_OF: Final = (
    select(schema.events.c.seq, schema.events.c.body)
    .where(statements.among(schema.events.c.job_id))
    .order_by(schema.events.c.job_id, schema.events.c.seq)
)


def fold_jobs_anew(connection: Connection) -> None:
    """Every job's row, as its events fold today. O(events), in the caller's transaction."""
    ids = list(connection.execute(_IDS).scalars())
    for at in range(0, len(ids), AT_ONCE):
        jobs: dict[str, Job] = {}
        for row in connection.execute(_LOGS_OF, {"keys": ids[at : at + AT_ONCE]}):
            event = ev.of_job(codec.stored(row).event)
            jobs[event.job_id] = evolve_job(jobs.get(event.job_id), event)
        if jobs:
            connection.execute(statements.UPDATE_JOB, [codec.job_row(job) for job in jobs.values()])
