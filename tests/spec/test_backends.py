from __future__ import annotations

import pytest
from pydantic import ValidationError

from jobsched.spec.backends import GpuStock, PortRange, VirtualNodes
from jobsched.spec.server import ServerConfig


def test_virtual_nodes() -> None:
    nodes = VirtualNodes.model_validate(
        {"count": 2, "name_prefix": "gpu", "gpus": ["sim-gpu:8", {"kind": "h100-80gb", "count": 2}]}
    )
    assert nodes.names == ("gpu-0", "gpu-1")
    assert nodes.gpus == (GpuStock(kind="sim-gpu", count=8), GpuStock(kind="h100-80gb", count=2))
    assert VirtualNodes.model_validate({"gpus": "h100-80gb:1g.10gb"}).gpus == (
        GpuStock(kind="h100-80gb:1g.10gb", count=1),
    )


@pytest.mark.parametrize(
    ("local", "complaint"),
    [
        ({"virtual_nodes": [{"count": 2}, {"count": 1}]}, "share names"),
        ({"virtual_nodes": [{"count": 0}]}, "greater than or equal"),
        ({"virtual_nodes": [{"gpus": "Sim GPU:8"}]}, "not a GPU kind"),
        ({"ports": "30000-40000"}, "outgoing"),
        ({"ports": "30000-30010"}, "at least 100"),
        ({"ports": "80-200"}, "greater than or equal"),
        ({"ports": "many"}, "not a range"),
        ({"limits": "cgroups"}, "cgroup"),
        ({"preload": ["a b"]}, "Python module"),
        ({"logs": {"size": "1"}}, "4096"),
    ],
)
def test_backends_that_cannot_be(local: object, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ServerConfig.model_validate({"backend": {"local": local}})


@pytest.mark.parametrize(
    ("ray", "complaint"),
    [
        ({"address": "ray://head:10001"}, "pattern"),
        ({"gpu_kinds": {"A100": "A100 80"}}, "not a GPU kind"),
        ({"checkpoints": "here"}, "pattern"),
        ({"bind_timeout": "1ms"}, "1000"),
    ],
)
def test_ray_clusters_that_cannot_be(ray: object, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ServerConfig.model_validate({"backend": {"ray": ray}})


def test_port_ranges() -> None:
    assert PortRange.model_validate("20000 - 21000") == PortRange(first=20_000, last=21_000)
