"""An informer: one kind of objects, listed once and followed from there, for as long as it lives.

Used by `kubernetes`, one thread each. The client library's own decodes every object into typed models, waits five
seconds after a failed listing, and cannot be told to stop while it reads; this one hands on raw JSON, keeps nothing,
and says whether it is in touch. Pages of a listing, bookmarks, a forgotten version (410) and lost connections are its
business alone.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jobsched.backends.kubernetes_api import Api, Expired, Gone, Refused, Stream
from jobsched.errors import BackendUnreachable

Json = dict[str, Any]

PAGE = 500
SILENCE_S = 90.0
"""Bookmarks come every minute; a watch that is silent for longer is cut."""
WATCH_S = (300, 600)
"""How long one watch lasts; a different time each, so that not all end at once."""
RETRY_S = (0.2, 5.0)
"""First and longest pause after a failure."""
BRIEF_S = 1.0


class Informer:
    """Follows `path`. `listed` hears the whole list, from time to time again; `heard` each change after it, as
    (`ADDED` | `MODIFIED` | `DELETED`, object). Both are called on this informer's own thread."""

    def __init__(
        self, api: Api, path: str, query: Mapping[str, str], listed: Callable[[list[Json]], None],
        heard: Callable[[str, Json], None], told: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.problem = path, "not connected yet"
        """Why it is out of touch; empty while it follows."""
        self.since = 0.0
        """When it last found touch (monotonic seconds)."""
        self.synced = threading.Event()
        """A listing came, or failed to."""
        self.begun = 0.0
        """When the newest listing was asked for (monotonic seconds)."""
        self._api, self._query = api, dict(query)
        self._listed, self._heard, self._told = listed, heard, told
        self._closing = threading.Event()
        self._stream: Stream | None = None
        self._version = ""
        self._thread = threading.Thread(target=self._run, name=f"kubernetes-{path.rpartition('/')[2]}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if (stream := self._stream) is not None:
            stream.close()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        pause = RETRY_S[0]
        while not self._closing.is_set():
            try:
                if not self._version:
                    self._list()
                begun = time.monotonic()
                self._follow()
                if time.monotonic() - begun < BRIEF_S:  # a server that is shutting down lets us go at once
                    self._closing.wait(pause)
                pause = RETRY_S[0]
                continue
            except Expired:
                self._version = ""
                continue
            except BackendUnreachable as error:
                problem = error.message
            except (Gone, Refused) as error:
                problem = f"{self.path}: {error}"
                self._version = ""
            self._lost_touch(problem)
            self._closing.wait(pause)
            pause = min(pause * 2, RETRY_S[1])

    def _lost_touch(self, problem: str) -> None:
        self.problem = problem
        self.synced.set()
        self._told()

    def _in_touch(self) -> None:
        if self.problem:
            self.since, self.problem = time.monotonic(), ""
            self._told()
        self.synced.set()

    def _list(self) -> None:
        """Page by page; a page that was waited for too long makes it begin anew."""
        self.begun = time.monotonic()
        found: list[Json] = []
        query = self._query | {"limit": str(PAGE)}
        while True:
            page = self._api.get(self.path, query)
            found += page.get("items") or []
            following = page["metadata"].get("continue")
            if not following:
                break
            query["continue"] = following
        self._listed(found)
        self._version = page["metadata"]["resourceVersion"]
        self._in_touch()

    def _follow(self) -> None:
        seconds = random.randint(*WATCH_S)
        stream = self._stream = self._api.stream(self.path, self._query | {
            "watch": "true", "resourceVersion": self._version, "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds)}, SILENCE_S)
        self._in_touch()
        try:
            lines = stream.lines()
            while not self._closing.is_set():
                try:
                    line = next(lines)
                except (StopIteration, BackendUnreachable):  # only if it cannot be opened again are we out of touch
                    return
                self._take(line)
        finally:
            self._stream = None

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            raise BackendUnreachable("the watch was cut in the middle of a line") from None
        found = event["object"]
        match event["type"]:
            case "ERROR" if found.get("code") == 410:
                raise Expired(found.get("message", ""))
            case "ERROR":
                raise BackendUnreachable(f"the watch failed: {found.get('message', found)}")
            case "BOOKMARK":
                pass
            case kind:
                self._heard(kind, found)
        self._version = found["metadata"]["resourceVersion"]
