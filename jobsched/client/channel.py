"""A session in a replica, seen from here: a WebSocket to the server (`api.reach` tells what goes over it).

Used by `exec`, `cp` and `port-forward`, and by the SDK. One thread receives, others may send; nothing is started behind
the caller's back.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

import httpcore2
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

from jobsched.client.remote import Remote, from_wire, to_error
from jobsched.errors import Unreachable

CHUNK = 32 << 10
"""Bytes of input in one message."""
START_S = 60.0
"""Longest wait for a session to begin: an engine may be slow."""

Stream = Literal["out", "err"]


class Channel:
    """An open session. `Unreachable` from any method once the server is gone; errors of the session itself from
    `receive`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._frames = Connection(ConnectionType.CLIENT)
        self._sending = threading.Lock()
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
                        self._send(event.response())
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
        """Input, in pieces."""
        for at in range(0, len(data), CHUNK):
            self._send(BytesMessage(data[at : at + CHUNK]))

    def end_input(self) -> None:
        self._tell({"end": True})

    def resize(self, rows: int, columns: int) -> None:
        self._tell({"rows": rows, "columns": columns})

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._send(TextMessage(json.dumps(message)))

    def _send(self, event: Any) -> None:
        with self._sending:
            try:
                self._stream.write(self._frames.send(event), None)
            except (httpcore2.NetworkError, OSError) as exc:
                raise Unreachable(f"the session broke off ({exc or type(exc).__name__})") from exc

    def _read(self, timeout_s: float | None) -> None:
        try:
            data = self._stream.read(1 << 16, timeout_s)
        except httpcore2.TimeoutException:
            raise TimeoutError from None
        except (httpcore2.NetworkError, OSError) as exc:
            raise Unreachable(f"the session broke off ({exc or type(exc).__name__})") from exc
        with self._sending:
            self._frames.receive_data(data or None)
            self._events = iter(list(self._frames.events()))
        if not data:
            raise Unreachable("the server hung up", hint="see its log; the job goes on")

    def hang_up(self) -> None:
        with suppress(Unreachable, Exception):
            self._send(CloseConnection(1000))


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
        channel = Channel(response.extensions["network_stream"])
        try:
            channel._tell(order)
            try:
                channel.receive(START_S)  # that it has begun
            except TimeoutError:
                raise Unreachable(f"the session did not begin within {START_S:g} s") from None
            yield channel
        finally:
            channel.hang_up()

