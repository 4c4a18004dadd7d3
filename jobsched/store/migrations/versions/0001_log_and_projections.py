"""The event log, its projections, the lease and the progress samples."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

seq_type = sa.BigInteger().with_variant(sa.Integer, "sqlite")
key_type = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("seq", seq_type, primary_key=True, autoincrement=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("job_id", key_type),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("events_job", "events", ["job_id", "seq"])
    op.create_table(
        "jobs",
        sa.Column("id", key_type, primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("queue", sa.String, nullable=False),
        sa.Column("phase", sa.String, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("submitted_at_ms", sa.BigInteger, nullable=False),
        sa.Column("ended_at_ms", sa.BigInteger, nullable=False),
        sa.Column("array_id", key_type),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("doc", sa.Text, nullable=False),
    )
    op.create_index("jobs_submitted", "jobs", ["submitted_at_ms", "id"])
    op.create_index("jobs_phase", "jobs", ["phase", "submitted_at_ms", "id"])
    op.create_index("jobs_owner", "jobs", ["owner", "phase", "submitted_at_ms", "id"])
    op.create_index("jobs_queue", "jobs", ["queue", "phase", "submitted_at_ms", "id"])
    op.create_index("jobs_name", "jobs", ["name", "submitted_at_ms", "id"])
    op.create_index("jobs_array", "jobs", ["array_id", "submitted_at_ms", "id"])
    op.create_table(
        "labels",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.String, primary_key=True),
        sa.Column("submitted_at_ms", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("job_id", key_type, sa.ForeignKey("jobs.id"), primary_key=True),
    )
    op.create_table(
        "requests",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("seq", seq_type, sa.ForeignKey("events.seq"), nullable=False),
    )
    op.create_table(
        "nodes",
        sa.Column("name", key_type, primary_key=True),
        sa.Column("doc", sa.Text),
        sa.Column("lost", sa.Boolean, nullable=False),
        sa.Column("cordoned", sa.Boolean, nullable=False),
        sa.Column("drain", sa.Boolean, nullable=False),
    )
    op.create_table(
        "queues",
        sa.Column("name", key_type, primary_key=True),
        sa.Column("doc", sa.Text, nullable=False),
    )
    lease = op.create_table(
        "lease",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(lease, [{"id": 1, "holder": "", "fence": 0, "expires_ms": 0}])
    op.create_table(
        "samples",
        sa.Column("job_id", key_type, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("n", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("world_size", sa.Integer, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
    )


def downgrade() -> None:
    for table in ("samples", "lease", "queues", "nodes", "requests", "labels", "jobs", "events"):
        op.drop_table(table)
