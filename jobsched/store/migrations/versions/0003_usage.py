"""What usage is summed up from: first placement and GPU time of every job. Jobs from before count from here on."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COLUMNS = ("first_placed_at_ms", "gpu_milli", "gpu_milli_ms", "gpu_since_ms")


def upgrade() -> None:
    for name in COLUMNS:  # not in batch mode: labels, requests and samples refer to the table, so it cannot be made anew
        op.add_column("jobs", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    for name in COLUMNS:
        op.drop_column("jobs", name)
