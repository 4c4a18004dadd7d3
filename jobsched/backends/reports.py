"""Reports of replicas (protocol version 1) where no supervisor takes them: from a socket of the server's own, and from
lines in a log stream. Used by adapters; decides nothing. Progress is folded by `supervisor.replica.Progress`.
"""

from __future__ import annotations

import hmac
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobsched.backends.supervisor.replica import Progress
from jobsched.core import observation

MARK = b"::jobsched:: "
"""What a report in a log stream begins with; the rest of the line is its JSON."""
LONGEST = 1 << 20
"""A marked line that grows longer than this is none of ours."""
SILENT_S = 3.0
"""Reports come at least every two seconds, whatever the script does."""


def parse(data: bytes) -> dict[str, Any] | None:
    """A report, or None for what is none."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("v") == 1 else None


def take(progress: Progress | None, data: dict[str, Any], token: str) -> Progress | None:
    """Fold one report into what is known of its replica; None when the token is wrong or it makes no sense."""
    if not hmac.compare_digest(str(data.get("token", "")).encode(), token.encode()):
        return None
    progress = progress or Progress()
    try:
        progress.take(data, time.monotonic())
    except (TypeError, ValueError, KeyError, AttributeError):
        return None
    return progress


def seen(progress: Progress) -> observation.Progress:
    """As observations carry it."""
    now = time.monotonic()
    return observation.Progress(
        step=progress.step, total=progress.total, world_size=progress.world, message=progress.message,
        step_age_ms=int((now - progress.step_at) * 1000), beat_age_ms=int((now - progress.beat_at) * 1000),
        saved_step=progress.saved[0], saved_path=progress.saved[1], metrics=tuple(sorted(progress.metrics.items())),
    )


class LineFilter:
    """Parts a log stream into what people wrote and what the training library reported. Feed it pieces in order."""

    def __init__(self) -> None:
        self.held = b""
        """The beginning of a marked line whose end has not come."""

    def feed(self, piece: bytes) -> tuple[bytes, list[dict[str, Any]]]:
        """What is for people, and the reports. Cheap where there is no mark."""
        data = self.held + piece
        self.held = b""
        if MARK not in data:
            return data, []
        shown: list[bytes] = []
        reports: list[dict[str, Any]] = []
        for line in data.splitlines(keepends=True):
            text, mark, told = line.partition(MARK)
            if mark and not line.endswith(b"\n") and len(told) < LONGEST:
                self.held = mark + told
                told = b""
            elif mark and (report := parse(told)) is not None:
                reports.append(report)
            else:
                text = line
            shown.append(text)
        return b"".join(shown), reports


class ReportSocket:
    """A unix datagram socket that anybody may write to, in a directory of its own so that it can be mounted; `took` is
    called with every report on a thread of its own."""

    def __init__(self, directory: Path, took: Callable[[dict[str, Any]], None]) -> None:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        directory.chmod(0o755)  # what keeps strangers out is the directory above, which is not mounted
        self.path = directory / "replicas.sock"
        self._took = took
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.bind(str(self.path))
        self.path.chmod(0o666)  # containers have users of their own; each report carries its attempt's token
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hear no more; replicas go on and find the next server's socket in the same place."""
        with suppress(OSError):  # closed before
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(2.0)
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            if (report := parse(data)) is not None and isinstance(report.get("key"), str):
                self._took(report)
