"""A replica's log as a file of the server's: made, then read while it grows. Used by adapters."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobsched.backends.supervisor import replica_log
from jobsched.backends.supervisor.sweeper import mark_kept
from jobsched.ports import LogChunk

FOLLOW_S = 0.05


def begin(path: Path, keep_ms: int) -> None:
    """Make the file, which also says that its replica was started. `keep_ms`: how long its attempt's logs are kept."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        mark_kept(path.parent, keep_ms)
    os.close(replica_log.open_for_append(path))


def chunks(
    path: Path, offset: int, grows: Callable[[], bool], timeout_ms: int, pause_s: float = FOLLOW_S
) -> Iterator[LogChunk]:
    """Bytes from `offset` (negative: from that many before the end), whole lines while the file `grows`; empty chunks
    at least every `timeout_ms` of silence (0: none)."""
    if offset < 0:
        offset = max(replica_log.size(path) + offset, 0)
    told = time.monotonic()
    while True:
        growing = grows()  # asked before reading, so that nothing is missed at the end
        try:
            begin, data = replica_log.read(path, offset)
        except FileNotFoundError:
            begin, data = offset, b""
        if data:
            whole = data.rfind(b"\n") + 1
            if whole and (growing or len(data) == replica_log.CHUNK):
                data = data[:whole]
            yield LogChunk(begin, data)
            offset, told = begin + len(data), time.monotonic()
        elif not growing:
            return
        elif timeout_ms and (time.monotonic() - told) * 1000 >= timeout_ms:
            yield LogChunk(offset, b"")
            told = time.monotonic()
        else:
            time.sleep(pause_s)
