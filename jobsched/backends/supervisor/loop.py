"""A single-threaded event loop: descriptors, timers and things to do before the next wait. Used by the supervisor."""

from __future__ import annotations

import heapq
import itertools
import selectors
import time
import traceback
from collections.abc import Callable
from typing import Any

Callback = Callable[[], None]


class Timer:
    """A call in the future; `cancel` makes it nothing."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """`run` until `stop`. Callbacks run one at a time and must not block."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: dict[Callback, None] = {}
        self._running = True

    def watch(self, file: Any, readable: Callback | None, writable: Callback | None = None) -> None:
        """Call back while `file` (a descriptor, or anything with one) is ready; replaces an earlier watch."""
        events = (selectors.EVENT_READ if readable else 0) | (selectors.EVENT_WRITE if writable else 0)
        data = (readable, writable)
        if file in self._selector.get_map():
            self._selector.modify(file, events, data)
        else:
            self._selector.register(file, events, data)

    def unwatch(self, file: Any) -> None:
        """Idempotent; to be called before `file` is closed."""
        try:
            self._selector.unregister(file)
        except (KeyError, ValueError):
            pass

    def at(self, delay_s: float, callback: Callback) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), timer))
        return timer

    def every(self, interval_s: float, callback: Callback) -> None:
        def again() -> None:
            self.at(interval_s, again)
            callback()

        self.at(interval_s, again)

    def soon(self, callback: Callback) -> None:
        """Call once before the next wait, after the events of this round; asking twice is asking once."""
        self._soon[callback] = None

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            self._round()

    def _round(self) -> None:
        wait = 0.0 if self._soon else None
        if wait is None and self._timers:
            wait = max(self._timers[0][0] - time.monotonic(), 0.0)
        for key, mask in self._selector.select(wait):
            for event, callback in zip((selectors.EVENT_READ, selectors.EVENT_WRITE), key.data, strict=True):
                current = self._selector.get_map().get(key.fd)
                if mask & event and callback and current is not None and current.data is key.data:
                    self._call(callback)  # still wanted: an earlier callback of this round may have closed it
        while self._timers and self._timers[0][0] <= time.monotonic():
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                self._call(timer.callback)
        todo, self._soon = list(self._soon), {}
        for callback in todo:
            self._call(callback)

    @staticmethod
    def _call(callback: Callback) -> None:
        """A mistake about one replica must not be the end of the others' supervisor: it is logged, and life goes on."""
        try:
            callback()
        except Exception:
            traceback.print_exc()
