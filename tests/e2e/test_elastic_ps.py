"""A job that waits for its only parameter server is given more, on a real server with real training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobsched.client.client import Client, JobHandle
from jobsched.core import events as ev
from jobsched.core.job import Phase, Reason, ReplicaState
from jobsched.load import load_job_file
from tests.e2e.conftest import JOBS, PATIENCE_S, until

pytest.importorskip("torch")
pytestmark = pytest.mark.e2e

PROGRAM = Path(sys.executable).parent / "jobsched"
CONFIG = """
backend:
  local:
    virtual_nodes: [{count: 1, cpu: 16, memory: 64Gi, gpus: "sim-gpu:2"}]
policy:
  elastic: {every: 2s, restart: 2s}
"""


def servers(job: JobHandle) -> int:
    return sum(r.role == "ps" and r.state is ReplicaState.RUNNING for r in job.answer.job.replicas.values())


@pytest.mark.timeout(600)
def test_a_job_grows_from_one_parameter_server_to_three_and_trains_on(client: Client) -> None:
    spec = load_job_file(JOBS / "digits_ps" / "job.yaml").model_dump(mode="json")
    # A push takes a server time for each parameter that it holds, so more servers are faster, as on real machines.
    command = [sys.executable, "digits_ps/train.py", "--epochs", "24", "--pause-ms", "2", "--apply-ms", "30"]
    spec["roles"]["ps"] |= {"command": command, "replicas": {"min": 1, "max": 3, "prefer": 1}}
    spec["roles"]["worker"] |= {"command": command, "replicas": 2}
    job = client.submit(spec)
    assert isinstance(job, JobHandle)
    until(job, lambda j: j.state is Phase.RUNNING and servers(j) == 1)
    until(job, lambda j: j.state is Phase.RUNNING and servers(j) == 3)
    attempt = job.answer.job.attempt
    assert attempt == 2

    events = [stored.event for stored in job.events()]
    stop = next(e for e in events if isinstance(e, ev.AttemptStopping))
    assert stop.outcome.reason is Reason.RESCALED
    assert stop.outcome.cause is not None
    assert stop.outcome.cause.message.startswith("ps 1 to 3: predicted 1."), stop
    told = subprocess.run([PROGRAM, "events", job.id], capture_output=True, text=True,
                          timeout=60, check=True).stdout  # fmt: skip
    assert "ps 1 to 3: predicted 1." in told
    assert any("ps 1 to 3: predicted 1." in line for line in job.why().story)

    until(job, lambda j: any(sample.attempt == 2 for sample in j.metrics()))
    resumed = [sample.step for sample in job.metrics() if sample.attempt == 2]
    before = [sample.step for sample in job.metrics() if sample.attempt == 1]
    assert min(resumed) >= max(before)

    job.wait(until="succeeded", timeout=PATIENCE_S)  # the job itself checks accuracy and every epoch's samples
    last = dict(job.metrics()[-1].metrics)
    assert (last["epoch_exact"], last["epochs"]) == (1.0, 24.0)
    assert last["accuracy"] >= 0.95
    attempts = [e.attempt for e in (stored.event for stored in job.events()) if isinstance(e, ev.AttemptPlaced)]
    assert attempts == [1, 2]
