"""The example jobs in the image of images/train-cpu, on a real Docker engine, under a real server that is killed too.

Runs when JOBSCHED_TEST_IMAGE names that image (`make images IMAGES=train-cpu` makes `jobsched/train-cpu`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobsched.client.client import Client, JobHandle
from jobsched.core.events import AttemptStopping
from jobsched.core.job import Phase, Reason
from jobsched.load import load_job_file
from tests.backends import docker_stage

IMAGE = os.environ.get("JOBSCHED_TEST_IMAGE", "")
JOBS = Path(__file__).parents[2] / "jobs"
PATIENCE_S = 600.0
HOME = "dev.jobsched.home"

pytestmark = [
    pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1_200), docker_stage.needs_docker,
    pytest.mark.skipif(not IMAGE, reason="JOBSCHED_TEST_IMAGE names no image with torch"),
]  # fmt: skip


class Server:
    """`jobsched serve` in a process of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        engine = {"url": docker_stage.url(), "gpus": "sim-gpu:8", "same_files": True}
        config = {"backend": {"docker": {"image": IMAGE, "engines": [engine]}},
                  "policy": {"elastic": {"every": "2s", "restart": "2s"}}}  # fmt: skip
        (home / "server.yaml").write_text(json.dumps(config))
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        (self.home / "server.json").unlink(missing_ok=True)
        with open(self.home / "server.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobsched.cli.main", "serve", "--home", str(self.home), "--config",
                 str(self.home / "server.yaml"), "--port", "0"], stdout=log, stderr=log)
        wait(lambda: (self.home / "server.json").exists() or process.poll() is not None)
        assert process.poll() is None, (self.home / "server.log").read_text()[-2_000:]
        return process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = self._start()

    def containers(self, job: JobHandle, *, ended: bool = False) -> dict[str, str]:
        """`role/index` -> id."""
        found = {}
        for entry in docker_stage.api().containers(all=ended, filters={"label": "dev.jobsched.key"}):
            owner, _, role, index, _ = entry["Labels"]["dev.jobsched.key"].split("/")
            if owner == job.id:
                found[f"{role}/{index}"] = entry["Id"]
        return found

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def wait(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JOBSCHED_SERVER", raising=False)
        patch.setenv("JOBSCHED_HOME", str(home))
        server = Server(home)
        yield server
        verify = [sys.executable, "-m", "jobsched.cli.main", "debug", "verify"]
        assert subprocess.run(verify, timeout=PATIENCE_S, check=False).returncode == 0
        server.close()
    label = f"{HOME}={(home / 'state' / 'docker-id').read_text().strip()}" if (home / "state").exists() else HOME
    wait(lambda: docker_stage.leftovers(label) == [])


def accuracy(job: JobHandle) -> float:
    text = "\n".join(line.text for line in job.logs())
    found = re.findall(r"accuracy ([0-9.]+)", text)
    assert found, text[-2_000:]
    print(f"{job.name}: accuracy {found[-1]}")
    return float(found[-1])


def test_ddp_trains_in_the_image(server: Server) -> None:
    with Client() as client:
        job = client.submit(JOBS / "digits_ddp" / "job.yaml")
        job.wait(timeout=PATIENCE_S)
        assert job.state is Phase.SUCCEEDED, job.headline
        assert accuracy(job) >= 0.95


def test_parameter_servers_survive_every_kill(server: Server) -> None:
    """A worker and a parameter server killed, a worker's container removed, the server killed and started again."""
    api = docker_stage.api()
    with Client() as client:
        job = client.submit(JOBS / "digits_ps" / "job.yaml")
        wait(lambda: (progress := job.refresh().progress) is not None and progress.step > 20)
        before = server.containers(job)
        assert len(before) == 5
        server.kill()
    server.restart()
    with Client() as client:
        job = client.job(job.id)
        assert server.containers(job) == before, "a server's restart leaves its replicas alone"
        api.kill(before["worker/1"])
        wait(lambda: server.containers(job).get("worker/1") not in (None, before["worker/1"]))
        api.kill(before["ps/0"])
        wait(lambda: server.containers(job).get("ps/0") not in (None, before["ps/0"]))
        api.remove_container(before["worker/2"], force=True)
        wait(lambda: server.containers(job).get("worker/2") not in (None, before["worker/2"])
             or job.refresh().state.terminal)
        job.wait(timeout=PATIENCE_S)
        assert job.state is Phase.SUCCEEDED, job.headline
        assert accuracy(job) >= 0.95
        assert job.attempts == 1


def test_parameter_servers_change_their_number_and_go_on_from_the_mounted_checkpoints(server: Server) -> None:
    """One that workers wait for is divided into three, in new containers."""
    spec = load_job_file(JOBS / "digits_ps" / "job.yaml").model_dump(mode="json")
    command = ["python", "digits_ps/train.py", "--epochs", "12", "--pause-ms", "2", "--apply-ms", "30"]
    spec["roles"]["ps"] |= {"command": command, "replicas": {"min": 1, "max": 3, "prefer": 1}}
    spec["roles"]["worker"] |= {"command": command, "replicas": 2}
    with Client() as client:
        job = client.submit(spec)
        assert isinstance(job, JobHandle)
        wait(lambda: len([name for name in server.containers(job) if name.startswith("ps/")]) == 3
             or job.refresh().state.terminal)
        job.wait(timeout=PATIENCE_S)
        assert job.state is Phase.SUCCEEDED, job.headline
        assert accuracy(job) >= 0.9  # after half of the epochs
        stops = [stored.event.outcome for stored in job.events() if isinstance(stored.event, AttemptStopping)]
        said = [stop.cause.message for stop in stops if stop.reason is Reason.RESCALED and stop.cause is not None]
        assert len(said) == 1
        assert said[0].startswith("ps 1 to 3: predicted "), said
        samples = job.metrics()
        steps = [[sample.step for sample in samples if sample.attempt == attempt] for attempt in (1, 2)]
        assert min(steps[1]) >= max(steps[0])
        assert dict(samples[-1].metrics)["epoch_exact"] == 1.0
