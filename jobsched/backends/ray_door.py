"""A door into a replica on a Ray cluster: one TCP connection between its actor and the server, for one session.

The actor opens it on its node and says where and with which secret it opens (that goes through Ray); the server comes
in. Nodes of a Ray cluster reach each other's ports, and what a terminal needs is too much for Ray's objects.
Both ways go messages: a byte for the kind, four for the length, the data. Used by `ray_actor` (`open_door`, standard
library only) and, for its words, by `ray_sessions` in the server.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
from contextlib import suppress
from typing import Protocol

from jobsched.backends.supervisor.beside import END

HEADER = struct.Struct(">BI")
SIZE = struct.Struct(">HH")
INPUT, INPUT_ENDS, RESIZE = 16, 17, 18
"""What the server sends; the other way go the pieces of `supervisor.beside`."""
SECRET_BYTES = 32
KNOCK_S = 15.0
"""How long a door stays open for somebody to come in."""
LOOK_S = 0.5
MAX_MESSAGE = 1 << 20


class Talk(Protocol):
    """What is behind a door; see `supervisor.beside`."""

    def receive(self, timeout_s: float) -> tuple[int, bytes] | None: ...

    def send(self, data: bytes) -> None: ...

    def end_input(self) -> None: ...

    def resize(self, rows: int, columns: int) -> None: ...

    def close(self) -> None: ...


def open_door(host: str, talk: Talk) -> tuple[int, str]:
    """Listen for the one who knows the secret, and let him talk; returns at once: port and secret. When nobody comes,
    and in the end, what is behind the door is closed."""
    listener = socket.create_server((host, 0), backlog=1)
    secret = secrets.token_bytes(SECRET_BYTES)
    threading.Thread(target=_attend, args=(listener, secret, talk), name="door", daemon=True).start()
    return int(listener.getsockname()[1]), secret.hex()


def _attend(listener: socket.socket, secret: bytes, talk: Talk) -> None:
    try:
        with listener, suppress(OSError, EOFError):
            listener.settimeout(KNOCK_S)
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(KNOCK_S)
                if not hmac.compare_digest(read_exactly(sock, SECRET_BYTES), secret):
                    return
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                gone = threading.Event()
                threading.Thread(target=_take, args=(sock, talk, gone), name="door-in", daemon=True).start()
                _give(sock, talk, gone)
    finally:
        talk.close()


def _give(sock: socket.socket, talk: Talk, gone: threading.Event) -> None:
    while not gone.is_set():
        piece = talk.receive(LOOK_S)
        if piece is not None:
            send_message(sock, *piece)
            if piece[0] == END:
                return


def _take(sock: socket.socket, talk: Talk, gone: threading.Event) -> None:
    with suppress(OSError, EOFError):
        while True:
            kind, data = read_message(sock)
            if kind == INPUT:
                talk.send(data)
            elif kind == INPUT_ENDS:
                talk.end_input()
            elif kind == RESIZE:
                talk.resize(*SIZE.unpack(data))
    gone.set()


def send_message(sock: socket.socket, kind: int, data: bytes = b"") -> None:
    sock.sendall(HEADER.pack(kind, len(data)) + data)


def read_message(sock: socket.socket) -> tuple[int, bytes]:
    """EOFError when the other side is gone, or makes no sense."""
    kind, size = HEADER.unpack(read_exactly(sock, HEADER.size))
    if size > MAX_MESSAGE:
        raise EOFError
    return kind, read_exactly(sock, size)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := sock.recv(size - len(data))):
            raise EOFError
        data += more
    return data
