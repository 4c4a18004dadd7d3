"""Jobs know how long each waited for its present attempt: folded anew, so that those from before know it, too."""

from alembic import op

from jobsched.store.refold import fold_jobs_anew

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    fold_jobs_anew(op.get_bind())


def downgrade() -> None:
    """An older jobsched ignores what it does not know of a job."""
