"""uvicorn on a thread of its own: started and stopped from outside, with streams that end before connections are cut.

Called by `wiring`. Knows nothing of jobsched but the application it serves.
"""

from __future__ import annotations

import socket
import threading

import uvicorn

from jobsched.api.app import Application
from jobsched.errors import Unreachable

MAX_MESSAGE = 1 << 20
"""Bytes of one message of a session."""
SILENT_S = 300.0
"""Longest wait for the answer to a ping: whoever is asked may have stopped reading for a while on purpose."""


class HttpServer:
    """Serves an application on a listening socket. Not restartable."""

    def __init__(self, app: Application, listener: socket.socket, *, drain_s: float) -> None:
        # Connections inherit it. asyncio only sets it by itself on sockets made with an explicit protocol, and without
        # it every small answer waits 40 ms for a delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listener = listener
        self._server = _Uvicorn(app, drain_s)
        self._thread = threading.Thread(target=self._run, name="jobsched-http", daemon=True)

    def start(self, *, timeout_s: float) -> None:
        """Returns once connections are answered; `Unreachable` if that does not happen in time."""
        self._thread.start()
        if not self._server.answering.wait(timeout_s):
            raise Unreachable("the HTTP server did not start in time")

    def stop(self) -> None:
        """Ends streams, lets open requests finish (for `drain_s`), closes the socket."""
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])


class _Uvicorn(uvicorn.Server):
    def __init__(self, app: Application, drain_s: float) -> None:
        super().__init__(uvicorn.Config(
            app.asgi, lifespan="on", ws="wsproto", ws_max_size=MAX_MESSAGE, ws_ping_timeout=SILENT_S,
            log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=round(drain_s), timeout_keep_alive=75, backlog=512,
        ))  # fmt: skip
        self._feed = app.feed
        self.answering = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answering.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._feed.close()
        await super().shutdown(sockets)
