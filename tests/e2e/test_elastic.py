"""An elastic job gives way to an urgent one and grows back, on a real server with real training: four virtual nodes of
eight simulated GPUs, all of them in use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobsched.client.client import Client, JobHandle
from jobsched.core import events as ev
from jobsched.core.job import Phase, ReplicaState
from jobsched.load import load_job_file
from tests.e2e.conftest import JOBS, PATIENCE_S, until

pytest.importorskip("torch")
pytestmark = pytest.mark.e2e

CONFIG = """
backend:
  local:
    virtual_nodes: [{count: 4, cpu: 16, memory: 64Gi, gpus: "sim-gpu:8"}]
"""


def trains_with(count: int, step: int) -> Callable[[JobHandle], bool]:
    """Whether so many replicas run, say that they train together, and have come so far."""

    def holds(job: JobHandle) -> bool:
        running = sum(r.state is ReplicaState.RUNNING for r in job.answer.job.replicas.values())
        told = job.progress
        return running == count and told is not None and told.world_size == count and told.step >= step

    return holds


@pytest.mark.timeout(1_200)
def test_an_elastic_job_shrinks_for_an_urgent_one_after_saving_and_grows_back(client: Client, tmp_path: Path) -> None:
    filler = {"command": ["sleep", "3600"], "gpu": "any:7", "cpu": "100m", "replicas": 4}
    fill = client.submit({"name": "fill", "roles": {"worker": filler}})
    assert isinstance(fill, JobHandle)
    fill.wait(until="running", timeout=PATIENCE_S)
    spec = load_job_file(JOBS / "digits_ddp" / "job.yaml").model_dump(mode="json")
    # Time that grows with a replica's share of the batch stands for work: more replicas are faster, as on real GPUs.
    # It goes on with that until it has given way and grown back, however long that takes.
    grown = tmp_path / "grown"
    command = [sys.executable, "digits_ddp/train.py", "--epochs", "60", "--sample-ms", "10", "--slow-until", str(grown)]
    spec["roles"]["worker"] |= {"command": command, "replicas": {"min": 2, "max": 4, "prefer": 4}}
    spec["checkpoint"]["grace"] = "2m"
    digits = client.submit(spec)
    assert isinstance(digits, JobHandle)
    until(digits, trains_with(4, step=10))

    hurry = {"command": ["sleep", "2"], "gpu": "any:1", "cpu": "100m", "replicas": 2}
    urgent = client.submit({"name": "urgent", "priority": 100, "roles": {"worker": hurry}})
    assert isinstance(urgent, JobHandle)
    urgent.wait(until="succeeded", timeout=PATIENCE_S)
    assert digits.refresh().state is Phase.RUNNING
    until(digits, trains_with(4, step=20))
    grown.touch()
    digits.wait(until="succeeded", timeout=PATIENCE_S)  # the job itself checks accuracy and every epoch's samples

    kinds = [stored.event for stored in digits.events()]
    released = next(e for e in kinds if isinstance(e, ev.ReplicasReleased))
    gone = next(e for e in kinds if isinstance(e, ev.ReplicasGone))
    assert len(released.replicas) == 2
    story = [(e.at_ms - released.at_ms, e.kind, getattr(e, "replicas", getattr(e, "step", ""))) for e in kinds]
    between = kinds[kinds.index(released) : kinds.index(gone)]
    assert any(isinstance(e, ev.CheckpointSaved) for e in between), story
    assert digits.answer.job.attempt == 1
    told = dict(digits.metrics()[-1].metrics)
    assert told["epoch_exact"] == 1.0
    assert told["accuracy"] >= 0.95
    assert fill.refresh().state is Phase.RUNNING
