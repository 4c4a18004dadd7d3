"""Deletes logs and scratch files whose time is over, a little at each call. Used by the keeper once a second.

How long a directory `logs/JOB/ATTEMPT` is kept after its newest change stands in a file inside it, so that nothing has
to be remembered anywhere else.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from jobsched.backends.supervisor.protocol import Layout

KEEP_FILE = ".keep_ms"
DEFAULT_KEEP_MS = 7 * 86_400_000
AT_ONCE = 20
PAUSE_S = 60.0


def mark_kept(directory: Path, keep_ms: int) -> None:
    """Say how long the logs in `directory` are to be kept; 0: a week."""
    (directory / KEEP_FILE).write_text(str(keep_ms or DEFAULT_KEEP_MS))


class Sweeper:
    """Walks `logs/` and `scratch/` in small steps, over and over."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._walk: Iterator[tuple[str, Path]] = iter(())
        self._rest_until = 0.0

    def step(self, live: set[str]) -> None:
        """Look at a few directories; `live` are the `JOB/ATTEMPT` that must stay."""
        if time.monotonic() < self._rest_until:
            return
        for _ in range(AT_ONCE):
            found = next(self._walk, None)
            if found is None:
                self._walk = self._directories()
                self._rest_until = time.monotonic() + PAUSE_S
                return
            name, path = found
            if name not in live:
                self._sweep(name, path)

    def _directories(self) -> Iterator[tuple[str, Path]]:
        for root in (self._layout.logs, self._layout.scratch):
            for job in _subdirectories(root):
                for attempt in _subdirectories(job):
                    yield f"{job.name}/{attempt.name}", attempt

    def _sweep(self, name: str, path: Path) -> None:
        if self._layout.scratch in path.parents:
            expired = not (self._layout.logs / name).exists()
        else:
            expired = self._expired(path)
        if expired:
            shutil.rmtree(path, ignore_errors=True)
            try:
                path.parent.rmdir()
            except OSError:
                pass  # other attempts are still there

    @staticmethod
    def _expired(path: Path) -> bool:
        try:
            keep_ms = int((path / KEEP_FILE).read_text())
        except (OSError, ValueError):
            keep_ms = DEFAULT_KEEP_MS
        try:
            newest = max(entry.stat().st_mtime for entry in os.scandir(path))
        except (OSError, ValueError):
            return True
        return time.time() - newest > keep_ms / 1000


def _subdirectories(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
