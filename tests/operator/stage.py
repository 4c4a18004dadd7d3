"""A server with virtual nodes that follows the objects of an API server, fake or real, for tests of the operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobsched.backends.kubernetes_api import Api, Gone
from jobsched.cli.demo import clear_away
from jobsched.load import load_server_config
from jobsched.spec.backends import KubernetesBackend
from jobsched.wiring import Server
from tests.ports import port_range

Json = dict[str, Any]
PATIENCE_S = 240.0
JOBS = "/apis/jobsched.dev/v1alpha1/namespaces/default/trainingjobs"
QUEUES = "/apis/jobsched.dev/v1alpha1/namespaces/default/trainingqueues"


@contextmanager
def serving(home: Path, kubeconfig: str, **fields: object) -> Iterator[Server]:
    """A server with two virtual nodes of four simulated GPUs each."""
    config = load_server_config({
        "home": str(home), "timers": {"longest_wait": "200ms"},
        "backend": {"local": {"virtual_nodes": [{"count": 2, "gpus": "sim-gpu:4"}], "ports": port_range()}},
        "kubernetes_objects": {"kubeconfig": kubeconfig, "namespace": "default", "directory": str(home)},
    } | fields)  # fmt: skip
    with Server(config) as server:
        yield server


class Objects:
    """TrainingJobs and TrainingQueues, as kubectl would handle them."""

    def __init__(self, kubeconfig: str) -> None:
        self.api = Api(KubernetesBackend(kubeconfig=kubeconfig, namespace="default"))

    def apply(self, name: str, spec: Json, path: str = JOBS, **metadata: Any) -> Json:
        kind = "TrainingJob" if path == JOBS else "TrainingQueue"
        return self.api.create(path, {"apiVersion": "jobsched.dev/v1alpha1", "kind": kind,
                                      "metadata": {"name": name} | metadata, "spec": spec})

    def edit(self, name: str, spec: Json, path: str = JOBS) -> None:
        self.api.patch(f"{path}/{name}", {"spec": spec})

    def get(self, name: str, path: str = JOBS) -> Json | None:
        try:
            return self.api.get(f"{path}/{name}")
        except Gone:
            return None

    def status(self, name: str, path: str = JOBS) -> Json:
        return dict((self.get(name, path) or {}).get("status") or {})

    def condition(self, name: str, kind: str, path: str = JOBS) -> Json:
        found = self.status(name, path).get("conditions", [])
        return next((one for one in found if one["type"] == kind), {})

    def events(self, name: str) -> list[Json]:
        items = self.api.get("/api/v1/namespaces/default/events")["items"]
        return [one for one in items if one["involvedObject"]["name"] == name]

    def delete(self, name: str, path: str = JOBS) -> None:
        self.api.delete(f"{path}/{name}")

    def await_phase(self, name: str, *phases: str) -> Json:
        until(lambda: self.status(name).get("phase") in phases, lambda: f"{name}: {self.get(name)}")
        return self.status(name)


def until(holds: Callable[[], object], said: Callable[[], str] = lambda: "it did not come to pass") -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, said()
        time.sleep(0.05)


def cleared(home: Path) -> None:
    assert clear_away(home) == []
