"""Several blocking streams as one, with a bound on the silence between items.

Used where a wait needs a deadline (`JobHandle.wait`) and where logs and progress are shown together (`jobsched run`).
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from queue import Empty, Queue
from typing import TypeVar

T = TypeVar("T")


def interleave(*sources: Iterable[T], silence_s: float | None = None) -> Generator[T | None]:
    """Items of every source as they come, None whenever nothing came for `silence_s`; ends when all sources have ended.
    An exception in a source is raised here. Each source is read in a daemon thread that ends with its source, or at the
    source's next item after this generator was closed."""
    items: Queue[tuple[T] | BaseException | None] = Queue()
    closed = threading.Event()

    def pump(source: Iterator[T]) -> None:
        try:
            for item in source:
                if closed.is_set():
                    return
                items.put((item,))
        except Exception as exc:  # carried over to the reader's thread
            items.put(exc)
        else:
            items.put(None)

    for source in sources:
        threading.Thread(target=pump, args=(iter(source),), daemon=True, name="jobsched-stream").start()
    open_sources = len(sources)
    try:
        while open_sources:
            try:
                got = items.get(timeout=silence_s)
            except Empty:
                yield None
                continue
            if isinstance(got, BaseException):
                raise got
            if got is None:
                open_sources -= 1
            else:
                yield got[0]
    finally:
        closed.set()
