"""A session in a replica, seen from here: a WebSocket to the server (`api.reach` tells what goes over it).

Used by `exec`, `cp` and `port-forward`, and by the SDK. One thread receives, others may send; nothing is started behind
the caller's back.
"""

from __future__ import annotations

import base64
import json
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from jobsched.client.remote import Remote, from_wire, to_error
from jobsched.errors import Unreachable

CHUNK = 32 << 10
"""Bytes of input in one message."""
START_S = 60.0
"""Longest wait for a session to begin: an engine may be slow."""

HANG_UP_S = 2.0
LOOK_S = 0.1
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Stream = Literal["out", "err"]


class Channel:
    """An open session. `Unreachable` from any method once the server is gone; errors of the session itself from
    `receive`.

    The socket never blocks: a TLS connection takes one call at a time, and whoever waits to send must not keep the
    other thread from receiving, or both sides would wait for each other."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._frames = Connection(ConnectionType.CLIENT)
        self._sending = threading.Lock()
        """Held for a whole message."""
        self._touching = threading.Lock()
        """Held for one call of the socket, or of the frames."""
        self._owed = b""
        """Answers to pings that are to go out before the next message."""
        self._events: Iterator[Any] = iter(())
        self._text, self._data = "", b""
        self.code: int | None = None
        """The exit code, once it has ended."""

    def receive(self, timeout_s: float | None = None) -> tuple[Stream, bytes] | None:
        """What came next; None at the end (see `code`). TimeoutError when nothing came in time."""
        while self.code is None:
            for event in self._events:
                match event:
                    case Ping():
                        self._answer(event)
                    case BytesMessage():
                        self._data += event.data
                        if event.message_finished:
                            data, self._data = self._data, b""
                            return ("err" if data[:1] == b"\2" else "out"), data[1:]
                    case TextMessage():
                        self._text += event.data
                        if event.message_finished:
                            told, self._text = json.loads(self._text), ""
                            if "error" in told:
                                raise from_wire(told["error"])
                            if "exit" in told:
                                self.code = int(told["exit"])
                                return None
                            return "out", b""
                    case CloseConnection():
                        raise Unreachable("the server ended the session", hint="it may have been stopped")
            self._read(timeout_s)
        return None

    def send(self, data: bytes) -> None:
        """Input, in pieces. Blocks while the other side does not take it."""
        for at in range(0, len(data), CHUNK):
            self._send(BytesMessage(data[at : at + CHUNK]))

    def end_input(self) -> None:
        self.tell({"end": True})

    def resize(self, rows: int, columns: int) -> None:
        self.tell({"rows": rows, "columns": columns})

    def tell(self, message: Mapping[str, Any]) -> None:
        """The order, or news of the session."""
        self._send(TextMessage(json.dumps(message)))

    def hang_up(self) -> None:
        with suppress(Unreachable):
            self._send(CloseConnection(1000), patience_s=HANG_UP_S)

    def _send(self, event: Any, patience_s: float | None = None) -> None:
        until = None if patience_s is None else time.monotonic() + patience_s
        if not self._sending.acquire(timeout=-1 if patience_s is None else patience_s):
            return
        try:
            with self._touching:
                owed, self._owed = self._owed, b""
                view = memoryview(owed + self._frames.send(event))
            while view and (until is None or time.monotonic() < until):
                view = view[self._write(view) :]
        except LocalProtocolError as exc:
            raise Unreachable("the session has ended") from exc
        except OSError as exc:
            raise Unreachable(f"the session broke off ({exc or type(exc).__name__})") from exc
        finally:
            self._sending.release()

    def _write(self, view: memoryview) -> int:
        try:
            with self._touching:
                return self._sock.send(view)
        except WOULD_BLOCK:
            _ready(self._sock, select.POLLOUT, LOOK_S)
            return 0

    def _answer(self, ping: Ping) -> None:
        """At once if nobody is sending, else before the next message."""
        with self._touching:
            self._owed += self._frames.send(ping.response())
        if self._sending.acquire(blocking=False):
            try:
                with self._touching, suppress(OSError):
                    self._owed = self._owed[self._sock.send(self._owed) :]
            finally:
                self._sending.release()

    def _read(self, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                with self._touching:
                    data = self._sock.recv(1 << 16)
                    self._frames.receive_data(data or None)
                    self._events = iter(list(self._frames.events()))
                break
            except WOULD_BLOCK:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError from None
                _ready(self._sock, select.POLLIN, left)
            except (OSError, RemoteProtocolError) as exc:
                raise Unreachable(f"the session broke off ({exc or type(exc).__name__})") from exc
        if not data:
            raise Unreachable("the server hung up", hint="see its log; the job goes on")


def _ready(sock: socket.socket, what: int, timeout_s: float | None) -> None:
    """Until it can be read or written, as far as that can be told from outside of TLS."""
    poll = select.poll()
    poll.register(sock, what)
    poll.poll(None if timeout_s is None else timeout_s * 1_000)


@contextmanager
def opened(remote: Remote, path: str, order: Mapping[str, Any]) -> Iterator[Channel]:
    """A session that has begun. Errors are those of any request, and of the session's beginning."""
    headers = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
    }  # fmt: skip
    with remote.upgrade(f"{path}/reach", headers) as response:
        if response.status_code != 101:
            response.read()
            raise to_error(response)
        channel = Channel(_socket(response.extensions["network_stream"]))
        try:
            channel.tell(order)
            try:
                channel.receive(START_S)  # that it has begun
            except TimeoutError:
                raise Unreachable(f"the session did not begin within {START_S:g} s") from None
            yield channel
        finally:
            channel.hang_up()


def _socket(stream: Any) -> socket.socket:
    """What the HTTP client's connection talks through: the socket, or TLS on it."""
    found = stream.get_extra_info("ssl_object") or stream.get_extra_info("socket")
    if not isinstance(found, socket.socket):
        raise Unreachable("a session cannot go through a proxy that is itself reached by TLS")
    return found
