"""Tables of the SQL store, and `migrate`, which brings a database to them. Used by `sql.py` and the migrations only.

The log (`events`) is the truth; all other tables but `lease` and `samples` can be folded from it again. Values travel
as JSON text, so that SQLite and PostgreSQL hold the same bytes; columns beside them exist to be selected by. Indexes
end in (submitted_at_ms, id), the order of listings, so that a page costs a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    inspect,
    select,
)

from jobsched.errors import StoreUnavailable

HEAD: Final = "0006"
"""The newest migration; a database that says so is opened without importing alembic (0.6 s)."""

metadata = MetaData()

_Seq = BigInteger().with_variant(Integer, "sqlite")
"""SQLite only takes INTEGER for the row id itself."""
_Key = String().with_variant(String(collation="C"), "postgresql")
"""Text that is compared byte by byte, as Python and SQLite do."""

events = Table(
    "events",
    metadata,
    Column("seq", _Seq, primary_key=True, autoincrement=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("job_id", _Key),
    Column("kind", String, nullable=False),
    Column("body", Text, nullable=False),
    Index("events_job", "job_id", "seq"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", _Key, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("name", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("queue", String, nullable=False),
    Column("phase", String, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("submitted_at_ms", BigInteger, nullable=False),
    Column("ended_at_ms", BigInteger, nullable=False),
    Column("first_placed_at_ms", BigInteger, nullable=False),
    Column("gpu_milli", BigInteger, nullable=False),
    Column("gpu_milli_ms", BigInteger, nullable=False),
    Column("gpu_since_ms", BigInteger, nullable=False),
    Column("array_id", _Key),
    Column("spec", Text, nullable=False),
    Column("doc", Text, nullable=False),
    Index("jobs_submitted", "submitted_at_ms", "id"),
    Index("jobs_phase", "phase", "submitted_at_ms", "id"),
    Index("jobs_owner", "owner", "phase", "submitted_at_ms", "id"),
    Index("jobs_queue", "queue", "phase", "submitted_at_ms", "id"),
    Index("jobs_name", "name", "submitted_at_ms", "id"),
    Index("jobs_array", "array_id", "submitted_at_ms", "id"),
)
"""One row per job: the folded `Job`. `spec` changes by an edit only and is the same text for like jobs; `doc` is the
rest."""

labels = Table(
    "labels",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, primary_key=True),
    Column("submitted_at_ms", BigInteger, primary_key=True, autoincrement=False),
    Column("job_id", _Key, ForeignKey("jobs.id"), primary_key=True),
)

requests = Table(
    "requests",
    metadata,
    Column("owner", String, primary_key=True),
    Column("request_id", String, primary_key=True),
    Column("seq", _Seq, ForeignKey("events.seq"), nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("name", _Key, primary_key=True),
    Column("doc", Text),
    Column("lost", Boolean, nullable=False),
    Column("cordon", Text),
)

queues = Table(
    "queues",
    metadata,
    Column("name", _Key, primary_key=True),
    Column("doc", Text, nullable=False),
)

lease = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("holder", String, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
)
"""Exactly one row."""

recall = Table(
    "recall",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
)
"""One row at most: what the leader knew, `core.recall`."""

samples = Table(
    "samples",
    metadata,
    Column("job_id", _Key, ForeignKey("jobs.id"), primary_key=True),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("world_size", Integer, nullable=False),
    Column("metrics", Text, nullable=False),
)
"""Numbered per job from 1, so that the oldest can be cut off by a range."""

_version = Table("alembic_version", MetaData(), Column("version_num", String))


def version(connection: Connection) -> str | None:
    """The migration that the database stands at; None: it is empty."""
    if not inspect(connection).has_table(_version.name):
        return None
    return connection.execute(select(_version.c.version_num)).scalar()


def migrate(connection: Connection, down_to: str = "") -> None:
    """Bring the database to the newest schema, or back to an older one (`base`: none), in the caller's transaction.

    Raises `StoreUnavailable` when the database is at a migration that this jobsched has never heard of.
    """
    from alembic import command  # 0.6 s, and only needed when there is something to migrate
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    at = version(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if at is not None and at not in known:
        raise StoreUnavailable(
            f"the database was written by a newer jobsched (schema {at}; this one knows up to {HEAD})",
            hint="upgrade jobsched, or open another database",
        )
    if down_to:
        command.downgrade(config, down_to)
    else:
        command.upgrade(config, "head")
