"""The supervisor's state on disk: one small append-only file, rewritten when it has grown.

Lines are JSON arrays: `["boot", id]`, `["order", key, {…}]` (before a process exists), `["run", key, pid, ticks]`,
`["end", key, {…}]`, `["forget", key]`, `["hold", key]` (it must not outlive its holder), `["past", job, attempt,
{replica: restart}]`. Written without fsync: it must survive a SIGKILL of the supervisor, not of the machine, which ends
every replica anyway. Never holds an environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAST_JOBS = 10_000
"""Jobs whose newest attempt is remembered after all their replicas were forgotten."""
SLACK_LINES = 4_000


class Past:
    """Which launch keys ever started: per job the newest attempt, and in it the newest restart of each replica.
    Bounded; the least recently started jobs are dropped first."""

    def __init__(self) -> None:
        self._jobs: dict[str, tuple[int, dict[str, int]]] = {}

    def covers(self, key: str) -> bool:
        """Whether this key, or a newer one of the same replica, has been ordered before."""
        job, attempt, replica, restart = _split(key)
        newest, restarts = self._jobs.get(job, (-1, {}))
        return attempt < newest or (attempt == newest and restart <= restarts.get(replica, -1))

    def add(self, key: str) -> None:
        job, attempt, replica, restart = _split(key)
        newest, restarts = self._jobs.pop(job, (-1, {}))
        if attempt > newest:
            newest, restarts = attempt, {}
        if attempt == newest:
            restarts[replica] = max(restart, restarts.get(replica, -1))
        self._jobs[job] = (newest, restarts)
        while len(self._jobs) > PAST_JOBS:
            del self._jobs[next(iter(self._jobs))]

    def restore(self, job: str, attempt: int, restarts: Mapping[str, int]) -> None:
        self._jobs[job] = (attempt, dict(restarts))

    def records(self) -> Iterator[list[Any]]:
        for job, (attempt, restarts) in self._jobs.items():
            yield ["past", job, attempt, restarts]


class Journal:
    """Appends records and compacts. `live` of `compact` is what must survive besides the past."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def replay(self) -> Iterator[list[Any]]:
        """Every whole record, in order. A torn last line (a crash in mid-write) is cut off."""
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._fd, whole)
        for line in data[:whole].splitlines():
            self._lines += 1
            yield json.loads(line)

    def write(self, *records: list[Any]) -> None:
        os.write(self._fd, b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records))
        self._lines += len(records)

    def grown(self, live: int) -> bool:
        """Whether the file is worth compacting, with `live` records in use."""
        return self._lines > 4 * live + SLACK_LINES

    def compact(self, records: Iterator[list[Any]]) -> None:
        """Replace the file by `records`; atomic."""
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        journal = Journal(fresh)
        batch = list(records)
        journal.write(*batch)
        os.replace(fresh, self._path)
        os.close(self._fd)
        self._fd, self._lines = journal._fd, len(batch)

    def close(self) -> None:
        os.close(self._fd)


def _split(key: str) -> tuple[str, int, str, int]:
    job, attempt, role, index, restart = key.split("/")
    return job, int(attempt), f"{role}/{index}", int(restart)
