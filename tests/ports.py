"""Ports of this machine for tests to listen on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress


def port_range() -> str:
    """Ports that a server of this test process may give to its replicas: servers of others that run beside give away
    other ones."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    first = 20_000 + (int(worker) if worker else os.getpid()) % 12 * 1_000
    return f"{first}-{first + 899}"


def own_ports(count: int) -> list[int]:
    """Ports for servers that want them free until they listen: of this test process, and none that the system would
    give to others."""
    first = int(port_range().split("-")[1]) + 1
    found: list[int] = []
    for port in range(first, first + 100):
        with socket.socket() as sock, suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


@contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Ports on which nobody listens, and which the system gives to nobody else as long as this lasts: sockets are bound
    to them but do not listen. Whoever listens with SO_REUSEADDR, as servers do, can; before that, connections are
    refused.
    """
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", 0))
        yield [sock.getsockname()[1] for sock in socks]
