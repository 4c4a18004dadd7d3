"""Sessions (`ports.Session`) that several adapters have in common. Used by adapters; decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jobsched.backends.supervisor.beside import END, ERR, Beside, Joined
from jobsched.ports import Ended, Output, Window

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 16
TERMINAL = {"TERM": "xterm-256color"}
"""What a command on a terminal is told of it: what nearly all terminals are today."""


class Local:
    """A command beside a replica of this machine, or a connection to a port of it."""

    def __init__(self, talk: Beside | Joined) -> None:
        self._talk = talk
        self.send = talk.send
        self.end_input = talk.end_input
        self.close = talk.close

    def receive(self, timeout_s: float) -> Output | Ended | None:
        return None if (piece := self._talk.receive(timeout_s)) is None else taken(*piece)

    def resize(self, window: Window) -> None:
        self._talk.resize(window.rows, window.columns)


def taken(kind: int, data: bytes) -> Output | Ended:
    """A piece of `supervisor.beside` as the port's."""
    return Ended(int(data)) if kind == END else Output(data, error=kind == ERR)


def at_once(do: Callable[[T], R], to: Sequence[T]) -> list[R]:
    """The same to each, some at the same time: what reaches into a container takes a tenth of a second."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(do, to))
