"""Cordons with who, why and since when."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("nodes") as nodes:
        nodes.add_column(sa.Column("cordon", sa.Text))
    op.execute("UPDATE nodes SET cordon = '{\"drain\": true}' WHERE cordoned AND drain")
    op.execute("UPDATE nodes SET cordon = '{\"drain\": false}' WHERE cordoned AND NOT drain")
    with op.batch_alter_table("nodes") as nodes:
        nodes.drop_column("cordoned")
        nodes.drop_column("drain")


def downgrade() -> None:
    with op.batch_alter_table("nodes") as nodes:
        nodes.add_column(sa.Column("cordoned", sa.Boolean, nullable=False, server_default=sa.false()))
        nodes.add_column(sa.Column("drain", sa.Boolean, nullable=False, server_default=sa.false()))
    op.execute("UPDATE nodes SET cordoned = TRUE WHERE cordon IS NOT NULL")
    op.execute("UPDATE nodes SET drain = TRUE WHERE cordon LIKE '{\"drain\"_true%' OR cordon LIKE '{\"drain\"__true%'")
    with op.batch_alter_table("nodes") as nodes:
        nodes.drop_column("cordon")
