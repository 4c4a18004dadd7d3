"""Run by alembic for `jobsched.store.schema.migrate`, which hands over its connection and open transaction.

Batch mode makes a table anew, because SQLite cannot alter columns in place; tables that others refer to only get or
lose whole columns, without it. To add a migration: copy the newest file in
`versions/`, give it the next number, set `HEAD` in `schema.py`; a test compares the result with the tables there.
"""

from alembic import context

from jobsched.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
