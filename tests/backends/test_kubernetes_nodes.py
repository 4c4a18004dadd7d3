"""Node objects of several clouds as nodes, and what pods ask for."""

from __future__ import annotations

from typing import Any

import pytest

from jobsched.backends import kubernetes_nodes as nodes
from jobsched.core.resources import GpuShare
from jobsched.spec.backends import KubernetesBackend

CONFIG = KubernetesBackend()
GIB = 2**30


def an_object(labels: dict[str, str] | None = None, taints: list[dict[str, str]] | None = None, *,
              ready: str = "True", unschedulable: bool = False, **allocatable: str) -> dict[str, Any]:
    return {
        "metadata": {"name": "n1", "labels": labels or {}},
        "spec": {"taints": taints or [], "unschedulable": unschedulable},
        "status": {"allocatable": {"cpu": "7910m", "memory": "31Gi", **allocatable},
                   "conditions": [{"type": "Ready", "status": ready, "message": "kubelet stopped posting"}],
                   "addresses": [{"type": "InternalIP", "address": "10.0.0.7"}]},
    }


@pytest.mark.parametrize(("labels", "kind", "gib"), [
    ({"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.memory": "81920"}, "h100-80gb", 80),
    ({"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "nvidia.com/gpu.memory": "5120"},
     "a100-40gb:1g.5gb", 5),
    ({"nvidia.com/gpu.product": "Tesla-T4-SHARED", "nvidia.com/gpu.memory": "15360"}, "t4-16gb:shared", 15),
    ({"cloud.google.com/gke-accelerator": "nvidia-tesla-t4"}, "t4-16gb", 16),
    ({"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}, "h100-80gb", 80),
    ({"cloud.google.com/gke-accelerator": "nvidia-tesla-a100", "cloud.google.com/gke-gpu-partition-size": "1g.5gb"},
     "a100-40gb:1g.5gb", 5),
    ({"karpenter.k8s.aws/instance-gpu-name": "a10g", "karpenter.k8s.aws/instance-gpu-memory": "24576"},
     "a10g-24gb", 24),
    ({"k8s.amazonaws.com/accelerator": "nvidia-tesla-v100"}, "v100-16gb", 16),
    ({"node.kubernetes.io/instance-type": "p4d.24xlarge"}, "a100-40gb", 40),
    ({"node.kubernetes.io/instance-type": "Standard_NC24ads_A100_v4"}, "a100-80gb", 80),
    ({"node.kubernetes.io/instance-type": "Standard_ND96isr_H100_v5"}, "h100-80gb", 80),
    ({"node.kubernetes.io/instance-type": "Standard_ND96asr_v4"}, "a100-40gb", 40),
    ({"node.kubernetes.io/instance-type": "Standard_ND96isr_MI300X_v5"}, "mi300x-192gb", 192),
    ({"amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM", "amd.com/gpu.vram": "192G"}, "mi300x-192gb", 192),
    ({"node.kubernetes.io/instance-type": "m5.large"}, "gpu", 0),
    ({}, "gpu", 0),
])
def test_kinds(labels: dict[str, str], kind: str, gib: int) -> None:
    assert nodes.kind_of(labels) == (kind, gib * GIB)


def test_capacity_domains_and_taints() -> None:
    node = nodes.node_of(an_object(
        {"topology.kubernetes.io/zone": "eu-1a", "nvidia.com/gpu.clique": "c7", "pool": "a"},
        [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
         {"key": "team", "value": "a", "effect": "NoExecute"}, {"key": "soft", "effect": "PreferNoSchedule"},
         {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]), CONFIG, ())
    assert (node.cpu_milli, node.memory_bytes, node.address) == (7_910, 31 * GIB, "10.0.0.7")
    assert [node.label(name) for name in ("zone", "nvlink", "rack", "pool")] == ["eu-1a", "c7", "", "a"]
    assert node.taints == ("team=a",)
    assert node.ready


def test_mig_slices_and_shares() -> None:
    labels = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB", "nvidia.com/gpu.memory": "40960",
              "nvidia.com/mig-1g.5gb.memory": "4864"}
    node = nodes.node_of(an_object(labels, **{"nvidia.com/mig-1g.5gb": "3", "nvidia.com/gpu": "1"}), CONFIG, ())
    assert [(gpu.id, gpu.kind) for gpu in node.gpus] == [
        ("n1/gpu-0", "a100-40gb"), ("n1/mig-1g.5gb-0", "a100-40gb:1g.5gb"), ("n1/mig-1g.5gb-1", "a100-40gb:1g.5gb"),
        ("n1/mig-1g.5gb-2", "a100-40gb:1g.5gb")]
    assert node.gpus[1].memory_bytes == 4864 << 20
    shared = KubernetesBackend.model_validate({"gpus": [{"resource": "nvidia.com/gpu.shared", "per_gpu": 4}]})
    found = an_object(labels, **{"nvidia.com/gpu.shared": "8"})
    node = nodes.node_of(found, shared, ())
    assert [(gpu.id, gpu.kind) for gpu in node.gpus] == [
        ("n1/gpu.shared-0", "a100-40gb:shared"), ("n1/gpu.shared-1", "a100-40gb:shared")]
    stock = nodes.resource_of("n1/gpu.shared-1", found, shared)
    assert stock is not None
    assert nodes.units_for([GpuShare(node.gpus[0].id, 250)], stock) == 1
    assert nodes.units_for([GpuShare(node.gpus[0].id, 500)], stock) is None


@pytest.mark.parametrize(("fields", "text"), [
    ({"ready": "Unknown"}, "kubelet stopped posting"), ({"unschedulable": True}, "cordoned"),
])
def test_nodes_that_take_nothing_new(fields: dict[str, Any], text: str) -> None:
    node = nodes.node_of(an_object(**fields), CONFIG, ())
    assert not node.ready
    assert text in node.message


@pytest.mark.parametrize(("text", "number"), [
    ("500m", 0.5), ("4", 4), ("16Gi", 16 * GIB), ("1e3", 1_000), ("129M", 129e6), ("1.5Ki", 1_536), ("", 0), ("x", 0),
])
def test_quantities(text: str, number: float) -> None:
    assert nodes.amount(text) == number


def test_what_a_pod_asks_for_is_what_the_scheduler_counts() -> None:
    def asks(cpu: str, gpus: int = 0, **fields: Any) -> dict[str, Any]:
        limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
        return {"resources": {"requests": {"cpu": cpu}, "limits": limits}} | fields

    pod = {"spec": {
        "nodeName": "n1", "overhead": {"cpu": "50m"}, "containers": [asks("1", 2), asks("250m")],
        "initContainers": [asks("100m", restartPolicy="Always"), asks("3")]}, "status": {"phase": "Running"}}
    use = nodes.use_of(pod)
    assert use is not None
    assert (use.cpu_milli, use.devices) == (3_150, (("nvidia.com/gpu", 2),))
    assert nodes.use_of(pod | {"status": {"phase": "Succeeded"}}) is None
    assert nodes.use_of({"spec": {"containers": []}, "status": {}}) is None


def test_others_get_the_last_gpus_that_are_not_ours() -> None:
    use = nodes.Use("n1", 0, 0, (("nvidia.com/gpu", 2),))
    node = nodes.node_of(an_object(**{"nvidia.com/gpu": "4"}), CONFIG, [use], held=frozenset({"n1/gpu-3"}))
    assert node.foreign_gpus == (GpuShare(node.gpus[1].id), GpuShare(node.gpus[2].id))
