from __future__ import annotations

import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool

from jobsched.core.job import Phase
from jobsched.core.resources import JobId
from jobsched.errors import StoreUnavailable
from jobsched.ports import JobQuery, Sample
from jobsched.store import sql, statements
from jobsched.store.sql import SqlStore
from tests.contracts.store import (
    StoreContract,
    append,
    assert_consistent,
    held,
    interleaved,
    story,
    submitted,
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/jobsched.db"


@pytest.fixture
def make(url: str) -> Iterator[Callable[..., SqlStore]]:
    """Opens the database as often as asked."""
    made: list[SqlStore] = []

    def make(**options: object) -> SqlStore:
        made.append(SqlStore(url, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for store in made:
        store.close()


class SqlStoreContract(StoreContract):
    """What a durable store promises on top, whatever its dialect."""

    @pytest.fixture
    def store(self, make: Callable[..., SqlStore]) -> SqlStore:  # type: ignore[override]
        return make()

    def test_opening_again_finds_everything(self, store: SqlStore, make: Callable[..., SqlStore]) -> None:
        rng = random.Random(3)
        append(store, list(interleaved(rng, [story(rng, f"j{i}", 12) for i in range(8)])))
        store.append([submitted("last", request_id="r1")])
        lease = store.lease("test", 10, now_ms=0)
        sample = Sample(JobId("j1"), 1, 1, 1, 1, 1, (("loss", 1.5),))
        store.add_samples([sample])
        log, loaded = store.read(0), store.load()
        store.close()
        again = make()
        assert again.read(0) == log
        assert again.load() == loaded
        assert again.samples(JobId("j1")) == (sample,)
        assert again.append([submitted("x", request_id="r1")]).stored == (log[-1],)
        assert lease is not None
        assert again.lease("b", 10, now_ms=5) is None
        assert again.append([held("last")], fence=lease.fence).stored[0].seq == len(log) + 1
        assert_consistent(again)

    def test_two_stores_on_one_database_fold_upon_each_other(self, make: Callable[..., SqlStore]) -> None:
        here, there = make(), make()
        here.append([submitted("a")])
        for i in range(5):
            there.append([held("a", i)], {JobId("a"): 2 * i + 1})
            here.append([held("a", i)], {JobId("a"): 2 * i + 2})
        assert here.append([held("a")], {JobId("a"): 10}).rejected[0].actual == 11
        assert here.job(JobId("a")) == there.job(JobId("a"))
        assert_consistent(there)

    def test_two_stores_written_by_threads_at_once(self, make: Callable[..., SqlStore]) -> None:
        stores = [make(), make()]
        stores[0].append([submitted("a")])

        def work(i: int) -> int:
            return stores[i % 2].append([held("a", i), submitted(f"j{i}", i)]).stored[0].seq

        with ThreadPoolExecutor(6) as pool:
            assert len(set(pool.map(work, range(60)))) == 60
        assert stores[0].last_seq() == 121
        assert_consistent(stores[1])

    def test_many_jobs_in_one_append(self, store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sql, "CHUNK", 50)
        many = 2 * sql.CHUNK + 1
        store.append([submitted(f"j{i:05}", request_id=f"r{i}") for i in range(many)])
        store.append([held(f"j{i:05}") for i in range(many)], {JobId(f"j{i:05}"): 1 for i in range(many)})
        again = store.append([submitted(f"k{i:05}", request_id=f"r{i}") for i in range(many)])
        assert [s.seq for s in again.stored] == list(range(1, many + 1))
        assert store.last_seq() == 2 * many
        assert_consistent(store)

    def test_a_forgetful_store_folds_the_same(self, make: Callable[..., SqlStore]) -> None:
        store, rng = make(remember=1), random.Random(5)
        for one in interleaved(rng, [story(rng, f"j{i}", 15) for i in range(4)]):
            assert not append(store, [one]).rejected
        assert_consistent(store)


class TestSqlite(SqlStoreContract):
    def test_threads_that_wait_share_a_commit(self, store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store.append([submitted("a")])
        commits: list[int] = []
        plain = SqlStore._commit
        entered, go_on = threading.Event(), threading.Event()

        def counted(self: SqlStore, appends: list[sql._Append]) -> None:
            commits.append(len(appends))
            entered.set()
            assert go_on.wait(120)
            plain(self, appends)

        monkeypatch.setattr(SqlStore, "_commit", counted)
        with ThreadPoolExecutor(8) as pool:
            first = pool.submit(store.append, [held("a")])
            assert entered.wait(120)
            rest = [pool.submit(store.append, [held("a", i)]) for i in range(7)]
            while len(store._waiting) < 7:
                assert not any(r.done() for r in rest)
            go_on.set()
            assert sorted(r.result(120).stored[0].seq for r in (first, *rest)) == list(range(2, 10))
        assert commits == [1, 7]

    def test_an_interrupted_waiter_leaves_the_others_a_leader(
        self, store: SqlStore, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
    ) -> None:
        store.append([submitted("a")])
        plain = SqlStore._commit
        entered, go_on = threading.Event(), threading.Event()

        def slow(self: SqlStore, appends: list[sql._Append]) -> None:
            entered.set()
            assert go_on.wait(120)
            plain(self, appends)

        def interrupt() -> None:
            while not store._waiting:
                assert not go_on.wait(0.001)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        monkeypatch.setattr(SqlStore, "_commit", slow)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(store.append, [held("a", 1)])
            assert entered.wait(120)
            interrupted = pool.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.append([held("a", 2)])
            interrupted.result(120)
            go_on.set()
            assert first.result(120).stored[0].seq == 2
        assert store.append([held("a", 3)]).stored[0].seq == 3
        assert not store._led
        assert_consistent(store)

    def test_an_interrupt_as_one_queues_up_leaves_nobody_waiting(
        self, store: SqlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.append([submitted("a")])

        class Gate:
            """Ctrl-C comes just as it is left."""

            def __init__(self) -> None:
                self.lock, self.left = threading.Lock(), 0

            def __enter__(self) -> None:
                self.lock.acquire()

            def __exit__(self, *_: object) -> None:
                self.lock.release()
                self.left += 1
                if self.left == 1:
                    raise KeyboardInterrupt

        monkeypatch.setattr(store, "_gate", Gate())
        with pytest.raises(KeyboardInterrupt):
            store.append([held("a", 1)])
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(store.append, [held("a", 2)]).result(120).stored[0].seq == 2
        assert not store._led
        assert_consistent(store)

    def test_a_mistake_in_one_append_is_its_callers_alone(
        self, store: SqlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.append([submitted("a")])
        bad = sql._Append([object()], {}, None, {})  # type: ignore[list-item]
        wish = held("a")
        good = sql._Append([wish], {}, None, {id(wish): sql.EVENT.dump_json(wish).decode()})
        with store._writer:
            store._commit([bad, good])
        with pytest.raises(AttributeError, match="job_id"):
            bad.answer.result(0)
        assert good.answer.result(0).stored[0].seq == 2
        assert_consistent(store)

    def test_the_database_is_for_its_owner_alone(self, store: SqlStore, tmp_path: Path) -> None:
        store.append([submitted("a")])
        for name in ("jobsched.db", "jobsched.db-wal"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600

    def test_commits_are_synced_unless_told_otherwise(self, make: Callable[..., SqlStore]) -> None:
        for store, level in ((make(), 2), (make(synchronous="NORMAL"), 1)):
            for mode, expected in (("write", level), ("lossy", 1), ("write", level)):
                with store._transaction(mode) as connection:  # type: ignore[arg-type]
                    assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == expected

    @pytest.mark.parametrize(
        "query",
        [
            JobQuery(),
            JobQuery(phases=(Phase.QUEUED,)),
            JobQuery(owner="ada", phases=(Phase.QUEUED,)),
            JobQuery(queue="default", phases=(Phase.QUEUED,)),
            JobQuery(name="n"),
            JobQuery(array_id="a"),
            JobQuery(labels=(("team", "x"),)),
            JobQuery(id_prefix="j1"),
            JobQuery(submitted_after_ms=5),
            JobQuery(owner="ada", phases=(Phase.QUEUED,), labels=(("team", "x"), ("tier", "1"))),
        ],
        ids=lambda q: str(q).partition("(")[2][:30],
    )
    def test_a_page_costs_a_page(self, store: SqlStore, query: JobQuery) -> None:
        """Listings walk an index in their own order: no full scan, no sort but of the few with an id prefix."""
        place = (5, "j1")
        with store._transaction("read") as connection:
            for before in (None, place):
                statement = statements.listing(query, query.phases[0] if query.phases else None, before)  # type: ignore[arg-type]
                compiled = statement.compile(connection, compile_kwargs={"literal_binds": True})
                plan = [row.detail for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}")]
                assert ("USE TEMP B-TREE FOR ORDER BY" in plan) == bool(query.id_prefix), plan
                unfiltered = query == JobQuery() and before is None
                assert unfiltered or not any(line.startswith("SCAN") for line in plan), plan

    # ---- when the database is not there ----

    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(StoreUnavailable) as caught:
            SqlStore(f"sqlite:///{tmp_path}/no/such/jobsched.db")
        assert "directory" in caught.value.hint
        assert caught.value.__cause__ is not None

    def test_not_a_database(self, tmp_path: Path) -> None:
        (tmp_path / "x.db").write_bytes(b"all work and no play " * 500)
        with pytest.raises(StoreUnavailable, match="not a database") as caught:
            SqlStore(f"sqlite:///{tmp_path}/x.db")
        assert "backup" in caught.value.hint

    def test_damaged_pages(self, store: SqlStore, make: Callable[..., SqlStore], tmp_path: Path) -> None:
        store.append([submitted(f"j{i}") for i in range(200)])
        store.close()
        path = tmp_path / "jobsched.db"
        path.write_bytes(path.read_bytes()[:8_192] + b"\xa5" * (path.stat().st_size - 8_192))
        with pytest.raises(StoreUnavailable) as caught:
            make().read(0)
        assert "backup" in caught.value.hint

    def test_damaged_document(self, store: SqlStore, tmp_path: Path) -> None:
        store.append([submitted("a")])
        with sqlite3.connect(tmp_path / "jobsched.db") as raw:
            raw.execute("UPDATE jobs SET doc = '{\"id\": 5'")
        for read in (lambda: store.job(JobId("a")), store.load, lambda: store.jobs(JobQuery())):
            with pytest.raises(StoreUnavailable, match="cannot be read"):
                read()

    def test_locked_beyond_the_timeout(self, make: Callable[..., SqlStore], tmp_path: Path) -> None:
        store = make(busy_timeout_ms=50)
        store.append([submitted("a")])
        with sqlite3.connect(tmp_path / "jobsched.db", isolation_level=None) as raw:
            raw.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailable, match="locked") as caught:
                store.append([held("a")])
            assert "another process" in caught.value.hint
            assert store.last_seq() == 1
            raw.execute("ROLLBACK")
        assert store.append([held("a")]).stored[0].seq == 2
        assert_consistent(store)

    def test_full_disk_loses_nothing_and_passes(self, make: Callable[..., SqlStore]) -> None:
        limit = {"pages": 100}

        def small(raw: sqlite3.Connection, _: object) -> None:
            raw.execute(f"PRAGMA max_page_count = {limit['pages']}")

        event.listen(Pool, "connect", small)
        try:
            store = make()
            acknowledged: list[int] = []

            def fill() -> None:
                while len(acknowledged) < 1_000:
                    acknowledged.append(store.append([submitted(f"j{len(acknowledged)}")]).stored[0].seq)

            with pytest.raises(StoreUnavailable, match="full") as caught:
                fill()
            assert "make room" in caught.value.hint
            assert store.last_seq() == len(acknowledged)
            assert_consistent(store)
            limit["pages"] = 1_000_000
            store.close()
            store.append([submitted("room again")])
            assert_consistent(store)
        finally:
            event.remove(Pool, "connect", small)

    def test_read_only_file(self, store: SqlStore, tmp_path: Path) -> None:
        store.append([submitted("a")])
        reader = SqlStore(f"sqlite:///file:{tmp_path}/jobsched.db?mode=ro&uri=true")
        try:
            assert reader.last_seq() == 1
            with pytest.raises(StoreUnavailable, match="readonly") as caught:
                reader.append([held("a")])
            assert "mode" in caught.value.hint
        finally:
            reader.close()

    # ---- crashes ----

    def test_killed_writers_lose_no_acknowledged_event(self, url: str, make: Callable[..., SqlStore]) -> None:
        """A child appends and says what was acknowledged; it is killed at a random moment, several times over."""
        rng = random.Random(11)
        acknowledged = 0
        for life in range(5):
            child = subprocess.Popen(
                [sys.executable, "-c", _WRITER, url, str(life)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
            )
            assert child.stdout is not None
            try:
                for _ in range(rng.randrange(5, 60)):
                    acknowledged = max(acknowledged, int(child.stdout.readline()))
            finally:
                child.send_signal(signal.SIGKILL)
                rest = child.stdout.read().split(b"\n")[:-1]
                child.wait(120)
            acknowledged = max([acknowledged, *map(int, rest)])
            store = make()
            assert store.last_seq() >= acknowledged
            assert_consistent(store)
            store.close()
        assert acknowledged >= 25

    def test_opening_a_fresh_database_at_once_from_many_processes(
        self, url: str, make: Callable[..., SqlStore]
    ) -> None:
        program = "import sys; from jobsched.store.sql import SqlStore; print(SqlStore(sys.argv[1]).last_seq())"
        children = [
            subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(3)
        ]
        for child in children:
            out, err = child.communicate(timeout=300)
            assert (out, child.returncode) == (b"0\n", 0), err.decode()
        make().append([submitted("a")])


_WRITER = """
import os, sys
from jobsched.store.sql import SqlStore
from tests.contracts.store import append, cancelled, held, submitted
store, turn = SqlStore(sys.argv[1]), sys.argv[2]
for i in range(100_000):
    name = f"j{turn}-{i}"
    life = [submitted(name, i), held(name, i), cancelled(name, i)]
    stored = append(store, life if i % 2 else life[:1]).stored
    os.write(1, f"{stored[-1].seq}\\n".encode())
"""
