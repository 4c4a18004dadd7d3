"""The contract on PostgreSQL: `JOBSCHED_TEST_POSTGRES=postgresql+psycopg://user@host/database pytest tests/store`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, make_url, text

from jobsched.errors import StoreUnavailable
from jobsched.store.sql import SqlStore
from tests.store.test_sql import SqlStoreContract, make  # noqa: F401 (a fixture)

POSTGRES = os.environ.get("JOBSCHED_TEST_POSTGRES", "")
if not POSTGRES:
    pytest.skip("JOBSCHED_TEST_POSTGRES (the URL of a PostgreSQL database) is not set", allow_module_level=True)


class TestPostgres(SqlStoreContract):
    @pytest.fixture
    def url(self) -> Iterator[str]:
        """A schema of its own for each test."""
        admin = create_engine(POSTGRES)
        name = f"jobsched_{uuid.uuid4().hex}"
        with admin.begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
        mine = make_url(POSTGRES).update_query_dict({"options": f"-csearch_path={name}"})
        yield mine.render_as_string(hide_password=False)
        with admin.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
        admin.dispose()

    def test_unreachable_server(self) -> None:
        with pytest.raises(StoreUnavailable):
            SqlStore(make_url(POSTGRES).set(host="127.0.0.1", port=1))
