"""A server with the rights of configs/manifests and no others, before a real API server with RBAC and the *restricted*
Pod Security of its namespace: a TrainingJob becomes pods, runs and ends. The test plays scheduler and kubelet."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

pytest.importorskip("kubernetes", reason="the package kubernetes is not installed")

from jobsched.backends.kubernetes_api import Api, Exists, Gone
from jobsched.spec.backends import KubernetesBackend
from tests.control_plane import MANIFESTS, Kubectl, cluster
from tests.operator.stage import cleared, serving, until

__all__ = ["cluster"]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1_200)]
Json = dict[str, Any]
NODE = "rights-node"
PODS = "/api/v1/namespaces/jobsched/pods"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


class Kubelet:
    """One node: binds every pod to itself, says that it runs, and that it ended once `done` is set."""

    def __init__(self, kubeconfig: str) -> None:
        self.api = Api(KubernetesBackend(kubeconfig=kubeconfig))
        self.done, self._closing = threading.Event(), threading.Event()
        self.bound: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Kubelet:
        with suppress(Exists):
            self.api.create("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {
                "name": NODE, "labels": {"jobsched.dev/pool": "gpu", "kubernetes.io/hostname": NODE,
                                         "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}}})
        has = {"cpu": "8", "memory": "32Gi", "pods": "110", "nvidia.com/gpu": "8"}
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
                 "lastHeartbeatTime": self._now(), "lastTransitionTime": self._now()}
        self.api.patch(f"/api/v1/nodes/{NODE}/status", {"status": {
            "capacity": has, "allocatable": has, "conditions": [ready]}})
        self._renew()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(10)
        for pod in self.api.get(PODS)["items"]:
            self.api.delete(f"{PODS}/{pod['metadata']['name']}", 0)
        self.api.delete(f"/api/v1/nodes/{NODE}")
        self.api.delete(f"{LEASES}/{NODE}")

    @staticmethod
    def _now() -> str:
        return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def _renew(self) -> None:
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": NODE},
                "spec": {"holderIdentity": NODE, "leaseDurationSeconds": 40, "renewTime": self._now()}}
        try:
            self.api.create(LEASES, body)
        except Exists:
            self.api.patch(f"{LEASES}/{NODE}", {"spec": {"renewTime": self._now()}})

    def _run(self) -> None:
        while not self._closing.wait(0.5):
            self._renew()
            for pod in self.api.get(PODS)["items"]:
                with suppress(Gone, Exists):
                    self._see_to(pod)

    def _see_to(self, pod: Json) -> None:
        name, phase = pod["metadata"]["name"], pod["status"].get("phase")
        if pod["metadata"].get("deletionTimestamp"):
            self.api.delete(f"{PODS}/{name}", 0)
        elif not pod["spec"].get("nodeName"):
            self.api.create(f"{PODS}/{name}/binding", {
                "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
                "target": {"apiVersion": "v1", "kind": "Node", "name": NODE}})
            self.bound.add(name)
        elif phase == "Pending":
            self._tell(pod, "Running", {"running": {"startedAt": self._now()[:19] + "Z"}})
        elif phase == "Running" and self.done.is_set():
            self._tell(pod, "Succeeded", {"terminated": {
                "exitCode": 0, "startedAt": self._now()[:19] + "Z", "finishedAt": self._now()[:19] + "Z"}})

    def _tell(self, pod: Json, phase: str, state: Json) -> None:
        container = pod["spec"]["containers"][0]
        self.api.patch(f"{PODS}/{pod['metadata']['name']}/status", {"status": {
            "phase": phase, "hostIP": "127.0.0.1", "podIP": "127.0.0.1", "startTime": self._now()[:19] + "Z",
            "containerStatuses": [{"name": container["name"], "image": container["image"], "imageID": "x",
                                   "containerID": "x://1", "ready": phase == "Running", "restartCount": 0,
                                   "started": phase == "Running", "state": state}]}})


@pytest.fixture
def limited(cluster: Kubectl, tmp_path: Path) -> str:
    """A kubeconfig with the token of the server's account."""
    done = cluster.run("create", "namespace", "kube-node-lease")
    assert done.returncode == 0 or "AlreadyExists" in done.stderr
    for name in ("namespace.yaml", "rbac.yaml"):
        cluster("apply", "--server-side", "--force-conflicts", "-f", str(MANIFESTS / "base" / name))
    token = cluster("create", "token", "jobsched", "-n", "jobsched").strip()
    config = YAML(typ="safe").load(cluster("config", "view", "--minify", "--flatten", "--raw"))
    config["users"][0]["user"] = {"token": token}
    path = tmp_path / "limited"
    path.write_text(json.dumps(config))
    return str(path)


def test_a_job_runs_with_these_rights_alone(cluster: Kubectl, limited: str, tmp_path: Path) -> None:
    kubectl, home = cluster, tmp_path / "home"
    job = {"apiVersion": "jobsched.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": "rights"}, "spec": {
        "roles": {"worker": {"command": "true", "replicas": 2, "gpu": "h100:2", "cpu": "100m", "memory": "64Mi"}}}}
    backend = {"kubernetes": {"kubeconfig": limited, "namespace": "jobsched", "instance": "main",
                              "image": "example/train:1", "working_dir": "image",
                              "service_account": "jobsched-replica", "nodes": {"jobsched.dev/pool": "gpu"}}}
    objects = {"kubeconfig": limited, "namespace": "jobsched"}

    def status(path: str) -> str:
        return kubectl("get", "tj", "rights", "-n", "jobsched", "-o", f"jsonpath={{.status.{path}}}")

    try:
        with Kubelet(cluster.kubeconfig) as kubelet, serving(home, limited, backend=backend,
                                                             kubernetes_objects=objects):
            kubectl("apply", "-n", "jobsched", "-f", "-", given=job)
            until(lambda: status("ready") == "2/2", lambda: status("conditions"))
            assert len(kubelet.bound) == 2
            services = kubectl("get", "services", "-n", "jobsched", "-l", "jobsched.dev/instance=main", "-o", "name")
            assert len(services.split()) == 1
            kubelet.done.set()
            until(lambda: status("phase") == "SUCCEEDED", lambda: status("conditions"))
            until(lambda: "AttemptStarted" in kubectl(
                "get", "events", "-n", "jobsched", "-o", "jsonpath={.items[*].reason}"))
            kubectl("delete", "tj", "rights", "-n", "jobsched", "--timeout=240s")
    finally:
        cleared(home)
