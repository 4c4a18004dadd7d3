"""Merging the logs of a job's replicas: what ran, what was written, what is being written."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from jobsched.core.answers import LogLine
from jobsched.core.job import Phase
from jobsched.core.launch import LaunchKey
from jobsched.errors import NotFound, UsageError
from jobsched.logs import MAX_FOLLOWED, Selection, Source, Splitter
from jobsched.ports import LogChunk
from tests.stage import Stage

TWO = {"worker": {"command": "x", "replicas": 2}, "ps": {"command": "y"}}


@pytest.fixture
def stage() -> Stage:
    return Stage()


def texts(batches: Iterator[tuple[LogLine, ...]]) -> list[str]:
    return [line.text for batch in batches for line in batch]


def read(stage: Stage, ref: str, **chosen: object) -> list[str]:
    tail = chosen.pop("tail", None)
    return texts(stage.service.logs(ref, Selection(**chosen), tail=tail))  # type: ignore[arg-type]


def test_replicas_come_in_rank_order_with_their_places(stage: Stage) -> None:
    job = stage.run(stage.submit(roles=TWO))
    for role, index in (("ps", 0), ("worker", 1), ("worker", 0)):
        stage.backend.write(stage.key(job, role, index), f"{role}{index} a\n{role}{index} b\n")
    lines = [line for batch in stage.service.logs(job.id, Selection()) for line in batch]
    assert [line.text for line in lines] == ["worker0 a", "worker0 b", "worker1 a", "worker1 b", "ps0 a", "ps0 b"]
    assert [(line.rank, line.offset, line.attempt, line.restart) for line in lines[:3]] == [
        (0, 0, 1, 0), (0, 10, 1, 0), (1, 0, 1, 0),
    ]  # fmt: skip
    assert lines[-1].rank == -1


def test_selection(stage: Stage) -> None:
    job = stage.run(stage.submit(roles=TWO))
    for role, index in (("ps", 0), ("worker", 1), ("worker", 0)):
        stage.backend.write(stage.key(job, role, index), f"{role}{index}\nlast {index}")
    assert read(stage, "bert", role="ps") == ["ps0", "last 0"]
    assert read(stage, "bert", rank=1) == ["worker1", "last 1"]
    assert read(stage, "bert", index=0, role="worker") == ["worker0", "last 0"]
    assert read(stage, "bert", grep="last") == ["last 0", "last 1", "last 0"]
    assert read(stage, "bert", tail=1) == ["last 0", "last 1", "last 0"]
    assert read(stage, "bert", tail=0) == []
    with pytest.raises(NotFound, match="worke"):
        read(stage, "bert", role="worke")


def test_the_last_attempt_is_shown_unless_another_is_asked_for(stage: Stage) -> None:
    job = stage.run(stage.submit())
    stage.backend.write(stage.key(job), "first\n")
    job = stage.run(stage.end(job, Phase.QUEUED, 1))
    stage.backend.write(stage.key(job), "second\n")
    job = stage.restart_replica(job, "worker", 0)
    stage.backend.write(stage.key(job), "second again\n")
    assert read(stage, job.id) == ["second", "second again"]
    assert read(stage, job.id, attempt=1) == ["first"]
    assert read(stage, job.id, attempt=0) == ["first", "second", "second again"]
    with pytest.raises(NotFound, match="no attempt 7"):
        read(stage, job.id, attempt=7)


def test_a_job_that_never_ran_has_no_lines(stage: Stage) -> None:
    assert read(stage, stage.submit().id) == []


def test_a_long_log_is_tailed_without_cutting_its_first_line(stage: Stage) -> None:
    job = stage.run(stage.submit())
    stage.backend.logs_of[stage.key(job)] = bytearray("".join(f"{n} {'x' * 3_000}\n" for n in range(40)).encode())
    stage.backend.chunk = 50_000
    found = read(stage, job.id, tail=30)
    assert [text.split()[0] for text in found] == [str(n) for n in range(10, 40)]
    assert {len(text) for text in found} == {3_003}


class Follower:
    """Collects a followed log on a thread, as a client would."""

    def __init__(self, stage: Stage, ref: str, **chosen: object) -> None:
        tail = chosen.pop("tail", None)
        self.batches = stage.service.logs(ref, Selection(**chosen), follow=True, tail=tail)  # type: ignore[arg-type]
        self.seen: list[str] = []
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        for batch in self.batches:
            self.seen += [line.text for line in batch]

    def until(self, *wanted: str) -> None:
        deadline = time.monotonic() + 60
        while not set(wanted) <= set(self.seen):
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.005)

    def ends(self) -> list[str]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.seen


def test_following_goes_on_across_restarts_and_attempts_to_the_end(stage: Stage) -> None:
    job = stage.run(stage.submit())
    follower = Follower(stage, job.id)
    stage.backend.write(stage.key(job), "one\npart")
    follower.until("one")
    stage.backend.write(stage.key(job), "ial\nunfinished", end=True)
    follower.until("partial", "unfinished")
    job = stage.restart_replica(job, "worker", 0)
    stage.backend.write(stage.key(job), "in place\n", end=True)
    follower.until("in place")
    job = stage.run(stage.end(job, Phase.QUEUED, 1))
    stage.backend.write(stage.key(job), "attempt 2\n", end=True)
    stage.end(job)
    assert follower.ends() == ["one", "partial", "unfinished", "in place", "attempt 2"]


def test_following_a_waiting_job_waits_for_its_start(stage: Stage) -> None:
    waiting = stage.submit()
    follower = Follower(stage, waiting.id)
    job = stage.run(waiting)
    stage.backend.write(stage.key(job), "hello\n", end=True)
    stage.end(job)
    assert follower.ends() == ["hello"]


def test_following_with_a_tail_begins_near_the_end(stage: Stage) -> None:
    job = stage.run(stage.submit())
    stage.backend.write(stage.key(job), "1\n2\n3\n4")
    follower = Follower(stage, job.id, tail=2)
    follower.until("2", "3")
    stage.backend.write(stage.key(job), "4\n5\n", end=True)
    stage.end(job)
    assert follower.ends() == ["2", "3", "44", "5"]


def test_a_follower_that_stops_ends_its_threads_and_its_subscription(stage: Stage) -> None:
    job = stage.run(stage.submit())
    batches = stage.service.logs(job.id, Selection(), follow=True)
    next(batches)
    mine = [t for t in threading.enumerate() if t.name == f"logs {stage.key(job)}"]
    assert mine
    assert stage.live.listeners
    batches.close()  # type: ignore[attr-defined]
    for thread in mine:
        thread.join(60)
        assert not thread.is_alive()
    assert not stage.live.listeners


def test_too_many_replicas_cannot_be_followed_at_once(stage: Stage) -> None:
    job = stage.run(stage.submit(roles={"worker": {"command": "x", "replicas": MAX_FOLLOWED + 1, "cpu": "1m"}}))
    with pytest.raises(UsageError, match=str(MAX_FOLLOWED)):
        list(stage.service.logs(job.id, Selection(), follow=True))


SOURCE = Source(LaunchKey("job/1/worker/0/0"), 1, "worker", 0, 0, 0)


def split(*chunks: tuple[int, bytes]) -> list[tuple[int, str]]:
    splitter = Splitter(SOURCE)
    found = [line for offset, data in chunks for batch in splitter.feed(LogChunk(offset, data)) for line in batch]
    found += [line for batch in splitter.rest() for line in batch]
    return [(line.offset, line.text) for line in found]


def test_lines_end_with_any_of_the_three_line_ends() -> None:
    assert split((0, b"a\r\nb\rc\nd")) == [(0, "a"), (3, "b"), (5, "c"), (7, "d")]


def test_a_line_end_may_be_cut_in_two() -> None:
    assert split((0, b"a\r"), (2, b"\nb\n")) == [(0, "a"), (3, "b")]


def test_a_gap_ends_the_line_before_it() -> None:
    assert split((0, b"abc"), (100, b"def\n")) == [(0, "abc"), (100, "def")]


def test_bytes_that_are_no_text_are_shown_all_the_same() -> None:
    assert split((0, b"\xff\xfe ok\n")) == [(0, "\N{REPLACEMENT CHARACTER}" * 2 + " ok")]


def test_an_endless_line_is_passed_on_in_pieces() -> None:
    found = split(*((n * 10_000, b"x" * 10_000) for n in range(20)))
    assert sum(len(text) for _, text in found) == 200_000
    assert len(found) > 1
