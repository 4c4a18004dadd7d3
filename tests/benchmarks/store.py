"""How fast the durable store is, beside the floor that SQLite itself sets on the same disk in the same minute.

`python -m tests.benchmarks.store [--finished 100000]` prints JSON lines: name, value, unit, peer (what the floor or the
small case reached in this run) and ratio (> 1: better than peer).
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from statistics import median

from jobsched.core.job import Phase
from jobsched.core.resources import JobId
from jobsched.ports import JobQuery
from jobsched.store.sql import SqlStore
from tests.contracts.store import append, cancelled, held, submitted

ROUNDS = 5
EVENTS = 400
BATCH = 1_000
LIVE = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, default=100_000)
    finished: int = parser.parse_args().finished
    with tempfile.TemporaryDirectory() as folder:
        appends(Path(folder))
        size(Path(folder), finished)


def say(name: str, value: float, unit: str, peer: float) -> None:
    better = peer / value if unit in ("s", "ms") else value / peer
    line = {"name": name, "value": round(value, 3), "unit": unit, "peer": round(peer, 3), "ratio": round(better, 3)}
    print(json.dumps(line), flush=True)


def per_second(amount: int, work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return amount / (time.perf_counter() - begin)


def seconds(work: Callable[[], object]) -> float:
    """Best of five."""
    return min(1 / per_second(1, work) for _ in range(5))


def appends(folder: Path) -> None:
    """Durable appends: one event each from some threads, and batches; the floor writes one row of as many bytes. Rounds
    alternate with the floor's, because a shared disk changes from second to second; each figure is the median."""
    store = SqlStore(f"sqlite:///{folder}/appends.db")
    store.append([submitted(f"t{i}") for i in range(16)])
    serial = count()

    def holds(threads: int) -> float:
        def work(thread: int) -> None:
            for i in range(EVENTS // threads):
                store.append([held(f"t{thread}", i)])

        with ThreadPoolExecutor(threads) as pool:
            return per_second(EVENTS, lambda: list(pool.map(work, range(threads))))

    def submissions(size: int) -> float:
        events = [submitted(f"s{next(serial):07}") for _ in range(max(EVENTS, 2 * size))]
        batches = [events[at : at + size] for at in range(0, len(events), size)]
        return per_second(len(events), lambda: [store.append(batch) for batch in batches])

    def wishes(size: int) -> float:
        batches = [[held(f"s{i:07}") for i in range(size)] for _ in range(2)]
        return per_second(2 * size, lambda: [store.append(batch) for batch in batches])

    single = {"append, 1 thread": 1, "append, 8 threads": 8, "append, 16 threads": 16}
    rounds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        rounds.setdefault("floor", []).append(raw_commits(folder, EVENTS, 1))
        rounds.setdefault("floor, batches", []).append(raw_commits(folder, 10 * BATCH, BATCH))
        for name, threads in single.items():
            rounds.setdefault(name, []).append(holds(threads))
        rounds.setdefault("submit, 1 thread", []).append(submissions(1))
        rounds.setdefault(f"submit, batches of {BATCH}", []).append(submissions(BATCH))
        rounds.setdefault(f"append, batches of {BATCH}", []).append(wishes(BATCH))
    medians = {name: median(rates) for name, rates in rounds.items()}
    for name, rate in medians.items():
        if "floor" not in name:
            say(name, rate, "events/s", medians["floor, batches" if "batches" in name else "floor"])
    store.close()


def raw_commits(folder: Path, rows: int, batch: int) -> float:
    raw = sqlite3.connect(folder / f"raw{batch}.db", isolation_level=None)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.execute("PRAGMA synchronous = FULL")
    raw.execute("DROP TABLE IF EXISTS log")
    raw.execute("CREATE TABLE log (seq INTEGER PRIMARY KEY, body TEXT)")

    def work() -> None:
        for at in range(0, rows, batch):
            raw.execute("BEGIN IMMEDIATE")
            raw.executemany("INSERT INTO log VALUES (?, ?)", [(at + i, "x" * 100) for i in range(batch)])
            raw.execute("COMMIT")

    rate = per_second(rows, work)
    raw.close()
    return rate


def size(folder: Path, finished: int) -> None:
    """What finished jobs cost those who read: opening and loading, a page, a count. Peer: the same without them."""
    small, big = f"sqlite:///{folder}/small.db", f"sqlite:///{folder}/big.db"
    fill(small, 0)
    fill(big, finished)
    stores = {"small": SqlStore(small), "big": SqlStore(big)}
    after = f"with {finished} finished jobs"

    def compare(name: str, work: Callable[[SqlStore], object]) -> None:
        small, big = (1_000 * seconds(lambda store=store: work(store)) for store in stores.values())  # type: ignore[misc]
        say(f"{name} {after}", big, "ms", small)

    say(f"open and load {LIVE} live jobs {after}", seconds(lambda: opened(big)), "s", seconds(lambda: opened(small)))
    compare("newest 100 jobs", lambda store: store.jobs(JobQuery()))
    mine = JobQuery(owner="ada", phases=(Phase.QUEUED, Phase.STARTING, Phase.RUNNING, Phase.STOPPING))
    compare("newest 100 of an owner's live jobs", lambda store: store.jobs(mine))
    compare("newest 100 of an owner", lambda store: store.jobs(JobQuery(owner="ada")))
    compare("newest 100 with a label", lambda store: store.jobs(JobQuery(labels=(("team", "rare"),))))
    compare("count by queue", lambda store: store.count("queue"))
    compare("count by phase", lambda store: store.count("phase"))
    compare("append of one event", lambda store: store.append([held("live-00000")]))
    for store in stores.values():
        store.close()


def opened(url: str) -> None:
    store = SqlStore(url)
    assert len(store.load().jobs) == LIVE
    store.close()


def fill(url: str, finished: int) -> None:
    store = SqlStore(url, synchronous="NORMAL")
    store.append([submitted(f"live-{i:05}", i, labels={"team": "rare"}) for i in range(LIVE)])
    for at in range(0, finished, BATCH):
        ids = [JobId(f"done-{i:07}") for i in range(at, min(at + BATCH, finished))]
        store.append([submitted(job_id, LIVE + at, labels={"team": "common"}) for job_id in ids])
        append(store, [cancelled(job_id) for job_id in ids])
    store.close()


if __name__ == "__main__":
    main()
