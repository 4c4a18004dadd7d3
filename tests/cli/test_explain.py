"""describe, why and events."""

from __future__ import annotations

from jobsched.core.job import Cause, Phase, Reason
from jobsched.core.launch import launch_key
from jobsched.core.observation import Incident
from jobsched.core.resources import JobId, NodeName
from tests.cli.conftest import Cli
from tests.client.fake_server import ID, FakeServer, a_failure, a_history, a_verdict, an_answer


def test_why_a_job_waits(cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(Phase.QUEUED, verdict=a_verdict(), headline="waits for 2 GPUs")
    out = cli("why", "bert").out
    for text in (
        "waits for 2 GPUs",
        "Resources: needs 2 GPUs, 1 is free",
        "fix: wait, or ask for 1",
        "place in line: 2",
        "story:",
        "submitted by ann",
    ):
        assert text in out
    assert cli("why", "@last", "--json").json["verdict"]["position"] == 2


def test_why_at_a_time(cli: Cli, server: FakeServer) -> None:
    assert cli("why", "bert", "--at", "2026-01-01T00:00:05Z").code == 0
    assert server.requests[-1].url.params["at_ms"] == "1767225605000"
    assert cli("why", "bert", "--at", "yesterday").code == 2


def test_why_a_job_failed(cli: Cli, server: FakeServer) -> None:
    cause = Cause(
        Reason.HANG, role="worker", index=1, rank=1, stacks=(("worker/1", "File train.py, line 3"),), tail=("step 9",)
    )
    server.jobs[ID] = an_answer(Phase.FAILED, cause=cause)
    out = cli("why", "bert").out
    for text in (
        "root cause: worker/1: ended: Hang (rank 1)",
        "| step 9",
        "stack of worker/1",
        "File train.py, line 3",
    ):
        assert text in out


def test_describe_shows_everything(cli: Cli, server: FakeServer) -> None:
    server.jobs[ID] = an_answer(Phase.FAILED, cause=a_failure(), headline="exit code 3")
    server.history = a_history()
    out = cli("describe", "bert").out
    for text in (
        ID,
        "ann",
        "FAILED",
        "exit code 3",
        "python train.py",
        "sim-gpu:1",
        "ValueError: no",
        "AttemptPlaced",
        "worker/0→n01",
        "Submitted:   2026-01-01T00:00:00.000Z",
    ):
        assert text in out
    assert len(cli("describe", "bert", "-o", "json").json["events"]) == 4


def test_events(cli: Cli, server: FakeServer) -> None:
    server.history = a_history()
    assert [line.split()[2] for line in cli("events", "bert", "--no-headers").out.splitlines()] == [
        "JobSubmitted",
        "AttemptPlaced",
        "ReplicasStarted",
        "AttemptStarted",
    ]
    assert cli("events", "bert", "--json").json["events"][0]["event"]["at"] == "2026-01-01T00:00:00.000Z"


def test_what_the_engine_says_stands_between_events_and_under_why(cli: Cli, server: FakeServer) -> None:
    server.history = a_history()
    between = server.stored()[1][1]["event"]["at_ms"]  # type: ignore[index]
    server.incidents = [
        Incident(between, "BackOff", "pull refused", launch_key(JobId(ID), 1, "worker", 0, 0), warning=True, count=3),
        Incident(between + 10**9, "NodeNotReady", node=NodeName("n01")),
    ]
    lines = cli("events", "bert", "--no-headers").out.splitlines()
    assert len(lines) == 6
    assert lines[2].split()[-1] == "(×3)"
    assert "BackOff" in lines[2]
    assert "worker/0: pull refused" in lines[2]
    assert lines[-1].endswith("node n01: NodeNotReady")
    assert cli("events", "bert", "--after", "1", "--no-headers").out.count("BackOff") == 0
    assert cli("events", "bert", "-q").out.split() == ["1", "2", "3", "4"]
    shown = cli("events", "bert", "--json").json["events"]
    assert [item["seq"] for item in shown] == [1, 2, None, 3, 4, None]
    out = cli("why", "bert").out
    assert "the engine says:\n  worker/0: pull refused (×3)" in out
    assert "NodeNotReady" not in out
