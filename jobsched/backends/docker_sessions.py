"""A command in a running container, by the engine's exec: one hijacked connection of its own for each.

Used by `docker_engine`. The engine says which bytes are stdout and which stderr; it neither tells the end of a command
whose connection is lost nor ends it, so that is done by its mark (`containers.HANG_UP`).
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from jobsched.backends.supervisor.beside import CHUNK
from jobsched.errors import BackendUnreachable
from jobsched.ports import Ended, Output, Window

HEADER = struct.Struct(">BxxxL")
STDERR = 2
CODE_S = 30.0
"""Longest wait for the exit code of a command whose output has ended."""
RETRY_S = 0.05
LOST = 137
"""The code of what ended with its container: nobody tells another one."""


class Exec:
    """One command. `code` asks for its exit code (None: it runs), `resized` tells the engine the size of its terminal,
    `hang_up` ends it, `left` lets go of the client."""

    def __init__(
        self, sock: Any, terminal: bool, *, code: Callable[[], int | None], resized: Callable[[Window], None],
        hang_up: Callable[[], None], left: Callable[[], None],
    ) -> None:  # fmt: skip
        self._sock = getattr(sock, "_sock", sock)
        self._kept = sock  # its response would close the connection as it goes
        self._terminal = terminal
        self._code, self.resize, self._hang_up, self._left = code, resized, hang_up, left
        self._held = _read_ahead(sock)
        self._over = self._closed = False
        self._sock.settimeout(None)
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)

    def receive(self, timeout_s: float) -> Output | Ended | None:
        deadline = time.monotonic() + timeout_s
        while (piece := self._piece()) is None:
            pending = isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()
            if not pending and not self._poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                return None
            try:
                data = self._sock.recv(CHUNK)
            except OSError:
                data = b""
            if not data:
                return self._end()
            self._held += data
        return piece

    def _piece(self) -> Output | None:
        if self._terminal:
            data, self._held = self._held, b""
            return Output(data) if data else None
        if len(self._held) < HEADER.size:
            return None
        kind, size = HEADER.unpack_from(self._held)
        data = self._held[HEADER.size : HEADER.size + size]
        if len(data) < size:
            return None
        self._held = self._held[HEADER.size + size :]
        return Output(data, error=kind == STDERR)

    def _end(self) -> Ended:
        self._over = True
        until = time.monotonic() + CODE_S
        while (code := self._code()) is None:
            if time.monotonic() > until:
                raise BackendUnreachable("the engine broke off the session")
            time.sleep(RETRY_S)
        return Ended(code)

    def send(self, data: bytes) -> None:
        with suppress(OSError):  # it has ended
            self._sock.sendall(data)

    def end_input(self) -> None:
        if self._terminal:
            self.send(b"\4")
        elif isinstance(self._sock, ssl.SSLSocket):
            raise BackendUnreachable("an engine that is reached over TLS cannot be told that the input ends",
                                     hint="reach it by ssh:// or a unix socket for this")
        else:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        if not self._over:
            with suppress(BackendUnreachable):
                self._hang_up()
        self._left()


def _read_ahead(sock: Any) -> bytes:
    """What of the output came with the head of the answer, and lies in the HTTP client's buffer."""
    buffer = getattr(getattr(getattr(getattr(sock, "_response", None), "raw", None), "_fp", None), "fp", None)
    if buffer is None or not hasattr(buffer, "read1"):
        return b""
    inner = getattr(sock, "_sock", sock)
    inner.setblocking(False)
    try:
        return buffer.read1(CHUNK) or b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return b""
