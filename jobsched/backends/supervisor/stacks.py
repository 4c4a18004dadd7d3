"""Stacks of a replica's Python processes: by py-spy, which needs no cooperation, else by SIGQUIT to who catches it.

Used by the keeper; never blocks it. The text goes to the replica's log and to `done`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jobsched.backends.supervisor import processes, replica_log
from jobsched.backends.supervisor.loop import Loop, Timer

LIMIT_PIDS = 8
LIMIT_BYTES = 32 << 10
PATIENCE_S = 10.0
ANSWER_S = 0.7
NO_ANSWER = "(none of its processes could be asked for a stack)"


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
        before = replica_log.size(self._log)
        asked = [pid for pid in self._pids if processes.catches(pid, signal.SIGQUIT)]
        for pid in asked:
            processes.send(pid, signal.SIGQUIT)

        def answer() -> None:
            text = b""
            if replica_log.size(self._log) > before:
                text = replica_log.read(self._log, before, LIMIT_BYTES)[1]
            self._done(text.decode(errors="replace").strip() or NO_ANSWER)

        self._loop.at(ANSWER_S if asked else 0.0, answer)
