"""Sessions over a WebSocket: who is let in, what is refused, and that both ways are carried."""

from __future__ import annotations

import json
import queue
import threading
from typing import Any

import pytest
from starlette.testclient import WebSocketDenialResponse

from jobsched.api import reach
from jobsched.errors import BackendUnreachable, Conflict
from jobsched.ports import Ended, Output, Window
from jobsched.service import Where
from tests.api.conftest import Api


class Echo:
    """A session that says what it hears, in capitals."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[Output | Ended | Exception] = queue.Queue()
        self.closed = threading.Event()
        self.sizes: list[Window] = []
        self.resize = self.sizes.append

    def receive(self, timeout_s: float) -> Output | Ended | None:
        try:
            piece = self.pieces.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(piece, Exception):
            raise piece
        return piece

    def send(self, data: bytes) -> None:
        self.pieces.put(Output(data.upper(), error=data == b"err"))

    def end_input(self) -> None:
        self.pieces.put(Ended(3))

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def asked(api: Api, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Echo]:
    """What the service was asked for, and the session that it gives."""
    calls: list[Any] = []
    echo = Echo()

    def execute(where: Where, command: Any, window: Window | None = None, *, stdin: bool = True) -> Echo:
        calls.append((where, command, window))
        if command == ("gone",):
            raise Conflict("it does not run", hint="look")
        return echo

    monkeypatch.setattr(api.stage.service, "execute", execute)
    monkeypatch.setattr(reach, "ORDER_S", 120.0)
    return calls, echo


ORDER = {"do": "exec", "command": ["cat"]}


def test_both_ways_are_carried_to_the_end(api: Api, asked: tuple[list[Any], Echo]) -> None:
    calls, echo = asked
    with api.http.websocket_connect("ws://127.0.0.1/v1/jobs/bert/reach?owner=me") as socket:
        socket.send_json(ORDER | {"role": "worker", "index": 1, "rows": 24, "columns": 80})
        assert socket.receive_json() == {"started": True}
        socket.send_bytes(b"hello")
        assert socket.receive_bytes() == b"\1HELLO"
        socket.send_bytes(b"err")
        assert socket.receive_bytes() == b"\2ERR"
        socket.send_json({"rows": 30, "columns": 90})
        socket.send_json({"end": True})
        assert socket.receive_json() == {"exit": 3}
        assert socket.receive()["type"] == "websocket.close"
    assert calls == [(Where("bert", "worker", 1, "me"), ("cat",), Window(24, 80))]
    assert echo.sizes == [Window(30, 90)]
    assert echo.closed.wait(60)


@pytest.mark.parametrize("headers", [{"Authorization": ""}, {"Authorization": "Bearer wrong"}])
def test_nobody_is_let_in_without_the_token(
    api: Api, asked: tuple[list[Any], Echo], headers: dict[str, str]
) -> None:
    with pytest.raises(WebSocketDenialResponse) as denied, api.http.websocket_connect(
        "ws://127.0.0.1/v1/jobs/bert/reach", headers=headers
    ):
        pass
    assert (denied.value.status_code, denied.value.json()["code"]) == (401, "E400")
    assert asked[0] == []


def test_a_foreign_host_is_refused(api: Api, asked: tuple[list[Any], Echo]) -> None:
    with pytest.raises(WebSocketDenialResponse) as denied, api.http.websocket_connect(
        "ws://127.0.0.1/v1/jobs/bert/reach", headers={"Host": "evil.example"}
    ):
        pass
    assert denied.value.json()["code"] == "E403"
    assert asked[0] == []


@pytest.mark.parametrize(("order", "code"), [
    ({"do": "exec", "command": ["gone"]}, "E500"),
    ({"do": "dance"}, "E100"),
    ({**ORDER, "secret": 1}, "E100"),
    ({**ORDER, "rows": 0}, "E100"),
    ({**ORDER, "command": ["x"] * (reach.MAX_ARGUMENTS + 1)}, "E100"),
])  # fmt: skip
def test_what_cannot_begin_is_told(
    api: Api, asked: tuple[list[Any], Echo], order: dict[str, Any], code: str
) -> None:
    with api.http.websocket_connect("ws://127.0.0.1/v1/jobs/bert/reach") as socket:
        socket.send_json(order)
        error = socket.receive_json()["error"]
    assert error["code"] == code
    assert error["message"]


def test_an_engine_that_is_lost_meanwhile_is_told(api: Api, asked: tuple[list[Any], Echo]) -> None:
    with api.http.websocket_connect("ws://127.0.0.1/v1/jobs/bert/reach") as socket:
        socket.send_json(ORDER)
        socket.receive_json()
        asked[1].pieces.put(BackendUnreachable("the engine is away"))
        assert socket.receive_json()["error"]["code"] == "E610"
    assert asked[1].closed.wait(60)


def test_hanging_up_closes_the_session(api: Api, asked: tuple[list[Any], Echo]) -> None:
    with api.http.websocket_connect("ws://127.0.0.1/v1/jobs/bert/reach") as socket:
        socket.send_json(ORDER)
        socket.receive_json()
    assert asked[1].closed.wait(60)


def test_nonsense_in_a_session_is_told(api: Api, asked: tuple[list[Any], Echo]) -> None:
    with api.http.websocket_connect("ws://127.0.0.1/v1/jobs/bert/reach") as socket:
        socket.send_json(ORDER)
        socket.receive_json()
        socket.send_text(json.dumps(["rows"]))
        assert socket.receive_json()["error"]["code"] == "E100"


def test_there_is_a_limit(api: Api, asked: tuple[list[Any], Echo], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "MAX_SESSIONS", 1)
    with api.http.websocket_connect("ws://127.0.0.1/v1/jobs/bert/reach") as first:
        first.send_json(ORDER)
        first.receive_json()
        with api.http.websocket_connect("ws://127.0.0.1/v1/jobs/bert/reach") as second:
            assert second.receive_json()["error"]["code"] == "E500"


def test_a_backend_that_cannot_says_so(api: Api) -> None:
    with api.http.websocket_connect("ws://127.0.0.1/v1/jobs/nobody/reach") as socket:
        socket.send_json(ORDER)
        assert socket.receive_json()["error"]["code"] == "E300"
