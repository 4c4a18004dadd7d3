"""Stacks of a replica's Python processes: by py-spy, which needs no cooperation, else by SIGQUIT to who catches it.

Used by the keeper; never blocks it. The text goes to the replica's log and to `done`. `Written`, what processes write
when they are asked, is used by other adapters too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jobsched.backends.supervisor import processes, replica_log
from jobsched.backends.supervisor.loop import Loop, Timer

LIMIT_PIDS = 8
LIMIT_BYTES = 32 << 10
PATIENCE_S = 30.0
"""Longest wait for py-spy."""
WRITE_S = 10.0
"""Longest wait for processes that were asked: a busy machine lets them write late."""
LOOK_S = 0.2
"""Pause between two looks at what they wrote."""
SIGN = b"most recent call first"
"""What faulthandler writes above the stack of each thread."""
NO_ANSWER = "(none of its processes could be asked for a stack)"


class Written:
    """What comes to a log after this was made, in which processes write their stacks."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._before = self._seen = replica_log.size(log)
        self._until = time.monotonic() + WRITE_S
        self.text = ""

    def over(self) -> bool:
        """Look again: whether stacks have come and nothing more since the last look, or there was time enough."""
        seen, self._seen = self._seen, replica_log.size(self._log)
        found = b""
        if self._seen > self._before:
            found = replica_log.read(self._log, self._before, LIMIT_BYTES)[1]
        self.text = found.decode(errors="replace").strip()
        return (SIGN in found and self._seen == seen) or time.monotonic() >= self._until


def find_py_spy() -> str | None:
    """py-spy beside our own interpreter or on PATH."""
    beside = os.path.dirname(sys.executable)
    return shutil.which("py-spy", path=f"{beside}:{os.environ.get('PATH', '')}")


class StackCapture:
    """One capture of one replica; `begin`, and later `done(text)` once, never with an empty text."""

    def __init__(self, loop: Loop, pids: Sequence[int], log: Path, done: Callable[[str], None]) -> None:
        self._loop, self._log, self._done = loop, log, done
        self._pids = list(pids)
        self._left = [pid for pid in pids if processes.is_python(pid)][:LIMIT_PIDS]
        self._texts: list[str] = []
        self._tool = find_py_spy()

    def begin(self) -> None:
        if self._tool is None:
            self._ask_them()
        else:
            self._dump_next()

    def _dump_next(self) -> None:
        if not self._left:
            if self._texts:
                text = "\n".join(self._texts)[:LIMIT_BYTES]
                replica_log.append(self._log, f"jobsched: stacks\n{text}\n")
                self._done(text)
            else:
                self._ask_them()
            return
        assert self._tool is not None
        command = [self._tool, "dump", "--nonblocking", "--pid", str(self._left.pop(0))]
        try:
            tool = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError:
            self._ask_them()
            return
        self._hear(tool, self._loop.at(PATIENCE_S, tool.kill))

    def _hear(self, tool: subprocess.Popen[bytes], patience: Timer) -> None:
        assert tool.stdout is not None
        pipe, parts = tool.stdout, [b""]

        def readable() -> None:
            data = os.read(pipe.fileno(), 1 << 16)
            parts.append(data)
            if data:
                return
            self._loop.unwatch(pipe)
            pipe.close()
            patience.cancel()
            tool.wait()
            if text := b"".join(parts).decode(errors="replace").strip():
                self._texts.append(text)
            self._dump_next()

        self._loop.watch(pipe, readable)

    def _ask_them(self) -> None:
        written = Written(self._log)
        asked = [pid for pid in self._pids if processes.catches(pid, signal.SIGQUIT)]
        for pid in asked:
            processes.send(pid, signal.SIGQUIT)

        def look() -> None:
            if asked and not written.over():
                self._loop.at(LOOK_S, look)
            else:
                self._done(written.text or NO_ANSWER)

        self._loop.at(LOOK_S if asked else 0.0, look)
