"""A command beside a replica: a process in its environment, directory and limits, of which the replica knows nothing.

Used by `local` in the server and by `ray_actor` on the nodes of a Ray cluster, each in its own process: whoever asked
for the command holds its pipes or its terminal. It carries the replica's mark, so the supervisor ends it with the
replica. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

OUT, ERR, END = 1, 2, 3
"""What a piece is: bytes of stdout (or of the terminal), of stderr, or the exit code in digits."""
CHUNK = 32 << 10
LOOK_MS = 100
"""How often a sender that is blocked looks up."""
CONNECT_S = 10.0
LINGER_S = 0.2
"""How long last words are waited for after the end: a child of the command may keep its pipes open for ever."""
HANG_UP_S = 1.0
"""From SIGHUP to SIGKILL when it is closed before it ends."""
ENTER = ('[ -z "$1" ] || exec <"$1" >"$1" 2>&1; n=$2; shift 2; '
         'while [ "$n" -gt 0 ]; do echo 0 > "$1" || exit 126; shift; n=$((n-1)); done; exec "$@"')
"""`/bin/sh -c ENTER sh TERMINAL N FILE… COMMAND…`: the leader of a session gets the terminal that it opens first."""


class Beside:
    """One such command, beside process `pid`. `enter`: files to write `0` to before it runs; `window`: rows and columns
    of its terminal, None for pipes. OSError when it cannot be started at all."""

    def __init__(
        self, pid: int, env: Mapping[str, str], enter: Sequence[str], command: Sequence[str],
        window: tuple[int, int] | None,
    ) -> None:
        self._master = self._slave = -1
        name = ""
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        if window is not None:
            self._master, self._slave = os.openpty()
            name = os.ttyname(self._slave)
            self.resize(*window)
            streams = dict.fromkeys(streams, subprocess.DEVNULL)
        argv = ["/bin/sh", "-c", ENTER, "sh", name, str(len(enter)), *enter, *command]
        try:
            self._process = subprocess.Popen(
                argv, cwd=_directory(pid), env=dict(env), start_new_session=True, **streams)
        except OSError:
            self._close_terminal()
            raise
        self._pidfd = os.pidfd_open(self._process.pid)
        self._ended_at = 0.0
        self._closed = False
        self._writing = threading.Lock()
        self._sources = {self._master: OUT}
        """Descriptor that can be read -> what comes from it."""
        self._input = self._master
        if window is None:
            pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
            self._input, out, err = (pipe.fileno() for pipe in pipes if pipe is not None)
            self._sources = {out: OUT, err: ERR}
        os.set_blocking(self._input, False)
        self._poll = select.poll()
        for fd in (*self._sources, self._pidfd):
            self._poll.register(fd, select.POLLIN)

    def receive(self, timeout_s: float) -> tuple[int, bytes] | None:
        """The next piece; None when nothing came in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            linger = self._ended_at + LINGER_S if self._ended_at else deadline
            left = min(deadline, linger) - time.monotonic()
            for fd, _ in self._poll.poll(max(left, 0.0) * 1000):
                if fd == self._pidfd:
                    self._ended_at = time.monotonic()
                    self._poll.unregister(fd)
                elif data := _read(fd):
                    return self._sources[fd], data
                else:
                    self._poll.unregister(fd)
                    del self._sources[fd]
            now = time.monotonic()
            if self._ended_at and (self._silent() or now >= self._ended_at + LINGER_S):
                code = self._process.wait()
                return END, str(code if code >= 0 else 128 - code).encode()
            if now >= deadline:
                return None

    def send(self, data: bytes) -> None:
        """Blocks while the command does not read; after its end, or once it reads no more, nothing happens."""
        view = memoryview(data)
        while view:
            with self._writing:  # a descriptor that is closed may be somebody else's at once
                if self._input < 0 or self._ended_at:
                    return
                ready = select.poll()
                ready.register(self._input, select.POLLOUT)
                try:
                    if ready.poll(LOOK_MS):
                        view = view[os.write(self._input, view):]
                except BlockingIOError:
                    continue
                except OSError:
                    return

    def end_input(self) -> None:
        if self._master >= 0:
            self.send(b"\4")
            return
        with self._writing, contextlib.suppress(OSError):
            self._input = -1
            if self._process.stdin is not None:
                self._process.stdin.close()

    def resize(self, rows: int, columns: int) -> None:
        if self._master >= 0:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        """Hang up, as a terminal that is closed does, and kill what minds not. Not while somebody receives."""
        if self._closed:
            return
        self._closed = True
        for number, patience_s in ((signal.SIGHUP, HANG_UP_S), (signal.SIGKILL, None)):
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience_s)
        with self._writing:
            self._input = -1
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        os.close(self._pidfd)
        self._close_terminal()

    def _silent(self) -> bool:
        """It has ended, and what it wrote has been read: of a terminal, of which we hold the other end, none is left;
        pipes are at their end."""
        return not self._sources if self._master < 0 else not self._poll.poll(0)

    def _close_terminal(self) -> None:
        for fd in (self._master, self._slave):
            if fd >= 0:
                os.close(fd)
        self._master = self._slave = -1


class Joined:
    """A connection to a port of this machine's loopback. OSError when nothing listens there."""

    def __init__(self, port: int) -> None:
        try:
            self._sock = socket.create_connection(("127.0.0.1", port), CONNECT_S)
        except ConnectionRefusedError:
            self._sock = socket.create_connection(("::1", port), CONNECT_S)
        self._sock.settimeout(None)
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)

    def receive(self, timeout_s: float) -> tuple[int, bytes] | None:
        if not self._poll.poll(timeout_s * 1000):
            return None
        try:
            data = self._sock.recv(CHUNK)
        except OSError:
            data = b""
        return (OUT, data) if data else (END, b"0")

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._sock.sendall(data)

    def end_input(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def resize(self, rows: int, columns: int) -> None:
        """It has no terminal."""

    def close(self) -> None:
        with contextlib.suppress(OSError):  # wakes who sends
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _directory(pid: int) -> str:
    """Where the replica is now; `/` when that directory was removed."""
    found = os.readlink(f"/proc/{pid}/cwd")
    return found if os.path.isdir(found) else "/"


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        return b""
    except OSError:  # the terminal was hung up
        return b""
