"""why and plan, and what the engine says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from jobsched.core.job import Phase, Reason
from jobsched.core.launch import launch_key
from jobsched.core.observation import Incident
from jobsched.core.resources import JobId, NodeName
from jobsched.errors import NotFound
from jobsched.ports import JobQuery
from jobsched.service import LATELY_MS
from tests.stage import Stage, a_spec


def test_a_plan_changes_nothing(stage: Stage) -> None:
    before = stage.store.last_seq()
    assert stage.service.plan(a_spec()).code == 0
    assert stage.service.plan(a_spec(roles={"worker": {"command": "x", "gpu": "any:64"}})).code == 8
    assert stage.store.last_seq() == before


def test_a_waiting_job_says_why(stage: Stage) -> None:
    whole = {"worker": {"command": "x", "gpu": "any:4"}}
    stage.run(stage.submit(name="first", roles=whole))
    waiting = stage.submit(name="second", roles=whole)
    answer = stage.service.why(waiting.id)
    assert answer.verdict is not None
    assert answer.verdict.reasons[0].reason is Reason.RESOURCES
    assert "0 of 4" in answer.headline
    assert "submitted by ann" in answer.story[0]
    listed = {a.job.id: a for a in stage.service.jobs(JobQuery()).jobs}
    assert listed[waiting.id].headline == answer.headline


def test_why_and_plan_say_when_a_job_starts(stage: Stage) -> None:
    """Half an hour is left of the limit of the one that runs; nothing is known of one without."""
    whole = {"worker": {"command": "x", "gpu": "any:4"}}
    began = stage.clock.now_ms()
    stage.run(stage.submit(name="first", roles=whole, time_limit="30m"))
    waiting = stage.submit(name="second", roles=whole)
    verdict = stage.service.why(waiting.id).verdict
    assert verdict is not None
    assert verdict.starts_before_ms == pytest.approx(began + 1_800_000, abs=2_000)
    assert verdict.starts.endswith("if those before it use up their time limits")
    third = stage.service.plan(a_spec(roles=whole)).verdict
    assert third is not None
    assert (third.starts_after_ms, third.starts_before_ms) == (0, 0)
    assert third.starts.startswith("nobody can tell: second may run for ever")
    assert stage.service.get(waiting.id).verdict.starts == ""  # type: ignore[union-attr]


def test_why_and_plan_say_whether_a_deadline_is_kept(stage: Stage) -> None:
    whole = {"worker": {"command": "x", "gpu": "any:4"}}
    first = stage.run(stage.submit(name="first", roles=whole, time_limit="30m", deadline="1h"))
    due = stage.service.why(first.id).deadline
    assert "UTC, likely kept: it ends by " in due
    assert due.endswith("when its time limit runs out")

    def outlook(**fields: object) -> str:
        planned = stage.service.plan(a_spec(roles=whole, **fields)).deadline
        waiting = stage.submit(roles=whole, **fields)
        told = stage.service.why(waiting.id).deadline
        stage.service.cancel(waiting.id)
        assert planned[5:] == told[5:]
        return told

    assert "likely missed by 20 min: it ends about " in outlook(deadline="20m", expected="10m", time_limit="10m")
    assert "likely kept" in outlook(deadline="90m", expected="10m", time_limit="10m")
    assert "at risk: it ends by " in outlook(deadline="35m", time_limit="10m")
    assert "nobody can tell how long it runs" in outlook(deadline="35m")
    assert outlook() == ""
    ended = stage.end(first)
    assert stage.service.why(ended.id).deadline.endswith("UTC, kept")


def test_why_as_it_was_then(stage: Stage) -> None:
    began = stage.clock.time_ms
    first = stage.run(stage.submit(roles={"worker": {"command": "x", "gpu": "any:4"}}))
    stage.clock.time_ms += 10_000
    second = stage.submit(roles={"worker": {"command": "x", "gpu": "any:2"}})
    stage.clock.time_ms += 10_000
    stage.end(first)
    stage.run(second)
    then = stage.service.why(second.id, at_ms=began + 15_000)
    assert then.job.phase is Phase.QUEUED
    assert then.verdict is not None
    assert then.verdict.reasons[0].message.startswith("role worker needs 1 × (2 any GPU, 1 CPU); 0 of 4")
    assert len(then.story) == 1
    assert stage.service.why(second.id).job.phase is Phase.RUNNING
    with pytest.raises(NotFound, match="not there yet"):
        stage.service.why(second.id, at_ms=began + 5_000)


def test_what_the_engine_says_stands_beside_events_and_explains(stage: Stage) -> None:
    job = stage.run(stage.submit())
    now, key, node = stage.clock.now_ms(), stage.key(job), NodeName("n1")
    said = [
        Incident(now, "Pulling", "pulling x", key),
        Incident(now, "BackOff", "again", launch_key(job.id, job.attempt + 1, "worker", 0, 0), warning=True),
        Incident(now, "FailedMount", "no volume", key, warning=True),
        Incident(now - LATELY_MS - 1, "DiskPressure", "long ago", node=node, warning=True),
        Incident(now, "NodeNotReady", "", node=node, warning=True),
        Incident(job.submitted_at_ms - 1, "Rebooted", "before it was there", node=node, warning=True),
    ]  # fmt: skip
    assert stage.service.incidents(job.id) == ()
    asked = []

    def incidents(job_id: JobId, nodes: Sequence[NodeName] = ()) -> list[Incident]:
        asked.append((job_id, nodes))
        return said

    stage.backend.incidents = incidents  # type: ignore[attr-defined]
    found = [one.reason for one in stage.service.incidents(job.id)]
    assert "Rebooted" not in found
    assert found[:3] == ["Pulling", "BackOff", "FailedMount"]
    assert asked[0] == (job.id, [node])
    assert [one.reason for one in stage.service.why(job.id).warnings] == ["FailedMount", "NodeNotReady"]
    stage.end(job)
    assert stage.service.why(job.id).warnings == ()
