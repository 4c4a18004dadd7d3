"""doctor, snapshot and verify."""

from __future__ import annotations

import pytest

from jobsched.core import events as ev
from jobsched.core.resources import JobId, NodeName
from tests.stage import Stage


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_doctor_finds_lost_nodes(stage: Stage) -> None:
    assert all(check.ok for check in stage.service.checkup.doctor())
    stage.decide(ev.NodeLost(0, NodeName("n1")))
    assert [check.name for check in stage.service.checkup.doctor() if not check.ok] == ["nodes"]


def test_a_snapshot_is_plain_json(stage: Stage) -> None:
    import json

    job = stage.run(stage.submit())
    snapshot = json.loads(json.dumps(stage.service.checkup.snapshot()))
    assert snapshot["jobs"][0]["id"] == job.id
    assert snapshot["nodes"][0]["name"] == "n1"


def test_verify_replays_the_log_and_finds_a_damaged_projection(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.end(stage.run(stage.submit()))
    job = stage.run(stage.submit())
    verification = stage.service.checkup.verify()
    assert (verification.ok, verification.jobs, verification.events) == (True, 2, stage.store.last_seq())
    from dataclasses import replace

    known = stage.store.job
    monkeypatch.setattr(stage.store, "job", lambda i: replace(known(i), restarts=9) if i == job.id else known(i))
    verification = stage.service.checkup.verify()
    assert not verification.ok
    assert "restarts" in verification.problems[0]


def test_verify_allows_for_events_that_arrive_meanwhile(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    job = stage.submit()
    known = stage.store.job

    def later(job_id: JobId) -> object:
        monkeypatch.undo()
        stage.service.set_priority(job.id, 5)
        return known(job_id)

    monkeypatch.setattr(stage.store, "job", later)
    assert stage.service.checkup.verify().ok
