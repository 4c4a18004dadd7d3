"""Several streams as one."""

import threading
from collections.abc import Iterator

import pytest

from jobsched.client.interleave import interleave


def test_items_of_all_sources_arrive_in_their_order() -> None:
    got = list(interleave(iter([1, 2, 3]), iter([10, 20])))
    assert sorted(x for x in got if x is not None) == [1, 2, 3, 10, 20]
    assert [x for x in got if x is not None and x < 10] == [1, 2, 3]


def test_silence_is_told() -> None:
    gate = threading.Event()

    def slow() -> Iterator[str]:
        gate.wait(60)
        yield "late"

    items = interleave(slow(), silence_s=0.01)
    assert next(items) is None
    gate.set()
    assert "late" in list(items)


def test_an_error_reaches_the_reader() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    items = interleave(broken())
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)


def test_closing_ends_the_readers() -> None:
    ended = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            ended.set()

    items = interleave(endless())
    next(items)
    items.close()
    assert ended.wait(60)
