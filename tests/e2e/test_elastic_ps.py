"""A job that waits for its only parameter server is given more, and gives up workers and servers for urgent ones, on a
real server with real training."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
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
    virtual_nodes: [{count: 1, cpu: 6, memory: 64Gi, gpus: "sim-gpu:4"}]
policy:
  elastic: {every: 2s, restart: 2s}
  preemption: {min_runtime: 2s}
"""


def running(job: JobHandle, role: str) -> int:
    replicas = job.answer.job.replicas.values() if job.state is Phase.RUNNING else ()
    return sum(r.role == role and r.state is ReplicaState.RUNNING for r in replicas)


def submitted(client: Client, *options: str, **replicas: object) -> JobHandle:
    """The example with these numbers of replicas. A push takes a server time for each parameter that it holds, so more
    servers are faster, as on real machines."""
    spec = load_job_file(JOBS / "digits_ps" / "job.yaml").model_dump(mode="json")
    command = [sys.executable, "digits_ps/train.py", "--pause-ms", "2", "--apply-ms", "30", *options]
    for role, numbers in replicas.items():
        spec["roles"][role] |= {"command": command, "replicas": numbers}
    spec["roles"]["ps"]["cpu"] = 1
    job = client.submit(spec)
    assert isinstance(job, JobHandle)
    return job


def urgent(client: Client, **worker: object) -> JobHandle:
    """One that is over soon and goes before others."""
    job = client.submit({"name": "urgent", "priority": 100, "roles": {"worker": {"command": ["sleep", "2"], **worker}}})
    assert isinstance(job, JobHandle)
    return job


def decided(job: JobHandle) -> list[ev.Event]:
    return [stored.event for stored in job.events()]


@pytest.mark.timeout(1_200)
def test_a_job_grows_from_one_parameter_server_to_three_and_trains_on(client: Client) -> None:
    job = submitted(client, "--epochs", "48", ps={"min": 1, "max": 3, "prefer": 1}, worker=2)
    until(job, lambda j: running(j, "ps") == 3)
    attempt = job.answer.job.attempt
    assert attempt == 2

    placed = next(e for e in decided(job) if isinstance(e, ev.AttemptPlaced))
    assert sum(binding.role == "ps" for binding in placed.bindings) == 1
    stop = next(e for e in decided(job) if isinstance(e, ev.AttemptStopping))
    assert stop.outcome.reason is Reason.RESCALED
    assert stop.outcome.cause is not None
    assert stop.outcome.cause.message.startswith("ps 1 to 3: predicted 1."), stop
    told = subprocess.run([PROGRAM, "events", job.id], capture_output=True, text=True,
                          timeout=PATIENCE_S, check=True).stdout  # fmt: skip
    assert "ps 1 to 3: predicted 1." in told
    assert any("ps 1 to 3: predicted 1." in line for line in job.why().story)

    until(job, lambda j: any(sample.attempt == 2 for sample in j.metrics()))
    resumed = [sample.step for sample in job.metrics() if sample.attempt == 2]
    before = [sample.step for sample in job.metrics() if sample.attempt == 1]
    assert min(resumed) >= max(before)

    job.wait(until="succeeded", timeout=PATIENCE_S)  # the job itself checks accuracy and every epoch's samples
    last = dict(job.metrics()[-1].metrics)
    assert (last["epoch_exact"], last["epochs"]) == (1.0, 48.0)
    assert last["accuracy"] >= 0.95
    assert [e.attempt for e in decided(job) if isinstance(e, ev.AttemptPlaced)] == [1, 2]


@pytest.mark.timeout(1_200)
def test_workers_leave_for_an_urgent_job_in_place_and_servers_by_another_attempt_and_both_come_back(
    client: Client,
) -> None:
    """Three workers on four GPUs, three servers of one CPU each; 1.5 of 6 CPUs are free. At least, two
    workers and one server, the job takes two."""
    job = submitted(client, "--epochs", "1000", ps={"min": 1, "max": 3, "prefer": 3},
                    worker={"min": 2, "max": 3, "prefer": 3})  # fmt: skip
    until(job, lambda j: (running(j, "worker"), running(j, "ps")) == (3, 3) and _step(j) >= 10)

    gpus = urgent(client, gpu="any:2", cpu="100m")
    gpus.wait(until="succeeded", timeout=PATIENCE_S)
    released = [e for e in decided(job) if isinstance(e, ev.ReplicasReleased)]
    assert [(len(e.replicas), e.for_job) for e in released] == [(1, gpus.id)], released
    assert released[0].replicas[0].startswith("worker/")
    until(job, lambda j: running(j, "worker") == 3)
    assert job.answer.job.attempt == 1
    step = _step(job)
    until(job, lambda j: _step(j) >= step + 10)

    cpus = urgent(client, cpu=4)
    cpus.wait(until="succeeded", timeout=PATIENCE_S)
    until(job, lambda j: running(j, "ps") == 3 and running(j, "worker") == 3 and
          any(sample.attempt == j.answer.job.attempt for sample in j.metrics()))  # fmt: skip
    stops = [e.outcome for e in decided(job) if isinstance(e, ev.AttemptStopping)]
    assert {stop.reason for stop in stops} == {Reason.RESCALED}
    said = [stop.cause.message for stop in stops if stop.cause is not None]
    assert said[0].startswith("shrinks from 3 to 1 ps and from 3 to 2 workers to make room; job urgent "), said
    assert [stop.for_job for stop in stops] == [cpus.id, *[""] * len(said[1:])]
    assert "ps 1 to " in said[1], said
    steps: dict[int, list[int]] = {}
    for sample in job.metrics():
        steps.setdefault(sample.attempt, []).append(sample.step)
    for before, after in pairwise(steps.values()):
        assert min(after) >= max(before)
    job.cancel()
    job.wait(until="done", timeout=PATIENCE_S)


def _step(job: JobHandle) -> int:
    return job.progress.step if job.progress is not None else -1
