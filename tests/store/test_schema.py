from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from jobsched.core import events as ev
from jobsched.core.resources import JobId, NodeName
from jobsched.errors import StoreUnavailable
from jobsched.store import schema
from jobsched.store.sql import SqlStore
from tests.contracts.store import assert_consistent, held, placed, submitted


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/jobs 100%.db"


def test_head_is_the_newest_migration() -> None:
    scripts = ScriptDirectory(str(Path(schema.__file__).parent / "migrations"))
    assert scripts.get_current_head() == schema.HEAD


def test_the_migrations_make_the_tables_of_the_schema(url: str) -> None:
    store = SqlStore(url)
    with store._transaction("read") as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        indexes = {(t, i["name"]) for t in schema.metadata.tables for i in inspect(connection).get_indexes(t)}
    assert indexes == {(t.name, i.name) for t in schema.metadata.tables.values() for i in t.indexes}
    store.close()


def test_down_and_up_again(url: str) -> None:
    store = SqlStore(url)
    with store._transaction("write") as connection:
        schema.migrate(connection, down_to="base")
        assert set(inspect(connection).get_table_names()) == {"alembic_version"}
        assert schema.version(connection) is None
    store.close()
    store = SqlStore(url)
    store.append([submitted("a")])
    assert_consistent(store)
    store.close()


def test_a_database_in_use_is_brought_up_from_every_version(url: str) -> None:
    for old in ("0001", "0002"):
        store = SqlStore(url)
        if store.last_seq() == 0:
            store.append([submitted("a", labels={"team": "x"}, request_id="r")])
            store.append([ev.NodeCordoned(2, NodeName("n"), "ada")])
        with store._transaction("write") as connection:
            schema.migrate(connection, down_to=old)
        store.close()
    store = SqlStore(url)
    assert store.job(JobId("a")) is not None
    assert [(name, cordon.drain) for name, cordon in store.load().cordoned] == [("n", False)]
    assert store.usage(0, 10)[0].jobs == 1
    store.append([submitted("b")])
    store.close()


@pytest.mark.parametrize("since", ["0004", "0005"])
def test_what_jobs_know_by_now_is_folded_from_the_log_of_those_from_before(url: str, since: str) -> None:
    store = SqlStore(url)
    lease = store.lease("me", 60_000, 1_000)
    assert lease is not None
    store.append([submitted("a", 1_000), submitted("b", 1_000), held("b", 2_000)])
    store.append([placed("a", 6_000)], fence=lease.fence)
    before = [store.job(JobId(name)) for name in "ab"]
    with store._transaction("write") as connection:
        connection.exec_driver_sql("""UPDATE jobs SET doc = replace(doc, '"waited_ms":5000', '"waited_ms":0')""")
        changed = connection.exec_driver_sql("""SELECT id FROM jobs WHERE doc LIKE '%"waited_ms":0%'""")
        assert changed.scalars().all() == ["a"]
        connection.execute(text("UPDATE alembic_version SET version_num = :since"), {"since": since})
    store.close()
    store = SqlStore(url)
    assert [store.job(JobId(name)) for name in "ab"] == before
    assert before[0] is not None
    assert before[0].waited_ms == 5_000
    assert_consistent(store)
    store.close()


def test_a_failed_migration_leaves_the_database_as_it_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alembic.op.bulk_insert", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        SqlStore(url)
    monkeypatch.undo()
    store = SqlStore(url)
    assert store.append([submitted("a")]).stored[0].seq == 1
    store.close()


def test_a_database_of_a_newer_jobsched_is_refused(url: str) -> None:
    store = SqlStore(url)
    with store._transaction("write") as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(StoreUnavailable, match="newer jobsched") as caught:
        SqlStore(url)
    assert "upgrade jobsched" in caught.value.hint


def test_alembic_is_not_imported_when_there_is_nothing_to_migrate(url: str) -> None:
    SqlStore(url).close()
    program = (
        "import sys; from jobsched.store.sql import SqlStore; SqlStore(sys.argv[1]).close();"
        "sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, url], check=True, timeout=300)
