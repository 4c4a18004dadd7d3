"""Nodes on demand in Kubernetes: what autoscalers are shown, on a fake API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="the package kubernetes is not installed")

from jobsched.backends import kubernetes_pools as pools
from jobsched.backends.kubernetes import KubernetesBackend
from jobsched.backends.kubernetes_render import Site
from jobsched.core.pools import Demand, NodePool
from jobsched.spec.backends import KubernetesBackend as Config
from tests.backends import golden
from tests.backends.kubernetes_fake import FakeCluster, until
from tests.contracts.backend import Watcher

pytestmark = pytest.mark.e2e

POOL = NodePool(
    "big-h100", 16_000, 64 << 30, "h100-80gb", 8, 80 << 30, labels=(("pool", "big"),),
    taints=("team=vision", "spot"), max=4)  # fmt: skip
SITE = Site("abc", "default", Config.model_validate({}))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[FakeCluster]:
    cluster = FakeCluster(node_count=1)
    yield cluster
    cluster.close()


@pytest.fixture
def backend(cluster: FakeCluster, tmp_path: Path) -> Iterator[KubernetesBackend]:
    config = Config.model_validate({"kubeconfig": cluster.kubeconfig(tmp_path / "kubeconfig"), "instance": "abc"})
    backend = KubernetesBackend(tmp_path / "home", config)
    yield backend
    backend.close()


def made(cluster: FakeCluster, resource: str) -> dict[str, Any]:
    with cluster.news:
        return {name: one for (_, name), one in cluster.objects.get(resource, {}).items()}


def add(cluster: FakeCluster, name: str) -> None:
    cluster.add_node(name, gpus=8)
    cluster.change("nodes", "", name, lambda node: node["metadata"]["labels"].update(pool="big"))


def test_rendered_requests() -> None:
    golden.check("kubernetes_placeholder", pools.placeholder(SITE, POOL, 0))
    golden.check("kubernetes_pod_template", pools.template(SITE, POOL, 2))
    golden.check("kubernetes_provisioning_request", pools.provisioning_request(SITE, POOL, 3, 2, "v1"))


def test_placeholders_wait_for_a_node_each_and_go_when_all_are_there(
    cluster: FakeCluster, backend: KubernetesBackend
) -> None:
    backend.provision([Demand(POOL, 2)])
    until(lambda: len(made(cluster, "pods")) == 2)
    assert sorted(made(cluster, "pods")) == ["js-abc-pool-big-h100-0", "js-abc-pool-big-h100-1"]
    add(cluster, "n1")
    until(lambda: {one["spec"].get("nodeName") for one in made(cluster, "pods").values()} == {None, "n1"})
    add(cluster, "n2")
    until(lambda: not made(cluster, "pods"))
    watcher = Watcher(backend)
    watcher.until(lambda s: [n.foreign.cpu_milli for n in s.nodes.values()] == [0, 0, 0])


def test_what_is_not_wanted_any_more_goes(cluster: FakeCluster, backend: KubernetesBackend) -> None:
    backend.provision([Demand(POOL, 3)])
    until(lambda: len(made(cluster, "pods")) == 3)
    backend.provision([Demand(POOL, 1)])
    until(lambda: len(made(cluster, "pods")) == 1)
    backend.provision([Demand(POOL, 0)])
    until(lambda: not made(cluster, "pods"))


def test_a_provisioning_request_asks_for_all_or_nothing_where_the_cluster_serves_it(
    cluster: FakeCluster, backend: KubernetesBackend
) -> None:
    cluster.serve_group(pools.GROUP, "v1beta1")
    backend.provision([Demand(POOL, 2)])
    until(lambda: made(cluster, "provisioningrequests"))
    (request,) = made(cluster, "provisioningrequests").values()
    assert request["apiVersion"] == "autoscaling.x-k8s.io/v1beta1"
    assert request["spec"]["podSets"] == [{"count": 2, "podTemplateRef": {"name": "js-abc-pool-big-h100-2"}}]
    assert list(made(cluster, "podtemplates")) == ["js-abc-pool-big-h100-2"]
    assert made(cluster, "pods") == {}
    for name in ("n1", "n2"):
        add(cluster, name)
    until(lambda: not made(cluster, "provisioningrequests") and not made(cluster, "podtemplates"))
