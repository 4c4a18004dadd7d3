"""Jobs know what every preemption made them lose, whichever order asked for it: folded anew, so that those from before
know it, too."""

from alembic import op

from jobsched.store.refold import fold_jobs_anew

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    fold_jobs_anew(op.get_bind())


def downgrade() -> None:
    """An older jobsched counts less as lost."""
