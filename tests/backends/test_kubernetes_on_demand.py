"""Nodes on demand on a real API server: an autoscaler's stand-in sees what jobsched asks for and adds fake nodes.

With the rights of the manifests and in their restricted namespace. Where only the API server is real, the stand-in
binds pods as well.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="the package kubernetes is not installed")

from jobsched.backends.kubernetes_api import Api, Exists, Gone, Refused
from jobsched.backends.kubernetes_pools import GROUP, OWNER, POOL
from jobsched.client.client import Client
from jobsched.core.job import Phase
from jobsched.errors import BackendUnreachable
from jobsched.spec.backends import KubernetesBackend
from tests.control_plane import Kubectl, cluster
from tests.fake_nodes import FakeNodes
from tests.operator.stage import serving, until
from tests.operator.test_rights import limited

__all__ = ["cluster", "limited"]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1_200)]
Json = dict[str, Any]
SPACE = "/api/v1/namespaces/jobsched"
REQUESTS = f"/apis/{GROUP}/v1/namespaces/jobsched/provisioningrequests"
CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
NAME = f"provisioningrequests.{GROUP}"
DEFINITION = {
    "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
    "metadata": {"name": NAME,
                 "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes/autoscaler/pull/5848"}},
    "spec": {
        "group": GROUP, "scope": "Namespaced",
        "names": {"kind": "ProvisioningRequest", "listKind": "ProvisioningRequestList",
                  "plural": "provisioningrequests", "singular": "provisioningrequest"},
        "versions": [{"name": "v1", "served": True, "storage": True, "subresources": {"status": {}},
                      "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": OPEN, "status": OPEN}}}}],
    },
}  # fmt: skip


class Autoscaler:
    """Adds a node for each that is asked of pool `steady`, never one of pool `spot`; removes those that have been empty
    for `UNUSED_S`. The last of what is asked comes only once `rest` is set."""

    UNUSED_S = 6.0

    def __init__(self, api: Api, nodes: FakeNodes, requests: bool) -> None:
        self.rest = threading.Event()
        self.asked: list[tuple[str, int]] = []
        """(pool, nodes), whenever that changed."""
        self._api, self._nodes, self._requests = api, nodes, requests
        self._made = 0
        self._empty: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._closing.wait(0.3):
            try:
                self._step()
            except (BackendUnreachable, Gone, Refused, Exists):
                continue  # a request went while we looked

    def _step(self) -> None:
        wanted = self._wanted()
        for pool in ("spot", "steady"):
            if [count for name, count in self.asked if name == pool][-1:] != [wanted.get(pool, 0)]:
                self.asked.append((pool, wanted.get(pool, 0)))
        missing = wanted.get("steady", 0) - (len(self._nodes.names) if self._requests else 0)
        if missing > 1 or (missing > 0 and self.rest.is_set()):
            self._nodes.add(f"steady-{self._made}", labels={"pool": "steady"})
            self._made += 1
        pods = self._api.get(f"{SPACE}/pods")["items"]
        used = {one["spec"].get("nodeName") for one in pods}
        for name in list(self._nodes.names):
            since = self._empty.setdefault(name, time.monotonic())
            if name in used or wanted:
                del self._empty[name]
            elif time.monotonic() - since >= self.UNUSED_S:
                self._nodes.remove(name)

    def _wanted(self) -> dict[str, int]:
        found: dict[str, int] = {}
        if self._requests:
            for one in self._api.get(REQUESTS)["items"]:
                [pods] = one["spec"]["podSets"]
                template = self._api.get(f"{SPACE}/podtemplates/{pods['podTemplateRef']['name']}")["template"]
                found[template["spec"]["nodeSelector"]["pool"]] = pods["count"]
            return found
        for pod in self._api.get(f"{SPACE}/pods", {"labelSelector": OWNER})["items"]:
            if not pod["spec"].get("nodeName"):
                pool = pod["metadata"]["labels"][POOL]
                found[pool] = found.get(pool, 0) + 1
        return found


@pytest.fixture(params=["placeholders", "requests"])
def autoscaler(cluster: Kubectl, limited: str, request: pytest.FixtureRequest) -> Iterator[Autoscaler]:
    api = Api(KubernetesBackend(kubeconfig=cluster.kubeconfig))
    requests = request.param == "requests"
    if requests:
        api.create(CRD, DEFINITION)
        until(lambda: _served(api))
    nodes = FakeNodes(api, binds=os.environ.get("USE_EXISTING_CLUSTER") != "true")
    autoscaler = Autoscaler(api, nodes, requests)
    try:
        yield autoscaler
    finally:
        autoscaler.close()
        api.delete(f"{SPACE}/pods", 0, "app.kubernetes.io/managed-by=jobsched")
        nodes.close()
        if requests:
            api.delete(f"{CRD}/{NAME}")
        api.close()


def _served(api: Api) -> bool:
    try:
        return bool(api.get(REQUESTS))
    except (Gone, BackendUnreachable):  # 429 while its storage is made
        return False


def served(home: Path, kubeconfig: str) -> Any:
    pools = [
        {"name": "steady", "gpus": "fake:8", "cpu": 96, "memory": "1Ti", "max": 4, "price": 30, "delay": "2m",
         "idle": "2s"},
        {"name": "spot", "gpus": "fake:8", "cpu": 96, "memory": "1Ti", "max": 4, "price": 12, "delay": "1s",
         "idle": "2s"},
    ]  # fmt: skip
    backend = {"kubernetes": {"kubeconfig": kubeconfig, "namespace": "jobsched", "instance": "main",
                              "image": "example/train:1", "working_dir": "image", "node_lost_after": "10m",
                              "service_account": "jobsched-replica", "nodes": {"fake/node": "true"}}}
    return serving(home, kubeconfig, backend=backend, pools=pools, kubernetes_objects=None)


def test_nodes_come_whole_or_from_the_next_pool_and_go_when_idle(
    autoscaler: Autoscaler, limited: str, tmp_path: Path
) -> None:
    with served(tmp_path / "home", limited) as server, Client(server.url, token=server.token) as client:
        job = client.submit({"name": "gang", "checkpoint": {"grace": "1s"}, "roles": {"worker": {
            "command": "sleep 600", "replicas": 2, "gpu": "fake:8", "cpu": 1, "memory": "64Mi"}}})
        until(lambda: ("spot", 2) in autoscaler.asked, lambda: f"{autoscaler.asked} {job.why()}")
        until(lambda: ("steady", 2) in autoscaler.asked, lambda: f"{autoscaler.asked} {job.why()}")
        until(lambda: autoscaler.asked[autoscaler.asked.index(("spot", 2)) :].count(("spot", 0)) == 1,
              lambda: f"what was asked of the pool that does not deliver is taken back: {autoscaler.asked}")
        until(lambda: len(client.nodes()) == 1, lambda: str(client.nodes()))
        told = str(job.refresh().why())
        assert "of pool steady, asked" in told, told
        time.sleep(1.5)
        assert job.refresh().state is Phase.QUEUED, "a gang starts whole"
        autoscaler.rest.set()
        job.wait("running", timeout=240)
        assert {str(one.node) for one in job.refresh().members} == {"steady-0", "steady-1"}
        until(lambda: autoscaler.asked[-1] == ("steady", 0), lambda: str(autoscaler.asked))
        job.cancel().wait(timeout=240)
        until(lambda: [one for one in client.nodes() if one.cordon is not None],
              lambda: f"idle nodes are let go, so nothing is bound there: {client.nodes()}")
        until(lambda: {one.state for one in client.nodes()} == {"lost"},
              lambda: f"and the autoscaler takes them: {client.nodes()}")
        assert autoscaler.asked[-1] == ("steady", 0), "nothing is asked for nobody"
