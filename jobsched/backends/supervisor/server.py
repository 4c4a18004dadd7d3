"""The supervisor's unix socket: control connections that ask, watch connections that are told. Used by `__main__`.

A slow watcher costs nothing: what it has not yet been told is a set of keys, and it is told their newest state when its
socket can take more.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from typing import Any

from jobsched.backends.supervisor.keeper import Keeper
from jobsched.backends.supervisor.loop import Loop
from jobsched.backends.supervisor.protocol import (
    VERSION,
    Key,
    Layout,
    Lines,
    Message,
    Order,
    Settings,
    encode,
)

QUIT_S = 10.0
"""Longest wait for the groups of what was killed at the end."""


class Connection:
    """One server's end of the talk."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server, self._sock = server, sock
        self._lines = Lines()
        self._out = b""
        self._dirty: dict[Key, None] = {}
        self.watching = False
        self.held: dict[Key, None] = {}
        sock.setblocking(False)
        server.loop.watch(sock, self._readable)

    def tell(self, key: Key) -> None:
        """A watcher shall learn of this key's newest state."""
        if self.watching:
            self._dirty[key] = None
            self._server.loop.soon(self._flush)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(1 << 20)
            if not data:
                raise ConnectionResetError
            for message in self._lines.feed(data):
                answer = self._server.answer(self, message)
                self._server.flush_watchers()  # who asked may look at once
                self._out += encode(answer)
            self._flush()
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self.close()
        except Exception:
            self.close()
            raise

    def _flush(self) -> None:
        if self._dirty and not self._out:
            self._out = encode(self._server.report(list(self._dirty)))
            self._dirty.clear()
        try:
            while self._out:
                self._out = self._out[self._sock.send(self._out):]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self._server.loop.watch(self._sock, self._readable, self._writable if self._out or self._dirty else None)

    def _writable(self) -> None:
        self._flush()

    flush = _flush

    def close(self) -> None:
        if self in self._server.connections:
            self._server.connections.remove(self)
            self._server.loop.unwatch(self._sock)
            self._sock.close()
            self._server.let_go(self.held)


class Server:
    """Listens, answers, tells, and ends the supervisor when nobody needs it any more."""

    def __init__(self, layout: Layout, loop: Loop, listener: socket.socket) -> None:
        self.layout, self.loop = layout, loop
        self.connections: list[Connection] = []
        self.keeper = Keeper(layout, loop, self._changed)
        self.upgrade_to: list[str] = []
        self._listener = listener
        self._lonely_since = self._began = time.monotonic()
        self._quitting_since = 0.0
        self._heir = bool(self.keeper.held)
        """Whether replicas of an earlier supervisor wait for their holders to come back."""
        loop.watch(listener, self._accept)
        loop.every(1.0, self._look_around)

    def report(self, keys: list[Key]) -> Message:
        now = time.monotonic()
        replicas = self.keeper.replicas
        return {
            "replicas": [replicas[key].wire(now) for key in keys if key in replicas],
            "gone": [key for key in keys if key not in replicas],
        }

    def let_go(self, keys: Iterable[Key]) -> None:
        """Whoever held these has gone; those that nobody else holds end."""
        held = {key for connection in self.connections for key in connection.held}
        self.keeper.let_go([key for key in keys if key not in held])

    def flush_watchers(self) -> None:
        for connection in list(self.connections):
            if connection.watching:
                connection.flush()

    def answer(self, connection: Connection, message: Message) -> Message:
        keeper = self.keeper
        match message["do"]:
            case "hello":
                if message["version"] == VERSION:
                    keeper.configure(Settings.from_wire(message["settings"]))
                return self._hello()
            case "watch":
                connection.watching = True
                return {"full": True} | self.report(list(keeper.replicas))
            case "start":
                keeper.start(Order.from_wire(order) for order in message["orders"])
            case "hold":
                connection.held |= dict.fromkeys(message["keys"])
                keeper.hold(message["keys"])
            case "stop":
                keeper.stop(message["keys"], message["grace_ms"] / 1000)
            case "forget":
                keeper.forget(message["keys"])
            case "stacks":
                keeper.ask_stacks(message["keys"])
            case "state":
                return self.report(message["keys"])
            case "checkpoint":
                return {"ok": True, "keys": keeper.ask_checkpoint(message["keys"])}
            case "beside":
                return keeper.beside(message["key"])
            case "warm":
                keeper.prepare_warm(message["interpreter"], message["preload"], message["env"])
            case "upgrade":
                if keeper.starting:
                    return {"ok": False, "why": "replicas are just being started"}
                self.upgrade_to = [str(word) for word in message["argv"]]
                self.loop.stop()
            case "quit":
                if keeper.running and not message.get("kill"):
                    return {"ok": False, "why": f"{keeper.running} replicas are running"}
                self._quit()
            case unknown:
                return {"ok": False, "why": f"unknown request {unknown!r}"}
        return {"ok": True}

    def _hello(self) -> dict[str, Any]:
        return {
            "version": VERSION, "pid": os.getpid(), "limits": self.keeper.limiter.name, "running": self.keeper.running,
        }

    def _quit(self) -> None:
        """Kill what runs, and end once it is gone; its groups too, unless the kernel keeps them too long."""
        self._quitting_since = self._quitting_since or time.monotonic()
        self.keeper.stop(list(self.keeper.replicas), 0)
        kept = self.keeper.releasing and time.monotonic() - self._quitting_since < QUIT_S
        if self.keeper.running or kept:
            self.loop.at(0.02, self._quit)
        else:
            self.loop.stop()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        self.connections.append(Connection(self, sock))

    def _changed(self, key: Key) -> None:
        for connection in self.connections:
            connection.tell(key)

    def _look_around(self) -> None:
        now = time.monotonic()
        if not self.layout.journal.exists():  # our home was deleted: no server will ever find us again
            self._quit()
        elif self.connections or self.keeper.running:
            self._lonely_since = now
            if self._heir and now - self._began > self.keeper.settings.hold_again_s:
                self._heir = False
                self.let_go(list(self.keeper.held))
        elif now - self._lonely_since > self.keeper.settings.idle_exit_s:
            self.loop.stop()
