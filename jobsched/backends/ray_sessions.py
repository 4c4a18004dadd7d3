"""The server's side of a door into a replica on a Ray cluster. Used by `ray`."""

from __future__ import annotations

import select
import socket
from contextlib import suppress

from jobsched.backends import ray_door as door
from jobsched.backends.sessions import taken
from jobsched.errors import BackendUnreachable
from jobsched.ports import Ended, Output, Window

CONNECT_S = 10.0


class Visit:
    """A session behind a door. BackendUnreachable when nobody opens."""

    def __init__(self, host: str, port: int, secret: str) -> None:
        try:
            self._sock = socket.create_connection((host, port), CONNECT_S)
            self._sock.sendall(bytes.fromhex(secret))
        except OSError as error:
            raise BackendUnreachable(f"the node of the replica cannot be reached at {host}:{port}: {error}",
                                     hint="nodes of a Ray cluster must reach each other's ports") from error
        self._sock.settimeout(None)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)

    def receive(self, timeout_s: float) -> Output | Ended | None:
        if not self._poll.poll(timeout_s * 1000):
            return None
        try:
            return taken(*door.read_message(self._sock))
        except (OSError, EOFError) as error:
            raise BackendUnreachable("the session broke off with the replica's actor") from error

    def send(self, data: bytes) -> None:
        self._tell(door.INPUT, data)

    def end_input(self) -> None:
        self._tell(door.INPUT_ENDS)

    def resize(self, window: Window) -> None:
        self._tell(door.RESIZE, door.SIZE.pack(window.rows, window.columns))

    def close(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _tell(self, kind: int, data: bytes = b"") -> None:
        with suppress(OSError):  # it has ended
            door.send_message(self._sock, kind, data)
