"""Sessions (`ports.Session`) that several adapters have in common. Used by adapters; decides nothing."""

from __future__ import annotations

import select
import socket
from contextlib import suppress

from jobsched.backends.supervisor.beside import CHUNK, END, ERR, Beside
from jobsched.errors import Conflict
from jobsched.ports import Ended, Output, Window

CONNECT_S = 10.0
TERMINAL = {"TERM": "xterm-256color"}
"""What a command on a terminal is told of it: what nearly all terminals are today."""


class Local:
    """A command beside a replica of this machine."""

    def __init__(self, beside: Beside) -> None:
        self._beside = beside
        self.send = beside.send
        self.end_input = beside.end_input
        self.close = beside.close

    def receive(self, timeout_s: float) -> Output | Ended | None:
        return None if (piece := self._beside.receive(timeout_s)) is None else taken(*piece)

    def resize(self, window: Window) -> None:
        self._beside.resize(window.rows, window.columns)


class Connected:
    """A connection to something that listens on this machine."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    @staticmethod
    def to(port: int) -> Connected:
        """To that port of the loopback. Conflict when nothing listens there."""
        for host in ("127.0.0.1", "::1"):
            with suppress(OSError):
                sock = socket.create_connection((host, port), CONNECT_S)
                sock.settimeout(None)
                return Connected(sock)
        raise Conflict(f"nothing listens on port {port} there", hint="is the program up, and is it its port?")

    def receive(self, timeout_s: float) -> Output | Ended | None:
        if not self._poll.poll(timeout_s * 1000):
            return None
        try:
            data = self._sock.recv(CHUNK)
        except OSError:
            return Ended(0)
        return Output(data) if data else Ended(0)

    def send(self, data: bytes) -> None:
        with suppress(OSError):
            self._sock.sendall(data)

    def end_input(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def resize(self, window: Window) -> None:
        """It has no terminal."""

    def close(self) -> None:
        with suppress(OSError):  # wakes who sends
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def taken(kind: int, data: bytes) -> Output | Ended:
    """A piece of `supervisor.beside` as the port's."""
    return Ended(int(data)) if kind == END else Output(data, error=kind == ERR)
