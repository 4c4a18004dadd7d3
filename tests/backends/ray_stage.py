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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from tests.ports import own_ports

NODES = (("one", 8), ("two", 8))
"""Name and CPUs; each with four pretended GPUs."""
SMALL = 80 << 20
START_S = 240.0
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "180",
    # A node that refuses five calls in a row is dead: after five seconds instead of fifteen. One that is only slow
    # to answer has the same fifty as ever.
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
}  # fmt: skip

HEAD_TYPE = "ray.head.default"
FIRST_ID = "f" * 51 + "0" * 5
"""Of the head, where Ray's stand-in of a cloud makes the other nodes."""

PATIENCE_S = 120


def alone() -> FileLock:
    """Held while a test uses the cluster, which all test processes share: what one holds is foreign for another."""
    return FileLock(Path(tempfile.gettempdir(), f"jobsched-test-ray-{os.getuid()}.alone"), timeout=1_000)


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

    def __init__(self, directory: Path, pools: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """`pools`: types of nodes that its autoscaler can have made, all on this machine, each with what is special."""
        (self.port,) = own_ports(1)
        self.log = directory / "head.log"
        self.address = f"127.0.0.1:{self.port}"
        self._options, self._environ = ["--num-cpus=4", "--node-name=head"], dict[str, str]()
        if pools is not None:
            config = directory / "autoscaling.json"
            config.write_text(json.dumps(_autoscaling(self.address, pools)))
            self._options = ["--num-cpus=1", f"--autoscaling-config={config}"]
            self._environ = {
                "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FIRST_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FIRST_ID,
            }  # fmt: skip

    def start(self, **system: object) -> None:
        """`system`: settings of Ray's own. Returns once the head takes connections."""
        place = tempfile.mkdtemp(prefix="jr-")  # Ray's sockets need a short path
        program = Path(sys.executable).with_name("ray")
        environ = os.environ | QUIET | self._environ | {f"RAY_{name}": str(value) for name, value in system.items()}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [program, "start", "--head", "--block", f"--port={self.port}", "--node-ip-address=127.0.0.1",
                 "--include-dashboard=false", f"--object-store-memory={SMALL}", f"--temp-dir={place}",
                 *self._options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True)
        self._place = place
        deadline = time.monotonic() + START_S
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            assert time.monotonic() < deadline, self.log.read_text()[-2_000:]
            time.sleep(0.1)

    def said(self) -> str:
        """The last words of its autoscaler."""
        return Path(self._place, "session_latest", "logs", "monitor.log").read_text()[-2_000:]

    def kill(self) -> None:
        """Everything, the replicas' actors included; their commands are left to themselves."""
        self._process.kill()
        for one in psutil.process_iter(["cmdline"]):  # by its directory: nodes made on demand are nobody's children
            if any(self._place in word for word in one.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        self._process.wait(PATIENCE_S)
        shutil.rmtree(self._place, ignore_errors=True)


def _autoscaling(address: str, pools: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """For Ray's own stand-in of a cloud. By its class: the package lacks the file that goes with its name."""
    types = {
        name: {"resources": {"CPU": 2, "object_store_memory": SMALL}, "labels": {"pool": name}, "node_config": {},
               "min_workers": 0, "max_workers": 4, **fields}
        for name, fields in pools.items()
    }  # fmt: skip
    head = {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "test", "max_workers": 8, "idle_timeout_minutes": 0.05, "auth": {}, "head_node_type": HEAD_TYPE,
        "provider": {
            "type": "external", "disable_node_updaters": True, "launch_multiple": True, "head_node_id": FIRST_ID,
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
        },
        "available_node_types": {HEAD_TYPE: head, **types}, "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "initialization_commands": [], "setup_commands": [],
        "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip


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
        process.wait(PATIENCE_S)


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
