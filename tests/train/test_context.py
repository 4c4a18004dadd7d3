"""`context` in and outside jobsched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsched.contract import ReplicaEnv, to_environ
from jobsched.train.context import Context
from tests.train.gang import ROOT

ENV = ReplicaEnv(job_id="j", job_name="n", attempt=3, role="worker", index=1, rank=1, restart=2, world_size=2,
                 peers={"worker": ("a:1", "b:2")}, checkpoint_dir="/ckpt", report="log:", grace_ms=10_000)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    for name, value in to_environ(ENV, {}).items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    context = Context()
    yield context
    if context._reporter:
        context._reporter.close()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_outside_jobsched_it_is_a_single_silent_process(capsys: pytest.CaptureFixture[str],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOBSCHED_CONTRACT", raising=False)
    context = Context()
    context.report(step=1, loss=2.0, total=3)
    assert not context.managed
    assert (context.rank, context.world_size, context.deadline, context.should_stop()) == (0, 1, None, False)
    assert capsys.readouterr().out == ""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_inside_it_knows_its_place(inside: Context) -> None:
    assert inside.managed
    assert (inside.role, inside.index, inside.rank, inside.world_size) == ("worker", 1, 1, 2)
    assert (inside.attempt, inside.restart, inside.address, inside.checkpoint_dir) == (3, 2, "b:2", "/ckpt")
    assert inside.peers == {"worker": ("a:1", "b:2")}


def test_the_handshake(inside: Context, capsys: pytest.CaptureFixture[str]) -> None:
    assert signal.getsignal(signal.SIGUSR1) != inside._on_signal  # nothing promised before the script asks
    assert not inside.should_checkpoint()
    assert inside.deadline is None
    before = time.time()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert inside.should_checkpoint()
    assert before + 10 <= inside.deadline <= time.time() + 10
    inside.report(step=41)
    inside.checkpoint_saved(Path("/ckpt/x"))
    assert not inside.should_checkpoint()
    line = next(x for x in capsys.readouterr().out.splitlines() if "saved" in x)
    assert json.loads(line.partition(" ")[2])["saved"] == {"step": 41, "path": "/ckpt/x", "n": 1}


def test_sigterm_is_a_flag_only_for_who_asks(inside: Context) -> None:
    assert not inside.should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert inside.should_stop()
    assert not inside.should_checkpoint()


def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=300, check=False)


def test_importing_is_light_and_starts_nothing() -> None:
    result = run("import sys, threading; from jobsched import context; import jobsched.train.rendezvous;"
                 "print(threading.active_count(), *({'torch', 'zmq', 'numpy', 'pydantic'} & set(sys.modules)))")
    assert result.stdout == "1\n", result.stderr


def test_a_forked_child_reads_its_own_environment_and_reports_itself() -> None:
    """As in a warm interpreter: the parent has used `context` already."""
    environ = json.dumps(to_environ(ENV, {}))
    result = run("import os, sys, json, atexit\nfrom jobsched import context\ncontext.report(step=1)\n"
                 "if os.fork() == 0:\n"
                 f"    os.environ.update(json.loads({environ!r}))\n"
                 "    context.report(step=9)\n    atexit._run_exitfuncs(); os._exit(0)\n"
                 "os.wait()")
    assert '"key": "j/3/worker/1/2"' in result.stdout
    assert '"step": 9' in result.stdout


def test_the_last_report_is_sent_at_exit_and_sigquit_shows_stacks() -> None:
    result = run("import os, signal; from jobsched import context\n"
                 "for i in range(5): context.report(step=i)\n"
                 "os.kill(os.getpid(), signal.SIGQUIT)", **to_environ(ENV, {}))
    assert '"step": 4' in result.stdout.splitlines()[-1]
    assert "Current thread" in result.stderr
