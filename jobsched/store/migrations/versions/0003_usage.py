"""What usage is summed up from: first placement and GPU time of every job. Jobs from before count from here on."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COLUMNS = ("first_placed_at_ms", "gpu_milli", "gpu_milli_ms", "gpu_since_ms")


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        for name in COLUMNS:
            jobs.add_column(sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    with op.batch_alter_table("jobs") as jobs:
        for name in COLUMNS:
            jobs.alter_column(name, server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        for name in COLUMNS:
            jobs.drop_column(name)
