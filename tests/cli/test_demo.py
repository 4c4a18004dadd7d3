"""The demo's own logic: whom it kills and when, and that it claims nothing it has not seen."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobsched import errors
from jobsched.cli import attach, demo, render
from jobsched.core import answers as a
from jobsched.core.job import Phase
from tests.cli.conftest import Cli
from tests.client.fake_server import ID, FakeServer, a_failure, a_history, an_answer, wire

PIDS = {"worker": 4_194_001, "ps": 4_194_002}


def seen(step: int, **changed: dict[str, Any]) -> render.Document:
    """The job at a step; `changed` fields of a role's replica."""
    replicas = tuple(
        replace(
            a.ReplicaProgress(role, 0, node="n01", state="running", ident=str(pid), beat_age_ms=5),
            **changed.get(role, {}),
        )
        for role, pid in PIDS.items()
    )
    answer = replace(an_answer(step=0), progress=a.JobProgress(step, 100, 1, (), replicas))
    return render.job_document(wire(answer))


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: found.append((pid, number)))
    monkeypatch.setattr(demo, "_belongs_to", lambda pid, job_id: True)
    return found


@pytest.fixture
def show() -> demo.Show:
    return demo.Show(FakeServer().remote(), ID, attach.StatusLine())


def test_a_worker_dies_then_a_ps_each_only_after_the_other_is_back(
    show: demo.Show, killed: list[tuple[int, int]]
) -> None:
    show.step(seen(14))
    assert killed == []
    show.step(seen(15))
    assert killed == [(PIDS["worker"], signal.SIGKILL)]
    show.step(seen(90))  # late enough for the ps, but the worker is not back
    assert len(killed) == 1
    anew = {"restart": 1, "ident": "77"}
    show.step(seen(90, worker=anew | {"beat_age_ms": -1}))  # started, silent
    show.step(seen(91, worker=anew))
    assert not show.casualties[0].back_after_s  # reports, but no step since
    show.step(seen(92, worker=anew))
    assert show.casualties[0].back_after_s > 0
    show.step(seen(93, worker=anew))
    assert killed[1:] == [(PIDS["ps"], signal.SIGKILL)]


def test_only_a_process_of_the_job_is_killed(
    show: demo.Show, killed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert not demo._belongs_to(os.getpid(), ID)
    show.step(seen(50))
    assert not show.casualties[0].killed_at


def a_restart(name: str) -> dict[str, Any]:
    return {"seq": 9, "event": {"kind": "ReplicasRestarted", "replicas": [name]}}


@pytest.mark.parametrize(
    ("phase", "accuracy", "restarted", "holds"),
    [
        (Phase.SUCCEEDED, 0.96, ("worker/0", "ps/0"), True),
        (Phase.SUCCEEDED, 0.94, ("worker/0", "ps/0"), False),
        (Phase.SUCCEEDED, 0.96, ("worker/0",), False),
        (Phase.FAILED, 0.96, ("worker/0", "ps/0"), False),
    ],
)
def test_the_verdict_is_read_from_the_records(
    phase: Phase, accuracy: float, restarted: tuple[str, ...], holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeServer(jobs={ID: an_answer(phase, cause=a_failure() if phase is Phase.FAILED else None)})
    server.replies[f"GET jobs/{ID}/events"] = (200, [a_restart(name) for name in restarted])
    sample = {"job_id": ID, "at_ms": 0, "attempt": 1, "step": 9, "total": 9, "world_size": 1}
    server.replies[f"GET jobs/{ID}/samples"] = (
        200,
        [sample | {"metrics": [["accuracy", accuracy]]}, sample | {"metrics": [["loss", 0.1]]}],
    )
    show = demo.Show(
        server.remote(),
        ID,
        attach.StatusLine(),
        [demo.Casualty("worker", 0, 1, 15, 1.0, 16, 0.5), demo.Casualty("ps", 0, 2, 45, 1.0, 46, 0.5)],
    )
    if holds:
        assert demo._verdict(show, Path("/x")) == 0
        assert "✘" not in capsys.readouterr().out
    else:
        with pytest.raises(errors.JobFailed):
            demo._verdict(show, Path("/x"))
        assert "✘" in capsys.readouterr().out


def test_nothing_killed_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer(jobs={ID: an_answer(Phase.SUCCEEDED)}, history=a_history())
    with pytest.raises(errors.JobFailed):
        demo._verdict(demo.Show(server.remote(), ID, attach.StatusLine()), Path("/x"))
    assert "no ps was killed" in capsys.readouterr().out


def test_without_the_example_it_says_what_to_do(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "JOB", Path("jobs/nothing/job.yaml"))
    result = cli("demo")
    assert result.code == 2
    assert "--job" in result.err
