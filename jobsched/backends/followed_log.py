"""Reading a replica's log file while it grows, as `Backend.logs` promises. Used by adapters that keep logs as files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobsched.backends.supervisor import replica_log
from jobsched.ports import LogChunk

FOLLOW_S = 0.05


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
