"""Sessions in replicas over a WebSocket: a command with its input, output and terminal, or a connection to a port.

The first message is the order, a JSON text (`Order`). Then, to here: bytes are input; the JSON texts `{"end": true}`
and `{"rows": 24, "columns": 80}` end the input and resize the terminal. From here: `{"started": true}`, then bytes, of
which the first is 1 for stdout and 2 for stderr, and last `{"exit": CODE}` or `{"error": …}`, the body of any error.
Called by the application; decides nothing, logs neither commands nor what they say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Annotated, Literal, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, WebSocket
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from jobsched.errors import Conflict, JobschedError, UsageError
from jobsched.ports import Ended, Output, Session, Window
from jobsched.service import Service, Where

MAX_SESSIONS = 128
ORDER_S = 30.0
"""Longest wait for the order."""
LOOK_S = 0.5
"""How often a session on which nothing comes is asked whether it shall go on."""
MAX_ARGUMENTS = 1_000

T = TypeVar("T")
Size = Annotated[int, Field(ge=1, le=10_000)]


class Order(BaseModel):
    """What shall be done in which replica; without a role in that of rank 0."""

    model_config = ConfigDict(extra="forbid")

    do: Literal["exec", "forward"]
    role: Annotated[str, Field(max_length=64)] = ""
    index: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    command: Annotated[tuple[Annotated[str, Field(max_length=128 << 10)], ...], Field(max_length=MAX_ARGUMENTS)] = ()
    stdin: bool = True
    """Whether it shall have input."""
    rows: Size | None = None
    """With `columns`: on a terminal of that size."""
    columns: Size | None = None
    port: Annotated[int, Field(ge=0, le=65_535)] = 0

    @property
    def window(self) -> Window | None:
        return Window(self.rows, self.columns) if self.rows and self.columns else None


def reach_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")
    desk = Desk(service)

    @router.websocket("/jobs/{ref}/reach")
    async def reach(socket: WebSocket, ref: str, owner: Annotated[str, Query(max_length=256)] = "") -> None:
        await desk.serve(socket, ref, owner)

    return router


class Desk:
    """All sessions of a server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._open = 0
        self._threads = anyio.CapacityLimiter(2 * MAX_SESSIONS)

    async def serve(self, socket: WebSocket, ref: str, owner: str) -> None:
        """One session, from the order to the end."""
        await socket.accept()
        last: dict[str, object]
        try:
            if self._open >= MAX_SESSIONS:
                raise Conflict(f"{MAX_SESSIONS} sessions are open in replicas already", hint="end one of them")
            self._open += 1
            try:
                order = await _order(socket)
                session = await self._blocking(partial(self._begin, ref, owner, order))
                try:
                    await socket.send_text('{"started": true}')
                    last = {"exit": await self._carry(socket, session)}
                finally:
                    await asyncio.shield(self._blocking(session.close))
            finally:
                self._open -= 1
        except JobschedError as exc:
            last = {"error": exc.to_wire()}
        except (WebSocketDisconnect, RuntimeError):  # it hung up, maybe while we were about to say something
            return
        with suppress(WebSocketDisconnect, RuntimeError):
            await socket.send_text(json.dumps(last))
            await socket.close()

    def _begin(self, ref: str, owner: str, order: Order) -> Session:
        where = Where(ref, order.role, order.index, owner)
        if order.do == "exec":
            return self._service.execute(where, order.command, order.window, stdin=order.stdin)
        return self._service.forward(where, order.port)

    async def _carry(self, socket: WebSocket, session: Session) -> int:
        """Both ways until the session ends: its code. WebSocketDisconnect when the other side hangs up."""
        going = True

        async def outward() -> int:
            while going:
                match await self._blocking(partial(session.receive, LOOK_S)):
                    case Output(data, error):
                        await socket.send_bytes((b"\2" if error else b"\1") + data)
                    case Ended(code):
                        return code
            raise WebSocketDisconnect

        async def inward() -> None:
            while True:
                message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                if (data := message.get("bytes")) is not None:
                    await self._blocking(partial(session.send, data))
                else:
                    await self._blocking(partial(_heed, session, message["text"]))

        out, into = asyncio.ensure_future(outward()), asyncio.ensure_future(inward())
        try:
            await asyncio.wait({out, into}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            going = False  # a thread that waits for output is not left alone with a session that is closed
            into.cancel()
            await asyncio.wait({out})
        if into.done() and not into.cancelled() and (wrong := into.exception()) is not None:
            raise wrong
        return out.result()

    async def _blocking(self, call: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(call, limiter=self._threads)


async def _order(socket: WebSocket) -> Order:
    try:
        async with asyncio.timeout(ORDER_S):
            return Order.model_validate_json(await socket.receive_text())
    except TimeoutError:
        raise UsageError(f"no order came within {ORDER_S:g} s") from None
    except ValidationError as exc:
        first = exc.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except KeyError:
        raise UsageError("the first message is not the order") from None


def _heed(session: Session, text: str) -> None:
    """What is told about the session. What makes no sense is not heeded."""
    try:
        told = json.loads(text)
        if told.get("end"):
            session.end_input()
        elif told.get("rows"):
            session.resize(Window(min(int(told["rows"]), 10_000), min(int(told["columns"]), 10_000)))
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise UsageError(f"{text[:80]!r} is no message of a session") from exc
