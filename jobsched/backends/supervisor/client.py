"""The other end of the supervisor's socket: start a supervisor, call it, ask it.

Used by `local` in the server and by `ray_actor` on the nodes of a Ray cluster; like the supervisor itself it imports
nothing but the standard library and jobsched's errors.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from jobsched.backends.supervisor import replica_log
from jobsched.backends.supervisor.protocol import Layout, Lines, Message, encode
from jobsched.errors import BackendUnreachable

ANSWER_S = 30.0
"""Longest wait for an answer of the supervisor: on a machine that is busy it may be late."""
START_S = 30.0
"""Longest wait for a new supervisor to be there."""
RETRY_S = 0.01


class Line:
    """One connection. OSError (timeouts included) when the other side is gone."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(ANSWER_S)
        self._lines = Lines()
        self._early: list[Message] = []
        """What came together with an answer: a watcher's first changes may follow its listing at once."""
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)
        try:
            self._sock.connect(str(path))
        except OSError:
            self._sock.close()
            raise

    def ask(self, message: Message) -> Message:
        self._sock.sendall(encode(message))
        while not (found := self._read()):
            pass
        self._early += found[1:]
        return found[0]

    def receive(self, wait_s: float) -> list[Message]:
        """Messages that have come, waiting up to `wait_s` for the first, and longer for the rest of one."""
        found, self._early = self._early, []
        while self._poll.poll(0 if found else wait_s * 1000):
            found += self._read()
            if not found:
                wait_s = ANSWER_S
        return found

    def wait_for_end(self) -> None:
        """Until the other side has closed its end."""
        try:
            while self._sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        self.close()

    def _read(self) -> list[Message]:
        data = self._sock.recv(1 << 20)
        if not data:
            raise ConnectionResetError("it hung up")
        return list(self._lines.feed(data))

    def close(self) -> None:
        self._sock.close()


def dial(layout: Layout, first: Message, environ: Mapping[str, str]) -> tuple[Line, Message]:
    """A new connection and the answer to its first request. The supervisor is started (with `environ`) if need be; one
    that is just coming or going (it may take a call and then hang up) is tried again for a while."""
    deadline = time.monotonic() + START_S
    while True:
        line = None
        try:
            line = Line(layout.control_socket)
            return line, line.ask(first)
        except OSError as error:
            if line is not None:
                line.close()
            if time.monotonic() >= deadline:
                raise BackendUnreachable(f"the supervisor does not answer: {error}") from error
            if line is None:
                _start(layout, environ)
            time.sleep(RETRY_S)


def command(layout: Layout) -> list[str]:
    """What becomes the supervisor of a home directory."""
    return [sys.executable, "-P", "-m", "jobsched.backends.supervisor", str(layout.home)]


def inherited(environ: Mapping[str, str], python: str) -> dict[str, str]:
    """What replicas inherit from the process that has a supervisor started: all but jobsched's own variables, with
    `python` being that process's own interpreter unless PATH names that one already."""
    env = {name: value for name, value in environ.items() if not name.startswith("JOBSCHED_")}
    folder, path = os.path.dirname(python), env.get("PATH", os.defpath)
    if folder not in path.split(os.pathsep):
        path = folder + os.pathsep + path
    return env | {"PATH": path}


def _start(layout: Layout, environ: Mapping[str, str]) -> None:
    log = layout.own_log
    try:
        layout.make()
        with open(log, "ab") as out:
            done = subprocess.run(
                command(layout), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/", env=dict(environ),
                timeout=START_S, check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendUnreachable(f"the supervisor cannot be started: {error}") from error
    if done.returncode:
        last = " | ".join(replica_log.tail(log, 3))
        raise BackendUnreachable(f"the supervisor ended at once: {last}", hint=f"see {log}")
