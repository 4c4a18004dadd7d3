"""The Kubernetes backend on many nodes: gangs beside plain pods of the same number, in the same run.

`KUBECONFIG=… python -m tests.benchmarks.kubernetes` needs a cluster with nodes of `tests.fake_nodes`, which runs beside
it, and prints one JSON line a figure. Plain pods are made by the same client with the same number of requests at a
time, and bound by kube-scheduler alone.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobsched.backends.kubernetes import KubernetesBackend
from jobsched.backends.kubernetes_api import AT_ONCE, Api
from jobsched.backends.kubernetes_watch import Informer
from jobsched.client.client import Client
from jobsched.spec.backends import BackendConfig
from jobsched.spec.backends import KubernetesBackend as Config
from jobsched.spec.server import ServerConfig
from jobsched.wiring import Server
from tests.fake_nodes import LABEL

GANGS = int(os.environ.get("GANGS", "100"))
SIZE = int(os.environ.get("SIZE", "16"))
TENANTS = int(os.environ.get("TENANTS", "20"))
"""Pods of two GPUs each that others make meanwhile."""
NAMESPACE = os.environ.get("BENCH_NAMESPACE", "default")
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
PATIENCE_S = 420.0
Json = dict[str, Any]


class Bound:
    """Counts pods that have a node."""

    def __init__(self, api: Api, selector: str) -> None:
        self.nodes: dict[str, tuple[str, int]] = {}
        self.made: dict[str, float] = {}
        """When it was first heard of."""
        self.informer = Informer(api, PODS, {"labelSelector": selector}, self._listed, self._heard)
        self.informer.start()
        self.informer.synced.wait(30)

    def _listed(self, found: list[Json]) -> None:
        for one in found:
            self._heard("ADDED", one)

    def _heard(self, kind: str, found: Json) -> None:
        name = found["metadata"]["name"]
        self.made.setdefault(name, time.monotonic())
        if kind == "DELETED":
            self.nodes.pop(name, None)
        elif node := found["spec"].get("nodeName"):
            asked = found["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
            self.nodes[name] = (node, int(asked))

    def until(self, count: int, begun: float) -> float:
        """Seconds until so many are bound."""
        while len(self.nodes) < count:
            assert time.monotonic() - begun < PATIENCE_S, f"{len(self.nodes)} of {count} bound"
            time.sleep(0.05)
        return time.monotonic() - begun

    def close(self) -> None:
        self.informer.close()


def say(name: str, value: float, unit: str, **more: object) -> None:
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, **more}), flush=True)


def a_pod(name: str, label: str, gpus: int = 1) -> Json:
    limits = {"nvidia.com/gpu": str(gpus)}
    return {
        "metadata": {"name": name, "labels": {"bench": label}},
        "spec": {"restartPolicy": "Never", "containers": [
            {"name": "c", "image": "localhost/none:1", "resources": {"limits": limits, "requests": {"cpu": "1"}}}]},
    }


def plain(api: Api) -> float:
    bound = Bound(api, "bench=plain")
    begun = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda i: api.create(PODS, a_pod(f"plain-{i}", "plain")), range(GANGS * SIZE)))
    took = bound.until(GANGS * SIZE, begun)
    say("plain pods made", max(bound.made.values()) - begun, "s")
    wipe(api, "bench=plain", lambda: not bound.nodes)
    bound.close()
    return took


def wipe(api: Api, selector: str, gone: Callable[[], bool]) -> None:
    api.delete(PODS, 0, selector)
    deadline = time.monotonic() + PATIENCE_S
    while not gone():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextmanager
def serving(home: Path) -> Iterator[Server]:
    kubernetes = Config.model_validate({
        "namespace": NAMESPACE, "image": "localhost/none:1", "instance": "bench", "working_dir": "image",
        "nodes": {LABEL: "true"}, "node_lost_after": "10m"})
    with Server(ServerConfig(home=str(home), backend=BackendConfig(kubernetes=kubernetes))) as server:
        yield server


def gangs(api: Api, server: Server, peer_s: float, tenants: int) -> None:
    """Until every replica is bound, while others' pods arrive; then all is cancelled."""
    name = f"gangs bound beside {tenants} pods of others" if tenants else "gangs bound"
    bound, others = Bound(api, "jobsched.dev/instance=bench"), Bound(api, "bench=tenant")
    client = Client(server.url, token=server.token)
    backend = server.controller._backend
    assert isinstance(backend, KubernetesBackend)
    backend.api.calls.clear()

    def arrive() -> None:
        for index in range(tenants):
            api.create(PODS, a_pod(f"tenant-{index}", "tenant", 2))
            time.sleep(0.3)

    spec = {"name": "gang", "checkpoint": {"grace": "1s"}, "array": f"0-{GANGS - 1}", "roles": {"worker": {
        "command": "sleep 600", "replicas": SIZE, "gpu": "any:1", "cpu": 1}}}
    begun, cpu = time.monotonic(), time.process_time()
    threading.Thread(target=arrive, daemon=True).start()
    jobs = client.submit(spec)
    took = bound.until(GANGS * SIZE, begun)
    others.until(tenants, begun)
    calls = dict(backend.api.calls)
    say(name, took, "s", ratio=round(took / peer_s, 3), peer=f"plain pods: {peer_s:.1f} s",
        cpu_s=round(time.process_time() - cpu, 1), made_s=round(max(bound.made.values()) - begun, 1),
        first_s=round(min(bound.made.values()) - begun, 1))
    say("requests per pod until bound", sum(calls.values()) / (GANGS * SIZE), "requests", calls=calls)
    on_node: dict[str, int] = {}
    for node, count in [*bound.nodes.values(), *others.nodes.values()]:
        on_node[node] = on_node.get(node, 0) + count
    say("most GPUs asked for on one node of 8", max(on_node.values()), "GPUs", tenants=len(others.nodes))
    say("memory of the server (with the bench)", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MiB",
        threads=threading.active_count())
    begun = time.monotonic()
    jobs.cancel()
    while bound.nodes:
        assert time.monotonic() - begun < PATIENCE_S, f"{len(bound.nodes)} are left"
        time.sleep(0.1)
    say("gangs gone", time.monotonic() - begun, "s")
    wipe(api, "bench=tenant", lambda: not others.nodes)
    bound.close()
    others.close()


def main() -> None:
    api = Api(Config(namespace=NAMESPACE))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, serving(Path(home)) as server:
        first = plain(api)
        say("plain pods bound", first, "s", pods=GANGS * SIZE)
        for tenants in dict.fromkeys((0, TENANTS)):
            gangs(api, server, first, tenants)


if __name__ == "__main__":
    main()
