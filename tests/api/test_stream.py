"""Live streams: resume, order, rate, ends; over the feed itself on an event loop, and over HTTP for its headers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from jobsched.api import stream
from jobsched.api.stream import Feed
from jobsched.core.answers import JobProgress
from jobsched.core.job import Phase
from jobsched.logs import Selection
from tests.api.conftest import Api
from tests.stage import Stage


@pytest.fixture(autouse=True)
def _no_keep_alives(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a test is held up, none comes where none is expected."""
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", 3_600)


Scene = Callable[[Stage, Feed], Coroutine[Any, Any, None]]


def play(scene: Scene) -> None:
    """Run a scene with a listening feed."""
    stage = Stage()

    async def main() -> None:
        feed = Feed(stage.service)
        async with feed.running(), asyncio.timeout(120):
            await scene(stage, feed)

    asyncio.run(main())


def parse(data: bytes) -> list[dict[str, str]]:
    """Server-sent events of a piece of a stream, comments as `{"comment": …}`."""
    found = []
    for block in data.decode().split("\n\n"):
        event = {}
        for line in filter(None, block.split("\n")):
            name, _, value = line.partition(":")
            event[name or "comment"] = value.strip()
        if event:
            found.append(event)
    return found


class Reader:
    """Takes events off a stream one by one."""

    def __init__(self, frames: AsyncIterator[bytes]) -> None:
        self._frames = frames
        self._left: list[dict[str, str]] = []

    async def next(self) -> dict[str, str]:
        while not self._left:
            self._left = parse(await anext(self._frames))
        return self._left.pop(0)

    async def seqs(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            event = await self.next()
            if "id" in event:
                assert json.loads(event["data"])["seq"] == int(event["id"])
                found.append(int(event["id"]))
        return found

    async def until_end(self) -> list[dict[str, str]]:
        found = []
        while (event := await self.next()).get("event") != "end":
            found.append(event)
        return found


def test_events_are_those_of_the_store_then_live_without_gap_or_repeat() -> None:
    async def scene(stage: Stage, feed: Feed) -> None:
        for _ in range(5):
            stage.submit()
        reader = Reader(feed.events(0, None))
        first = stage.store.last_seq()
        assert await reader.seqs(first) == list(range(1, first + 1))
        for _ in range(3):
            stage.submit()
        assert await reader.seqs(3) == [first + 1, first + 2, first + 3]

    play(scene)


def test_a_watcher_goes_on_after_the_event_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PAGE", 3)

    async def scene(stage: Stage, feed: Feed) -> None:
        for _ in range(9):
            stage.submit()
        last = stage.store.last_seq()
        for after in (0, 2, last - 1):
            assert await Reader(feed.events(after, None)).seqs(last - after) == list(range(after + 1, last + 1))

    play(scene)


def test_a_watcher_that_falls_behind_the_ring_reads_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "RING", 4)

    async def scene(stage: Stage, feed: Feed) -> None:
        reader = Reader(feed.events(stage.store.last_seq(), None))
        start = stage.store.last_seq()
        stage.submit()
        assert await reader.seqs(1) == [start + 1]
        for _ in range(20):
            stage.submit()
        await asyncio.sleep(0)
        assert await reader.seqs(20) == list(range(start + 2, start + 22))

    play(scene)


def test_events_that_another_leader_wrote_arrive_with_the_keep_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", 0.05)

    async def scene(stage: Stage, feed: Feed) -> None:
        start = stage.store.last_seq()
        reader = Reader(feed.events(start, None))
        assert "comment" in await reader.next()
        monkeypatch.setattr(stage.live, "tell", lambda batch: None)
        stage.submit()
        assert await reader.seqs(1) == [start + 1]

    play(scene)


def test_one_jobs_events_are_its_own_and_end_with_it() -> None:
    async def scene(stage: Stage, feed: Feed) -> None:
        job = stage.submit()
        reader = Reader(feed.events(0, job.id))
        assert len(await reader.seqs(1)) == 1
        stage.submit(name="other")
        stage.end(stage.run(job))
        kinds = [json.loads(e["data"])["event"]["kind"] for e in await reader.until_end()]
        assert kinds == [
            "AttemptPlaced", "ReplicasStarted", "AttemptStarted", "ReplicaExited", "AttemptStopping", "AttemptEnded",
        ]  # fmt: skip
        again = await Reader(feed.events(0, job.id)).until_end()
        assert len([e for e in again if "id" in e]) == 7

    play(scene)


def test_silence_is_filled_with_keep_alives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE_S", 0.02)

    async def scene(stage: Stage, feed: Feed) -> None:
        for frames in (feed.events(stage.store.last_seq(), None), feed.progress(None)):
            reader = Reader(frames)
            assert [(await reader.next())["comment"] for _ in range(3)] == ["connected", "keep-alive", "keep-alive"]

    play(scene)


def test_streams_end_without_end_when_the_server_stops() -> None:
    async def scene(stage: Stage, feed: Feed) -> None:
        job = stage.run(stage.submit())
        batches = stage.service.logs(job.id, Selection(), follow=True)
        streams = (feed.events(0, None), feed.progress(job.id), feed.lines(batches, next(batches)))

        async def drain(frames: AsyncIterator[bytes]) -> bytes:
            return b"".join([frame async for frame in frames])

        tasks = [asyncio.ensure_future(drain(frames)) for frames in streams]
        await asyncio.sleep(0.05)
        assert feed.watchers == 3
        feed.close()
        for data in await asyncio.gather(*tasks):
            assert b"event: end" not in data
        assert feed.watchers == 0

    play(scene)


def test_progress_is_shown_when_it_changes_and_at_most_five_times_a_second() -> None:
    async def scene(stage: Stage, feed: Feed) -> None:
        job = stage.run(stage.submit())
        reader = Reader(feed.progress(job.id))
        assert "comment" in await reader.next()
        assert json.loads((await reader.next())["data"])["job"]["phase"] == "RUNNING"
        started, steps = time.monotonic(), []
        for step in range(200):
            stage.live.report(job.id, JobProgress(step=step))
            await asyncio.sleep(0.002)
        while not steps or steps[-1] < 199:
            steps.append(json.loads((await reader.next())["data"])["progress"]["step"])
        assert steps == sorted(set(steps))
        assert len(steps) <= (time.monotonic() - started) * 5 + 2
        stage.end(job)
        last = (await reader.until_end())[-1]
        assert json.loads(last["data"])["job"]["phase"] == "SUCCEEDED"

    play(scene)


def test_many_watchers_of_one_job_cost_one_look_a_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(stage: Stage, feed: Feed) -> None:
        job = stage.run(stage.submit())
        looks, get = [], stage.service.get
        monkeypatch.setattr(stage.service, "get", lambda *a, **k: (looks.append(1), get(*a, **k))[1])
        readers = [Reader(feed.progress(job.id)) for _ in range(50)]
        for reader in readers:
            await reader.next()
        await asyncio.gather(*(reader.next() for reader in readers))
        assert len(looks) == 1
        stage.live.report(job.id, JobProgress(step=1))
        await asyncio.gather(*(reader.next() for reader in readers))
        assert len(looks) == 2

    play(scene)


def test_progress_of_all_shows_active_and_changing_jobs() -> None:
    async def scene(stage: Stage, feed: Feed) -> None:
        running, waiting = stage.run(stage.submit()), stage.submit(name="waits")
        reader = Reader(feed.progress(None))
        await reader.next()
        seen = {json.loads((await reader.next())["data"])["job"]["id"] for _ in range(2)}
        assert seen == {running.id, waiting.id}
        stage.service.set_priority(waiting.id, 4)
        answer = json.loads((await reader.next())["data"])["job"]
        assert (answer["id"], answer["priority"]) == (waiting.id, 4)
        stage.end(running, Phase.FAILED, 1)
        assert json.loads((await reader.next())["data"])["job"]["phase"] == "FAILED"

    play(scene)


# ---- over HTTP ----


def test_last_event_id_wins_over_after(api: Api) -> None:
    job = api.stage.end(api.stage.run(api.stage.submit()))
    seqs = [stored.seq for stored in api.stage.service.events(job.id)]

    def ids(headers: dict[str, str], **params: object) -> list[int]:
        response = api.http.get("/v1/events", params={"job": "bert", **params}, headers=headers)
        assert response.headers["content-type"].startswith("text/event-stream")
        return [int(event["id"]) for event in parse(response.content) if "id" in event]

    assert ids({}) == seqs
    assert ids({}, after=seqs[1]) == seqs[2:]
    assert ids({"Last-Event-ID": str(seqs[3])}, after=seqs[1]) == seqs[4:]
    assert ids({"Last-Event-ID": "nonsense"}) == seqs
    assert ids({}, after=seqs[-1] + 1_000) == []


def test_logs_are_lines_that_end(api: Api) -> None:
    job = api.stage.run(api.stage.submit())
    api.stage.backend.write(api.stage.key(job), "a\nb ü\n", end=True)
    api.stage.end(job)
    events = parse(api.http.get("/v1/jobs/bert/logs", params={"follow": True}).content)
    assert [json.loads(e["data"])["text"] for e in events[:-1]] == ["a", "b ü"]
    assert events[-1]["event"] == "end"
    assert parse(api.http.get("/v1/jobs/bert/logs", params={"grep": "ü", "tail": 1}).content)[0]["data"] == (
        f'{{"role":"worker","index":0,"rank":0,"attempt":{job.attempt},"restart":0,"offset":2,"text":"b ü"}}'
    )


def test_a_finished_jobs_progress_is_its_end(api: Api) -> None:
    api.stage.end(api.stage.run(api.stage.submit()))
    events = parse(api.http.get("/v1/progress", params={"job": "bert"}).content)
    assert [e.get("event", "") for e in events if "data" in e] == ["", "end"]
