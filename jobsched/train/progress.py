"""Progress reports of one replica: cheap to give on every step, sent by a background thread.

Used by `context`. Speaks the report protocol, version 1: each report is the replica's full newest state as JSON, over a
unix datagram socket, HTTP, or a marked line on stdout. Never blocks the training loop and never raises because nobody
listens: a report that is lost is made good by the next one. Only what no later report may make good (a save, the last
state) waits for a listener that is there but busy.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import socket
import struct
import sys
import threading
import urllib.request
from collections.abc import Callable
from typing import SupportsFloat

Send = Callable[[bytes, bool], None]
"""Sends one report; whether it may wait for a busy listener."""

BEAT_S = 2.0
"""Longest silence: the thread repeats the newest report so that silence means a stopped interpreter."""
INTERVAL_S = {"unix": 0.1, "http": 0.5, "log": 1.0, "none": 60.0}
"""Shortest time between two reports, by transport."""
PATIENCE_S = 10
"""Longest wait for a listener that is busy, where a report is waited for at all."""
MESSAGE_LENGTH = 2_000


def open_transport(address: str, token: str) -> tuple[str, Send]:
    """The transport's kind and a function that sends one report; sending raises OSError when nobody listens."""
    if address.startswith("unix:"):
        return "unix", _unix(address.removeprefix("unix:"))
    if address.startswith(("http://", "https://")):
        return "http", _http(address, token)
    return "log", _log


def _unix(path: str) -> Send:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", PATIENCE_S, 0))  # until its queue has room

    def send(data: bytes, waits: bool) -> None:
        flags = 0 if waits else socket.MSG_DONTWAIT
        sock.sendto(data, flags, path)  # unconnected: a socket that was gone and came back is found at once

    return send


def _http(address: str, token: str) -> Send:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def send(data: bytes, waits: bool) -> None:
        request = urllib.request.Request(address, data, headers)
        with urllib.request.urlopen(request, timeout=5):
            pass

    return send


def _log(data: bytes, waits: bool) -> None:
    sys.stdout.write(f"::jobsched:: {data.decode()}\n")
    sys.stdout.flush()


def _ignore(data: bytes, waits: bool) -> None:
    return None


class Reporter:
    """Holds the newest state of one replica and sends it at most every `INTERVAL_S`, at least every `BEAT_S`.

    `address` as in `ReplicaEnv.report`; None keeps the state without sending it anywhere (outside jobsched).
    """

    def __init__(self, key: str, token: str, address: str | None) -> None:
        self.fields: dict[str, object] = {"v": 1, "key": key, "token": token}
        self.metrics: dict[str, SupportsFloat] = {}
        self._kind, self._send = ("none", _ignore) if address is None else open_transport(address, token)
        self._sequence = 0
        self._saves = 0
        self._dirty = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._sending = threading.Lock()
        self._pid = os.getpid()
        threading.Thread(target=self._run, name="jobsched-report", daemon=True).start()
        atexit.register(self.close)

    def put(self, step: int | None, total: int | None, world: int | None, message: str | None,
            metrics: dict[str, SupportsFloat]) -> None:
        """Take over new values; about a microsecond. The thread sends them soon."""
        fields = self.fields
        if step is not None:
            fields["step"] = int(step)
        if total is not None:
            fields["total"] = int(total)
        if world is not None:
            fields["world"] = int(world)
        if message is not None:
            fields["message"] = message[:MESSAGE_LENGTH]
        if metrics:
            self.metrics.update(metrics)
        if not self._dirty:  # after the values: whoever clears the mark reads them
            self._dirty = True
            self._wake.set()

    def saved(self, step: int, path: str) -> None:
        """Acknowledge a checkpoint; sent before this returns, because the process may be stopped right after."""
        self._saves += 1  # told apart even if nothing was trained in between: each one is an answer
        self.fields["saved"] = {"step": step, "path": path, "n": self._saves}
        with self._sending:
            self._tell(waits=True)

    def flush(self) -> None:
        """Send the newest state now."""
        with self._sending:
            self._tell()

    def close(self) -> None:
        """Send the last state and end the thread, which sends nothing after that. A forked child leaves its parent's
        reporter alone."""
        if os.getpid() == self._pid and not self._closing.is_set():
            with self._sending:  # the thread may be late, and must not write while the interpreter ends
                self._closing.set()
                self._tell(waits=True)
            self._wake.set()

    def _tell(self, waits: bool = False) -> None:
        self._sequence += 1
        metrics = {name: number for name, value in list(self.metrics.items())
                   if math.isfinite(number := float(value))}  # NaN is no JSON
        try:
            self._send(json.dumps({**self.fields, "seq": self._sequence, "metrics": metrics}).encode(), waits)
        except (OSError, ValueError):
            pass  # nobody listens right now: the next report says it all again

    def _run(self) -> None:
        interval = INTERVAL_S[self._kind]
        while not self._closing.is_set():
            self._wake.wait(BEAT_S)
            self._wake.clear()
            self._dirty = False
            with self._sending:
                if not self._closing.is_set():
                    self._tell()
            self._closing.wait(interval)
