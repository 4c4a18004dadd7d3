"""Run by alembic for `jobsched.store.schema.migrate`, which hands over its connection and open transaction.

Every migration runs in batch mode, because SQLite cannot alter columns in place. To add one: copy the newest file in
`versions/`, give it the next number, set `HEAD` in `schema.py`; a test compares the result with the tables there.
"""

from alembic import context

from jobsched.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
