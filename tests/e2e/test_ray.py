"""The example jobs, the same files, on a real Ray cluster of two nodes, while all that can be killed is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from jobsched.backends.supervisor import processes
from jobsched.client.client import Client, JobHandle
from jobsched.core.job import Phase
from jobsched.errors import Unreachable
from jobsched.load import load_job_file
from tests.backends import ray_stage
from tests.ports import port_range

JOBS = Path(__file__).parents[2] / "jobs"
PROGRAM = Path(sys.executable).with_name("jobsched")
PATIENCE_S = 240.0
BACK_S = 120.0

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1_500), ray_stage.needs_ray]


class Served:
    """A server of its own process over the test cluster, that may be killed and started again."""

    def __init__(self, home: Path, address: str, **fields: object) -> None:
        self.home = home
        self.config = home.parent / "server.yaml"
        self.config.write_text(json.dumps({"home": str(home), "listen": "127.0.0.1:0", **fields, "backend": {"ray": {
            "address": address, "gpu_kinds": {"SIM": "sim-gpu"}, "scratch": str(home.parent),
            "ports": port_range(),
        }}}))

    def start(self) -> None:
        with open(self.home.parent / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [PROGRAM, "serve", "--config", self.config], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                said = json.loads((self.home / "server.json").read_text())
                if said["pid"] == self.process.pid:
                    self.client = Client(said["url"], token=(self.home / "token").read_text().strip())
                    if self.client.nodes():
                        return
            except (OSError, ValueError, Unreachable):
                pass
            assert time.monotonic() < deadline, (self.home.parent / "server.log").read_text()[-2_000:]
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def owner(self) -> str:
        return (self.home / "supervisor" / "ray-id").read_text().strip()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_S)

    def pids(self, job: JobHandle, place: str = "") -> set[int]:
        """Processes of a replica, or of the whole job."""
        wanted = f":{job.id}/"
        return {p.pid for p in processes.table().values()
                if p.alive and wanted in (mark := processes.marker(p.pid)) and (f"/{place}/" in mark or not place)}

    @contextmanager
    def standing_still(self, job: JobHandle) -> Iterator[None]:
        """Nobody trains meanwhile: a busy machine may take longer for what comes than the whole training."""
        pids = self.pids(job)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def left_over(self, job: JobHandle) -> list[object]:
        return [*ray_stage.actors(self.owner), *ray_stage.groups(self.owner), *self.pids(job)]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with ray_stage.alone():
        yield


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "home").mkdir()
    served = Served(tmp_path / "home", ray_stage.address())
    try:
        served.start()
        yield served
    finally:
        served.stop()


def idents(job: JobHandle) -> dict[str, tuple[int, str]]:
    """Restart and actor of each replica that runs."""
    return {f"{one.role}/{one.index}": (one.restart, one.ident)
            for one in job.refresh().members if one.state == "running"}


def still(job: JobHandle, before: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Restarts and actors of those that ran before, once all of them run as far as is known."""
    deadline = time.monotonic() + PATIENCE_S
    while not (now := idents(job)).keys() >= set(before):
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    return {place: now[place] for place in before}


def back(job: JobHandle, place: str, before: tuple[int, str]) -> float:
    """Seconds until a replica runs again as another actor."""
    begun = time.monotonic()
    while True:
        now = idents(job).get(place, before)
        if now[0] > before[0] and now[1] != before[1]:
            return time.monotonic() - begun
        assert time.monotonic() - begun < BACK_S, job.why()
        time.sleep(0.1)


def step(job: JobHandle) -> int:
    progress = job.refresh().progress
    return progress.step if progress is not None else -1


@pytest.mark.parametrize(("name", "killed", "removed"), [
    ("digits_ps", ("worker/2", "ps/1"), "worker/0"),
    ("digits_ddp", ("worker/1",), "worker/2"),
])
def test_kills_of_all_kinds_are_recovered(served: Served, name: str, killed: tuple[str, ...], removed: str,
                                               tmp_path: Path) -> None:
    # It takes its time until all have been killed, however long that takes, and keeps its size meanwhile.
    over = tmp_path / "over"
    spec = load_job_file(JOBS / name / "job.yaml").model_dump(mode="json")
    for role in spec["roles"].values():
        role["replicas"] = role["replicas"]["prefer"]
        role["command"] = ["python", f"{name}/train.py", "--pause-ms", "150", "--slow-until", str(over)]
    job = served.client.submit(spec)
    assert isinstance(job, JobHandle)
    job.wait(40, timeout=PATIENCE_S)

    with served.standing_still(job):
        before = idents(job)
        assert {one.node for one in job.members} <= {"one", "two"}
        served.kill()
        served.start()
        job = served.client.job(job.id)
        assert still(job, before) == before, "a restart of the server touches no replica"

    for place in (*killed, removed):
        job.wait(step(job) + 20, timeout=PATIENCE_S)
        with served.standing_still(job):
            was = still(job, [place])[place]
            if place == removed:
                ray = ray_stage.driver()
                (actor,) = [one for one in ray_stage.actors(served.owner) if f"/{place}/" in one]
                ray.kill(ray.get_actor(actor, namespace="jobsched"))
            else:
                for pid in served.pids(job, place):
                    os.kill(pid, signal.SIGKILL)
            print(f"{place} back after {back(job, place, was):.1f} s")
    over.touch()

    job.wait(timeout=PATIENCE_S)
    assert job.state is Phase.SUCCEEDED, job.why()
    assert job.attempts == 1, "each was restarted in place"
    said = [float(found[1]) for line in job.logs() if (found := re.match(r"accuracy (\S+),", line.text))]
    print(f"accuracies {said}")
    assert said
    assert min(said) >= 0.95
    verified = subprocess.run([PROGRAM, "debug", "verify"], capture_output=True, text=True, timeout=PATIENCE_S,
                              check=False, env=os.environ | {"JOBSCHED_HOME": str(served.home)})
    assert verified.returncode == 0, verified.stdout + verified.stderr
    deadline = time.monotonic() + PATIENCE_S
    while left := served.left_over(job):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


POOLS = [
    {"name": "never", "cpu": 2, "memory": "1Gi", "max": 4, "price": 1, "delay": "2s", "idle": "2s"},
    {"name": "there", "cpu": 2, "memory": "1Gi", "max": 4, "price": 2, "delay": "120s", "idle": "2s"},
]
TRAIN = {
    "name": "gang", "roles": {"worker": {"replicas": 2, "cpu": 2, "memory": "100Mi", "command": [
        "/bin/sh", "-c", "echo there are $WORLD_SIZE; while [ ! -e $DONE ]; do sleep 0.1; done"]}},
}


def test_nodes_are_asked_of_rays_autoscaler_and_let_go(tmp_path: Path) -> None:
    """Ray's autoscaler with its own stand-in of a cloud, in which the cheaper pool has no nodes to give."""
    head = ray_stage.Head(tmp_path, {"there": {}, "elsewhere": {}})
    head.start()
    (tmp_path / "home").mkdir()
    served = Served(tmp_path / "home", head.address, pools=POOLS)
    try:
        served.start()
        begun = time.monotonic()
        done = tmp_path / "done"
        job = served.client.submit(TRAIN | {"env": {"DONE": str(done)}})
        seen: list[str] = []
        while job.refresh().state is not Phase.RUNNING:
            assert time.monotonic() - begun < PATIENCE_S, (seen, head.said())
            assert len([one for one in job.members if one.node]) in (0, 2), "all or nothing"
            if (why := job.why().headline) not in seen:
                seen.append(why)
            time.sleep(0.1)
        print(f"runs after {time.monotonic() - begun:.1f} s")
        asked = [next((name for name in ("never", "there") if f"2 nodes of pool {name}" in why), "") for why in seen]
        assert [name for name in dict.fromkeys(asked) if name] == ["never", "there"], seen
        mine = {one.node.name: one.node.label("pool") for one in served.client.nodes()}
        assert sorted(mine.values()) == ["", "there", "there"]
        assert len({one.node for one in job.members}) == 2
        served.kill()
        served.start()
        time.sleep(5)  # longer than Ray leaves an idle node that nobody asks for
        assert [one.state for one in served.client.nodes()] == ["ready"] * 3, "never under a job"
        done.touch()
        job = served.client.job(job.id)
        job.wait(timeout=PATIENCE_S)
        assert (job.state, job.attempts) == (Phase.SUCCEEDED, 1), job.why()
        begun = time.monotonic()
        while [one for one in served.client.nodes() if mine.get(one.node.name) and one.state != "lost"]:
            assert time.monotonic() - begun < PATIENCE_S, head.said()
            time.sleep(0.2)
        print(f"let go after {time.monotonic() - begun:.1f} s")
    finally:
        served.stop()
        head.kill()
