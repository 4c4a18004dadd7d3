"""Nodes without machines, on a real API server: they stay ready, and what is bound to them "runs" at once.

Used by benchmarks and by tests with a real control plane; `python -m tests.fake_nodes NODES [GPUS]` keeps some until
it is interrupted. Everything is watched, nothing listed again: one request a pod, a tenth of one a node and second.
Where no kube-scheduler is, it binds pods itself (`binds`), by pinned node, labels and GPUs alone. A pod ends well after
the seconds that its annotation `fake/run-s` names.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from jobsched.backends.kubernetes_api import Api, Exists, Gone, Refused
from jobsched.backends.kubernetes_watch import Informer
from jobsched.errors import BackendUnreachable
from jobsched.spec.backends import KubernetesBackend

Json = dict[str, Any]
LABEL = "fake/node"
RUN_S = "fake/run-s"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
RENEW_S = 10.0
GPU = "nvidia.com/gpu"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class FakeNodes:
    """Close it; its nodes go with it unless told otherwise."""

    def __init__(self, api: Api, binds: bool = False, at_once: int = 8) -> None:
        self.api, self.names = api, dict[str, int]()
        """Node -> its GPUs."""
        self._binds = binds
        self._lock = threading.Lock()
        self._labels: dict[str, dict[str, str]] = {}
        self._pods: dict[str, Json] = {}
        self._seen: dict[str, str] = {}
        """uid -> what was done last."""
        self._taken: dict[str, tuple[str, int, bool]] = {}
        """uid -> (node, GPUs, whether it wants the node for itself), of pods that we bound or that are bound."""
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(at_once, "fake-pod")
        self._kubelets = ThreadPoolExecutor(4, "fake-kubelet")
        query = {} if binds else {"fieldSelector": "spec.nodeName!="}
        self._informer = Informer(api, "/api/v1/pods", query, self._listed, self._heard)
        self._nodes = Informer(api, "/api/v1/nodes", {"labelSelector": f"{LABEL}=true"},
                               lambda found: [self._heard_node("ADDED", one) for one in found] and None,
                               self._heard_node)
        self._informer.start()
        self._nodes.start()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def add(self, name: str, gpus: int = 8, labels: Mapping[str, str] | None = None) -> None:
        all_labels = {LABEL: "true", "kubernetes.io/hostname": name, "nvidia.com/gpu.product": "FAKE", **(labels or {})}
        with suppress(Exists):
            self.api.create("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node",
                                              "metadata": {"name": name, "labels": all_labels}})
        with self._lock:
            self.names[name], self._labels[name] = gpus, all_labels
        self._ready(name)
        self._lease(name)
        with self._lock:
            waiting = [one for one in self._pods.values() if not one["spec"].get("nodeName")]
        for pod in waiting:
            self._submit(pod)

    def remove(self, name: str) -> None:
        """As an autoscaler does: with whatever is on it."""
        with self._lock:
            self.names.pop(name, None)
            there = [one for one in self._pods.values() if one["spec"].get("nodeName") == name]
        for pod in there:
            self.api.delete(_path(pod), 0)
        self.api.delete(f"/api/v1/nodes/{name}")
        self.api.delete(f"{LEASES}/{name}")

    def close(self, keep: bool = False) -> None:
        self._closing.set()
        self._informer.close()
        self._nodes.close()
        self._kubelets.shutdown(wait=False, cancel_futures=True)
        if not keep:
            for name in list(self.names):
                with suppress(BackendUnreachable, Refused):
                    self.remove(name)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ready(self, name: str) -> None:
        has = {"cpu": "96", "memory": "1Ti", "pods": "110", "ephemeral-storage": "500Gi", GPU: str(self.names[name])}
        conditions = [
            {"type": kind, "status": status, "reason": "Fake", "message": "", "lastHeartbeatTime": now(),
             "lastTransitionTime": now()}
            for kind, status in (("Ready", "True"), ("MemoryPressure", "False"), ("DiskPressure", "False"))]
        self.api.patch(f"/api/v1/nodes/{name}/status", {"status": {
            "capacity": has, "allocatable": has, "conditions": conditions}})
        self.api.patch(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})

    # signs of life --------------------------------------------------------------------------------------------------

    def _lease(self, name: str) -> None:
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": at}
        try:
            self.api.patch(f"{LEASES}/{name}", {"spec": spec})
        except Gone:
            self.api.create(LEASES, {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                                     "metadata": {"name": name}, "spec": spec})

    def _renew(self) -> None:
        while not self._closing.is_set():
            begun = time.monotonic()
            for name in list(self.names):
                with suppress(RuntimeError):  # closed
                    self._kubelets.submit(self._live, name)
                self._closing.wait(RENEW_S / 2 / len(self.names))
            self._closing.wait(max(0.1, RENEW_S - (time.monotonic() - begun)))

    def _live(self, name: str) -> None:
        with suppress(BackendUnreachable, Refused, Gone, Exists):
            self._lease(name)

    def _heard_node(self, kind: str, node: Json) -> None:
        """On a busy machine the node controller may have given one up."""
        name = node["metadata"]["name"]
        if kind != "DELETED" and name in self.names and any(
                one["type"] == "Ready" and one["status"] != "True" for one in node["status"].get("conditions") or ()):
            with suppress(BackendUnreachable, Refused, Gone, Exists):
                self._ready(name)

    # pods -------------------------------------------------------------------------------------------------------------

    def _listed(self, found: list[Json]) -> None:
        for pod in found:
            self._heard("ADDED", pod)

    def _heard(self, kind: str, pod: Json) -> None:
        uid = pod["metadata"]["uid"]
        with self._lock:
            if kind == "DELETED":
                for known in (self._pods, self._seen, self._taken):
                    known.pop(uid, None)
                waiting = [one for one in self._pods.values() if not one["spec"].get("nodeName")]
            else:
                self._pods[uid] = pod
                waiting = [pod]
                if node := pod["spec"].get("nodeName"):
                    self._taken[uid] = (node, _gpus(pod), _alone(pod))
        for one in waiting:
            self._submit(one)

    def _submit(self, pod: Json) -> None:
        if what := self._wanted(pod):
            with suppress(RuntimeError):  # closed
                self._pool.submit(self._do, what, pod)

    def _wanted(self, pod: Json) -> str:
        """What is to be done with it now; each thing once."""
        uid, node, phase = pod["metadata"]["uid"], pod["spec"].get("nodeName"), pod["status"].get("phase")
        if node is None:
            what = "bind" if self._binds else ""
        elif node not in self.names:
            what = ""
        elif pod["metadata"].get("deletionTimestamp"):
            what = "delete"
        elif phase == "Pending":
            what = "run"
        else:
            what = ""
        with self._lock:
            if not what or (what != "bind" and self._seen.get(uid) == what):
                return ""
            self._seen[uid] = what
        return what

    def _do(self, what: str, pod: Json) -> None:
        with suppress(BackendUnreachable, Gone, Exists, Refused):
            match what:
                case "bind":
                    self._bind(pod)
                case "delete":
                    self.api.delete(_path(pod), 0)
                case "run":
                    self._tell(pod, "Running", {"running": {"startedAt": now()}})
                    if seconds := (pod["metadata"].get("annotations") or {}).get(RUN_S):
                        timer = threading.Timer(float(seconds), self._do, ("end", pod))
                        timer.daemon = True
                        timer.start()
                case _:
                    self._tell(pod, "Succeeded", {"terminated": {
                        "exitCode": 0, "reason": "Completed", "startedAt": now(), "finishedAt": now()}})

    def _tell(self, pod: Json, phase: str, state: Json) -> None:
        ready = phase == "Running"
        statuses = [{"name": one["name"], "image": one["image"], "imageID": "", "ready": ready, "started": ready,
                     "restartCount": 0, "state": state} for one in pod["spec"]["containers"]]
        body: Json = {"phase": phase, "containerStatuses": statuses}
        if ready:
            body |= {"startTime": now(), "podIP": "192.0.2.1", "podIPs": [{"ip": "192.0.2.1"}]}
        self.api.patch(f"{_path(pod)}/status", {"status": body})

    def _bind(self, pod: Json) -> None:
        uid = pod["metadata"]["uid"]
        with self._lock:
            if uid in self._taken or uid not in self._pods:
                return
            node = next((name for name in sorted(self.names) if self._fits(pod, name)), None)
            if node is None:
                return
            self._taken[uid] = (node, _gpus(pod), _alone(pod))
        self.api.create(f"{_path(pod)}/binding", {
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node}})

    def _fits(self, pod: Json, node: str) -> bool:
        affinity = pod["spec"].get("affinity") or {}
        terms = (affinity.get("nodeAffinity") or {}).get("requiredDuringSchedulingIgnoredDuringExecution") or {}
        pinned = [name for term in terms.get("nodeSelectorTerms") or () for one in term.get("matchFields") or ()
                  for name in one["values"]]
        labels = self._labels[node]
        wanted = pod["spec"].get("nodeSelector") or {}
        if (pinned and node not in pinned) or any(labels.get(key) != text for key, text in wanted.items()):
            return False
        there = [(gpus, alone) for name, gpus, alone in self._taken.values() if name == node]
        if _alone(pod) and any(alone for _, alone in there):
            return False
        return sum(gpus for gpus, _ in there) + _gpus(pod) <= self.names[node]


def _path(pod: Json) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _gpus(pod: Json) -> int:
    return sum(int(((one.get("resources") or {}).get("limits") or {}).get(GPU, 0)) for one in pod["spec"]["containers"])


def _alone(pod: Json) -> bool:
    return bool((pod["spec"].get("affinity") or {}).get("podAntiAffinity") or {})


def main() -> None:
    fleet = FakeNodes(Api(KubernetesBackend()))
    count, gpus = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8
    for index in range(count):
        fleet.add(f"gpu-{index:03d}", gpus, {"topology.kubernetes.io/zone": f"rack-{index // 4}"})
    print("nodes ready", count, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        fleet.close()


if __name__ == "__main__":
    main()
