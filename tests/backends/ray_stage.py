"""A real Ray cluster for tests, if the package is there: two nodes on this machine, one for all test processes.

The first process that wants it starts it, as a process of its own; it ends by itself when all who registered are gone,
however they went. `python -m tests.backends.ray_stage FILE` is that process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

NODES = (("one", 8), ("two", 8))
"""Name and CPUs; each with four pretended GPUs."""
SMALL = 80 << 20
START_S = 240.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "180"}

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the package ray is missing")


def _write(file: Path, said: dict[str, Any]) -> None:
    """At once, as others read it at any moment."""
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(said))
    draft.replace(file)


@cache
def address() -> str:
    """Of the cluster, started if need be: ten to twenty seconds, on a busy machine minutes."""
    whose = zlib.crc32(f"{os.getuid()} {sys.executable}".encode())  # its workers import what this interpreter does
    file = Path(tempfile.gettempdir(), f"jobsched-test-ray-{whose:08x}.json")
    with FileLock(f"{file}.lock"):
        said = _read(file)
        if said is None:
            said = {"address": "", "users": [os.getpid()]}
            _write(file, said)
            with open(file.with_suffix(".log"), "wb") as log:
                keeper = subprocess.Popen(
                    [sys.executable, "-m", "tests.backends.ray_stage", str(file)], stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True, env=os.environ | QUIET)
            deadline = time.monotonic() + START_S
            while not (said := json.loads(file.read_text()))["address"]:
                assert keeper.poll() is None, file.with_suffix(".log").read_text()[-2_000:]
                assert time.monotonic() < deadline, "the Ray cluster did not start"
                time.sleep(0.1)
        elif os.getpid() not in said["users"]:
            said["users"].append(os.getpid())
            _write(file, said)
        return str(said["address"])


def _read(file: Path) -> dict[str, Any] | None:
    """What the file says of a cluster that still runs."""
    with suppress(OSError, ValueError, KeyError):  # its start may have failed
        said: dict[str, Any] = json.loads(file.read_text())
        if psutil.pid_exists(said["keeper"]) and any(map(psutil.pid_exists, said["users"])):
            return said
    return None


@cache
def driver() -> Any:
    """Ray itself, connected: to do things behind the backend's back."""
    os.environ |= QUIET
    import ray

    ray.init(address(), namespace="jobsched", log_to_driver=False, logging_level="ERROR")
    return ray


def actors(home_id: str) -> dict[str, dict[str, Any]]:
    """Name -> entry of Ray's table, of the living actors of one server."""
    driver()
    from ray._private.state import actors as table

    mine = [one for one in table().values() if one["Name"].startswith(f"jobsched:{home_id}:")]
    return {one["Name"]: one for one in mine if one["State"] != "DEAD"}


def groups(home_id: str) -> list[str]:
    """Placement groups of one server that are not removed."""
    driver()
    from ray.util import placement_group_table

    return [one["name"] for one in placement_group_table().values()
            if one["name"].startswith(f"jobsched:{home_id}:") and one["state"] != "REMOVED"]


class Head:
    """A cluster of one node that may be killed at a blow and started again at the same address."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = directory / "head.log"
        self.address = f"127.0.0.1:{self.port}"

    def start(self, **system: object) -> None:
        """`system`: settings of Ray's own. Returns once the head takes connections."""
        place = tempfile.mkdtemp(prefix="jr-")  # Ray's sockets need a short path
        program = Path(sys.executable).with_name("ray")
        environ = os.environ | QUIET | {f"RAY_{name}": str(value) for name, value in system.items()}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [program, "start", "--head", "--block", f"--port={self.port}", "--node-ip-address=127.0.0.1",
                 "--num-cpus=4", "--include-dashboard=false", f"--object-store-memory={SMALL}", f"--temp-dir={place}",
                 "--node-name=head"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True)
        self._place = place
        deadline = time.monotonic() + START_S
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            assert time.monotonic() < deadline, self.log.read_text()[-2_000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """Everything, the replicas' actors included; their commands are left to themselves."""
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for one in found:
                if "ray" in " ".join(one.cmdline()):
                    one.kill()
        self._process.wait(30)
        shutil.rmtree(self._place, ignore_errors=True)


def start_nodes(**head: Any) -> Any:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for at, (name, cpus) in enumerate(NODES):
        fields = {"include_dashboard": False, **head} if at == 0 else {}
        cluster.add_node(
            num_cpus=cpus, num_gpus=4, node_name=name, object_store_memory=SMALL, memory=8 << 30,
            resources={"accelerator_type:SIM": 1}, labels={"rack": f"r{at}"}, **fields)
    return cluster


@contextmanager
def mortal_node() -> Iterator[Callable[[], None]]:
    """One more node, called `mortal`; yields what kills it at a blow."""
    program = Path(sys.executable).with_name("ray")
    process = subprocess.Popen(
        [program, "start", f"--address={address()}", "--node-name=mortal", "--block", "--num-cpus=4",
         f"--object-store-memory={SMALL}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | QUIET, start_new_session=True)

    def kill() -> None:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "raylet" in child.name():
                child.kill()

    try:
        yield kill
    finally:
        process.terminate()
        process.wait(30)


def keep(file: Path) -> None:
    """Start the cluster, write down where it is, and end it once nobody uses it."""
    cluster = start_nodes()
    said = json.loads(file.read_text()) | {"keeper": os.getpid(), "address": cluster.address}
    _write(file, said)
    while True:
        time.sleep(1.0)
        with FileLock(f"{file}.lock"):
            said = json.loads(file.read_text())
            if not any(map(psutil.pid_exists, said["users"])):
                file.unlink()
                break
    cluster.shutdown()


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
