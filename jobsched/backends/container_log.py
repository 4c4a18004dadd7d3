"""A container's log as a file: what the engine streams, less the reports in it, appended where it left off.

Used by adapters, one call per container at a time. The file's true length says how much of the stream it holds; beside
it (`.pos`) stands an instant of the stream with the length reached there, so that a new server need not read a long log
again. Nothing is lost or doubled when it ends at any point.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobsched.backends.containers import instant
from jobsched.backends.reports import LineFilter
from jobsched.backends.supervisor import replica_log
from jobsched.spec.backends import LogLimits

NOTE_S = 1.0
"""How often the position is noted."""


@dataclass(frozen=True, slots=True)
class Position:
    """The file was `size` bytes long after the `count`-th piece of the engine's instant `at`, the newest until then.
    The engine copies stdout and stderr apart, so a piece may come a little after one that is newer."""

    size: int = 0
    at: str = ""
    count: int = 0


def collect(
    path: Path, opened: Callable[[int], Iterable[bytes]], took: Callable[[dict[str, Any]], None], limits: LogLimits,
    closing: Callable[[], bool],
) -> None:  # fmt: skip
    """Until the stream that `opened(second)` gives ends; `took` hears the reports. Once `closing()`, asked before each
    piece, it writes no more: another collector may have the file by then, and a stream that was just being opened may
    have escaped whoever closed the others."""
    noted = position = read_position(path)
    size, skip = noted.size, replica_log.size(path) - noted.size
    lines, note_at, cut, newest, count, passed = LineFilter(), time.monotonic() + NOTE_S, 0, "", 0, not noted.at
    since_s = int(instant(noted.at).timestamp()) - 1 if noted.at else 0
    with open(replica_log.open_for_append(path), "ab", buffering=0) as out:
        for piece in opened(since_s):
            if closing():
                return
            stamp, _, text = piece.partition(b" ")
            at = stamp.decode(errors="replace")
            if at >= newest:
                newest, count = at, count + 1 if at == newest else 1
            if not passed and (newest, count) <= (noted.at, noted.count):
                passed = (newest, count) == (noted.at, noted.count)
                continue
            passed = True
            shown, found = lines.feed(text)
            if fresh := shown[skip:]:
                out.write(fresh)
            size, skip = size + len(shown), max(skip - len(shown), 0)
            for report in found:
                took(report)
            if not lines.held and at == newest:
                position = Position(size, newest, count)
            if time.monotonic() >= note_at:
                cut = replica_log.cut(path, limits.size * (limits.rotations + 1), cut)
                note_position(path, position)
                note_at = time.monotonic() + NOTE_S
    note_position(path, position)


def read_position(path: Path) -> Position:
    """What was noted beside the log, if it makes sense."""
    with suppress(OSError, ValueError):
        size, at, count = path.with_suffix(".pos").read_text().split()
        if int(size) <= replica_log.size(path):
            return Position(int(size), at, int(count))
    return Position()


def note_position(path: Path, position: Position) -> None:
    path.with_suffix(".pos").write_text(f"{position.size} {position.at} {position.count}")
