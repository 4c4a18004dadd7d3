"""Commands in pods and connections to their ports: the API server's websockets, one for each.

Used by `kubernetes_api`. Every message begins with the byte of its channel. Only the fifth version of the protocol for
commands (Kubernetes 1.30) can say that the input ends; ports cannot have one side closed alone.
"""

from __future__ import annotations

import json
import select
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import websocket

from jobsched.errors import BackendUnreachable
from jobsched.ports import Ended, Output, Window

STDIN, STDOUT, STDERR, STATUS, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
COMMANDS = "v5.channel.k8s.io,v4.channel.k8s.io"
PORTS = "v4.channel.k8s.io"
FAILED_TO_START = 126
LOST = 137
"""The code of what ended with its pod: nobody tells another one."""
QUIET_S = 2.0
"""A connection whose one side has ended its input ends as a whole after so long a silence."""


class Socket:
    """One websocket. OSError and the library's own errors mean that the other side is gone."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._poll = select.poll()
        self._poll.register(socket.sock, select.POLLIN)
        self.version = (socket.getheaders() or {}).get("sec-websocket-protocol", "")
        socket.sock.settimeout(None)

    def receive(self, timeout_s: float) -> tuple[int, bytes] | None:
        """Channel and data; None when nothing came in time. EOFError at the end."""
        deadline = time.monotonic() + timeout_s
        while True:
            sock = self._socket.sock
            pending = isinstance(sock, ssl.SSLSocket) and sock.pending()
            if not pending and not self._poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                return None
            try:
                opcode, frame = self._socket.recv_data_frame(True)
            except (websocket.WebSocketException, OSError, AttributeError) as error:
                raise EOFError from error
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise EOFError
            if opcode in (websocket.ABNF.OPCODE_BINARY, websocket.ABNF.OPCODE_TEXT) and frame.data:
                return frame.data[0], bytes(frame.data[1:])

    def send(self, channel: int, data: bytes) -> None:
        with suppress(websocket.WebSocketException, OSError):  # it has ended
            self._socket.send(bytes([channel]) + data, opcode=websocket.ABNF.OPCODE_BINARY)

    def close(self) -> None:
        with suppress(websocket.WebSocketException, OSError):
            self._socket.close(timeout=0)


class Exec:
    """A command in a pod. `hang_up` ends what is left of one that is closed before it ends."""

    def __init__(self, socket: Socket, hang_up: Callable[[], None]) -> None:
        self._socket, self._hang_up = socket, hang_up
        self._over = self._closed = False
        self._code = -1

    def receive(self, timeout_s: float) -> Output | Ended | None:
        if self._code >= 0:
            self._over = True
            return Ended(self._code)
        try:
            piece = self._socket.receive(timeout_s)
        except EOFError:
            self._over = True
            return Ended(LOST)
        match piece:
            case (channel, data) if channel in (STDOUT, STDERR) and data:
                return Output(data, error=channel == STDERR)
            case (channel, data) if channel == STATUS:
                self._code, said = code_of(data)
                return Output(said.encode() + b"\n", error=True) if said else self.receive(timeout_s)
        return None

    def send(self, data: bytes) -> None:
        self._socket.send(STDIN, data)

    def end_input(self) -> None:
        if not self._socket.version.startswith("v5"):
            raise BackendUnreachable("this API server cannot tell a command that its input ends",
                                     hint="that needs Kubernetes 1.30")
        self._socket.send(CLOSE, bytes([STDIN]))

    def resize(self, window: Window) -> None:
        self._socket.send(RESIZE, json.dumps({"Width": window.columns, "Height": window.rows}).encode())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._socket.close()
        if not self._over:
            with suppress(BackendUnreachable):
                self._hang_up()


class Forward:
    """A connection to a port of a pod; the first message of each channel names the port."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self._named: set[int] = set()
        self._failed = False
        self._quiet_at = 0.0

    def receive(self, timeout_s: float) -> Output | Ended | None:
        if self._failed:
            return Ended(1)
        if self._quiet_at and time.monotonic() > self._quiet_at:
            return Ended(0)
        try:
            piece = self._socket.receive(min(timeout_s, QUIET_S) if self._quiet_at else timeout_s)
        except EOFError:
            return Ended(0)
        if piece is None:
            return None
        channel, data = piece
        if channel not in self._named:
            self._named.add(channel)
            data = data[2:]
        if not data:
            return None
        if self._quiet_at:
            self._quiet_at = time.monotonic() + QUIET_S
        self._failed = channel == STDOUT  # its second channel
        return Output(data, error=self._failed)

    def send(self, data: bytes) -> None:
        self._socket.send(STDIN, data)

    def end_input(self) -> None:
        self._quiet_at = time.monotonic() + QUIET_S

    def resize(self, window: Window) -> None:
        """It has no terminal."""

    def close(self) -> None:
        self._socket.close()


def code_of(status: bytes) -> tuple[int, str]:
    """How a command ended, and why it never began, if so."""
    found = json.loads(status)
    if found.get("status") == "Success":
        return 0, ""
    for cause in (found.get("details") or {}).get("causes") or ():
        if cause.get("reason") == "ExitCode":
            return int(cause["message"]), ""
    return FAILED_TO_START, str(found.get("message", "it could not be run"))
