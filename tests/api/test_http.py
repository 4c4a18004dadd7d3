"""uvicorn on its thread: real connections, disconnects, slow readers, the end (e2e: real sockets)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from jobsched.api.app import Application, create_app
from jobsched.api.http import HttpServer
from tests.stage import Stage

pytestmark = pytest.mark.e2e


class Served:
    def __init__(self) -> None:
        self.stage = Stage()
        self.app: Application = create_app(self.stage.service, "t", version="1")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.server = HttpServer(self.app, self.listener, drain_s=2)
        self.server.start(timeout_s=60)

    def open(self, path: str) -> socket.socket:
        """A connection whose request is sent and whose answer nobody reads."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer t\r\n\r\n"
        connection.sendall(head.encode())
        return connection


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.server.stop()


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_watcher_that_goes_away_is_forgotten_before_the_next_keep_alive(served: Served) -> None:
    job = served.stage.run(served.stage.submit())
    paths = ("/v1/events", "/v1/progress", f"/v1/jobs/{job.id}/logs?follow=true")
    connections = [served.open(path) for path in paths for _ in range(3)]
    until(lambda: served.app.feed.watchers == 9)
    for connection in connections:
        connection.close()
    until(lambda: served.app.feed.watchers == 0)
    until(lambda: len(served.stage.live.listeners) == 1)  # the feed's own


def test_a_reader_that_never_reads_holds_nobody_up(served: Served) -> None:
    slow = served.open("/v1/events?after=0")
    until(lambda: served.app.feed.watchers == 1)
    for _ in range(500):
        served.stage.submit()
    quick = served.open("/v1/events?job=bert")
    assert quick.recv(1_000).startswith(b"HTTP/1.1 200")
    started = time.monotonic()
    served.server.stop()
    assert time.monotonic() - started < 60  # about the two seconds that open requests have
    slow.close()
    quick.close()


def test_small_answers_are_not_held_back(served: Served) -> None:
    """Forty milliseconds an answer is Nagle's algorithm waiting for a delayed acknowledgement. How long an answer takes
    on a machine that others use says nothing, so it is asked whether the algorithm is off."""
    connection = served.open("/v1/healthz")
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(10_000)
    (theirs,) = served.server._server.server_state.connections
    taken = theirs.transport.get_extra_info("socket")
    assert taken.getpeername() == connection.getsockname()
    assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
