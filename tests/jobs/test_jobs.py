"""The example jobs: their files are valid, and their scripts do what they say, as real processes without a server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsched.contract import ReplicaEnv, to_environ
from jobsched.load import load_job_file
from tests.train.gang import ROOT, Gang

JOBS = sorted(path.parent.name for path in (ROOT / "jobs").glob("*/job.yaml"))


def test_every_example_is_here() -> None:
    assert {"digits_ddp", "digits_ps", "faulty", "lm_ddp", "torchrun_plain"} <= set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_file_is_valid_and_fits_a_laptop_of_two_cpus(name: str) -> None:
    spec = load_job_file(str(ROOT / "jobs" / name / "job.yaml"))
    assert sum(role.cpu * role.replicas.prefer for role in spec.roles.values()) <= 2_000


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    made = Gang(tmp_path, {"worker": 2}, in_place=False)
    yield made
    made.close()


LM_OPTIONS = ("--checkpoint-s", "1000")  # saves when asked, and at the end


def lm(gang: Gang, steps: int, *more: str) -> None:
    for index in range(2):
        gang.start("worker", index, ["jobs/lm_ddp/train.py", "--steps", str(steps), "--loss", "9", *LM_OPTIONS, *more])


@pytest.mark.e2e
def test_the_language_model_resumes_exactly(gang: Gang, tmp_path: Path) -> None:
    """Asked to save, killed, started anew: it ends with the very loss of a run that was left alone."""
    whole = Gang(tmp_path / "whole", {"worker": 2}, in_place=False)
    try:
        lm(whole, 40)
        assert [whole.wait_exit("worker", i) for i in range(2)] == [0, 0], whole.logs()
        loss = re.search(r"rank 0: loss (\S+)", whole.log("worker", 0))
    finally:
        whole.close()
    gang.let_on_to(5)
    lm(gang, 40)
    for index in range(2):
        gang.wait_report(lambda r, i=index: r.body.get("step", 0) >= 5 and f"worker/{i}" in r.key)
    gang.kill("worker", 1, signal.SIGUSR1)  # one rank is asked, all agree
    acknowledged = [gang.creep(lambda r, i=i: "saved" in r.body and f"worker/{i}" in r.key) for i in range(2)]
    for index in range(2):
        gang.kill("worker", index)
    saved = acknowledged[0].body["saved"]["step"]
    assert saved == acknowledged[1].body["saved"]["step"]
    gang.attempt = 2
    gang.let_on_to(float("inf"))
    lm(gang, 40)
    assert [gang.wait_exit("worker", i) for i in range(2)] == [0, 0], gang.logs()
    resumed = re.search(r"goes on at step (\d+) of attempt 2[\s\S]*rank 0: loss (\S+)", gang.log("worker", 0))
    assert loss is not None
    assert resumed is not None
    assert int(resumed[1]) == saved > 0
    assert resumed[2] == loss[1]
    assert float(loss[1]) < 4.5


def faulty(mode: str, attempt: int = 1, rank: int = 1, **more: str) -> subprocess.Popen[bytes]:
    replica = ReplicaEnv(job_id="j", job_name="faulty", attempt=attempt, role="worker", index=rank, rank=rank,
                         world_size=2, peers={"worker": ("a:1", "b:2")}, report="log:")
    environ = to_environ(replica, {**os.environ, "PYTHONPATH": str(ROOT), "MODE": mode, "STEPS": "4",
                                   "STEP_MS": "5", "AT_STEP": "2", **more})
    return subprocess.Popen([sys.executable, "jobs/faulty/train.py"], env=environ, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize(("mode", "attempt", "rank", "more", "code"), [
    ("none", 1, 1, {}, 0),
    ("crash", 1, 1, {"EXIT": "3"}, 3),
    ("crash", 2, 1, {}, 137),
    ("crash", 1, 0, {}, 0),
    ("crash", 1, 1, {"EXIT": "-9"}, -9),
    ("crash-once", 1, 1, {}, 137),
    ("crash-once", 2, 1, {}, 0),
    ("hang", 2, 1, {}, 0),
    ("slow", 1, 1, {}, 0),
])
def test_faulty_ends_as_asked(mode: str, attempt: int, rank: int, more: dict[str, str], code: int) -> None:
    process = faulty(mode, attempt, rank, **more)
    process.communicate(timeout=300)
    assert process.returncode == code


def test_faulty_hangs_in_its_first_attempt_but_still_beats() -> None:
    process = faulty("hang")
    assert process.stdout is not None
    patience = threading.Timer(300, process.kill)  # ends the lines
    patience.start()

    def until(text: str) -> str:
        return next((line for line in map(bytes.decode, process.stdout or ()) if text in line), "")

    try:
        assert until('"step": 2')
        assert '"step": 2' in until("::jobsched::")  # a beat, no step
        process.send_signal(signal.SIGQUIT)
        assert until("wait_for_a_lock_that_is_never_released")
        assert process.poll() is None
    finally:
        patience.cancel()
        process.kill()
        process.communicate(timeout=300)


def test_faulty_is_deaf() -> None:
    process = faulty("deaf", STEPS="1000000")
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
    finally:
        process.kill()
        process.communicate()
