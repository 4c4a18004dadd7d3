"""A morning on a shared cluster, told by the commands that a newcomer would use: three queues with quotas, small jobs
on borrowed GPUs, a big gang that starts when it was promised to, an urgent job, an elastic one that gives way and grows
back; on a real server with real training, four virtual nodes of eight simulated GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobsched.client.client import Client, JobHandle
from jobsched.core import events as ev
from jobsched.core.job import Phase, Reason
from jobsched.load import load_job_file
from tests.e2e.conftest import JOBS, PATIENCE_S, until
from tests.e2e.test_elastic import CONFIG as FOUR_NODES
from tests.e2e.test_elastic import trains_with

pytest.importorskip("torch")
pytestmark = pytest.mark.e2e
CONFIG = FOUR_NODES + """
queues:
  - {name: research, cohort: labs, quota: {gpus: 24}}
  - {name: vision, cohort: labs, quota: {gpus: 8}}
  - {name: nightly, cohort: labs}
"""
LIMIT_S = 50
"""Of the small job, which ends when it is told to: what is promised for then is asked for before, in about ten seconds
on a machine with nothing else to do. From the 60th second on the gang may take back what its queue lent."""


def sleeping(
    client: Client, name: str, queue: str, gpus: int, for_s: int, replicas: int = 1, command: str = "",
    **fields: object,
) -> JobHandle:
    worker = {"command": ["sh", "-c", command or f"exec sleep {for_s}"], "gpu": f"any:{gpus}", "cpu": "100m",
              "replicas": replicas}
    job = client.submit({"name": name, "queue": queue, "roles": {"worker": worker}, **fields})
    assert isinstance(job, JobHandle)
    return job


def said(*words: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "jobsched.cli.main", *words], capture_output=True, text=True, check=False,
        timeout=PATIENCE_S, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(f"$ jobsched {' '.join(words)}\n{done.stdout}")
    return done.stdout


def row(table: str, name: str) -> list[str]:
    return next(line.split() for line in table.splitlines() if line.split()[:1] == [name])


@pytest.mark.timeout(1_500)
def test_a_gang_starts_as_promised_and_an_elastic_job_gives_way_to_an_urgent_one(
    client: Client, tmp_path: Path
) -> None:
    spec = load_job_file(JOBS / "digits_ddp" / "job.yaml").model_dump(mode="json")
    command = [sys.executable, "digits_ddp/train.py", "--epochs", "2000", "--sample-ms", "10"]
    spec["roles"]["worker"] |= {"command": command, "replicas": {"min": 2, "max": 4, "prefer": 4}}
    spec["checkpoint"]["grace"] = "2m"
    digits = client.submit({**spec, "name": "digits", "queue": "vision"})
    assert isinstance(digits, JobHandle)
    until(digits, trains_with(4, step=5))

    # A small job borrows a GPU of each node; the gang needs three whole ones.
    spread = {"placement": {"spread": "node"}, "time_limit": f"{LIMIT_S}s"}
    over = tmp_path / "over"
    small = sleeping(client, "small", "nightly", 1, 0, replicas=4,
                     command=f"while [ ! -e {over} ]; do sleep 0.1; done", **spread)
    small.wait(until="running", timeout=PATIENCE_S)
    shown = said("queues")
    assert row(shown, "nightly")[-2:] == ["4", "-"], "4 GPUs borrowed"
    gang = sleeping(client, "gang", "research", 8, 3_600, replicas=3)
    promise = gang.why().verdict
    assert promise is not None
    ends_ms = small.refresh().answer.job.running_since_ms + LIMIT_S * 1_000
    assert promise.starts_before_ms == pytest.approx(ends_ms, abs=3_000)
    late = sleeping(client, "late", "nightly", 7, 3_600)
    text = said("why", "gang")
    assert "  Resources: role worker needs 3 × (8 any GPU, 100m CPU); 24 of 32 matching GPUs are free" in text
    assert "  expected start: by " in text
    assert "  sooner with: 24 × 1 GPU instead of 3 × 8: now" in text
    barred = late.why().verdict
    assert barred is not None
    assert barred.reasons[0].reason is Reason.RESERVATION
    text = said("why", "late")
    assert "places are kept for job gang, expected to start " in text
    assert "instead of nightly: now" not in text, "they are kept from all queues"
    quick = sleeping(client, "quick", "research", 6, 1, time_limit="10s")
    quick.wait(until="succeeded", timeout=PATIENCE_S)  # it is over before the gang's instant: backfill
    assert gang.refresh().state is Phase.QUEUED
    over.touch()
    gang.wait(until="running", timeout=PATIENCE_S)
    started_ms = gang.refresh().answer.job.attempt_started_at_ms
    assert started_ms <= promise.starts_before_ms + 5_000
    assert late.refresh().state is Phase.QUEUED
    assert row(said("queues"), "research")[5:] == ["24", "-", "75%", "24", "-", "-"]

    # 28 of 32 GPUs are in use; the urgent job needs six, and its queue's quota is eight.
    step = digits.refresh().progress.step  # type: ignore[union-attr]
    options = ("--queue", "vision", "--priority", "high", "--gpus", "1", "--role", "worker=6")
    plan = said("plan", *options, "--", "sleep", "2")
    assert "Starts as soon as others have made room:\n  digits (" in plan
    assert ") shrinks by 2\n" in plan
    assert "Queue vision then holds 8 of its 8 gpus" in plan
    urgent = sleeping(client, "urgent", "vision", 1, 2, replicas=6, priority="high")
    urgent.wait(until="succeeded", timeout=PATIENCE_S)
    until(digits, trains_with(4, step=step + 10))
    events = [stored.event for stored in digits.events()]
    released = next(e for e in events if isinstance(e, ev.ReplicasReleased))
    gone = next(e for e in events if isinstance(e, ev.ReplicasGone))
    assert len(released.replicas) == 2
    assert released.for_job == urgent.id
    assert any(isinstance(e, ev.CheckpointSaved) for e in events[events.index(released) : events.index(gone)])
    assert digits.answer.job.attempt == 1
    text = said("why", "digits")
    assert "shrinks by worker/" in text
    assert "grew by worker/" in text
    assert gang.refresh().state is Phase.RUNNING
    assert gang.answer.job.attempt == 1

    usage = said("usage")
    assert row(usage, "nightly")[2:5] == ["2", "1", "0"]  # jobs, succeeded, failed
    assert row(usage, "vision")[2:4] == ["2", "1"]
    for job in (digits, gang, late):
        job.cancel()
        job.wait(until="done", timeout=PATIENCE_S)
