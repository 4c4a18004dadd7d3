"""What Ray's autoscaler is asked for. With a real one: `tests/e2e/test_ray.py`."""

from __future__ import annotations

import pytest

from jobsched.backends import ray_pools
from jobsched.backends.ray import RayBackend
from jobsched.backends.ray_pools import Pools, request
from jobsched.core.pools import Demand, NodePool
from jobsched.core.resources import NodeName
from jobsched.ports import Provisioner

GPU = NodePool("a100", 96_000, 1 << 40, "a100-80gb", 8, labels=(("pool", "a100"), ("zone", "b")), max=4)
CPU = NodePool("cpu", 16_000, 1 << 36, labels=(("pool", "cpu"),), max=4)


def test_a_bundle_for_each_node_and_its_labels_by_the_names_that_ray_knows() -> None:
    assert request([Demand(GPU, 2), Demand(CPU, 1), Demand(GPU, 0)]) == {
        "bundles": [{"CPU": 96, "GPU": 8}, {"CPU": 96, "GPU": 8}, {"CPU": 16}],
        "bundle_label_selectors": [
            {"pool": "a100", "ray.io/availability-zone": "b"}, {"pool": "a100", "ray.io/availability-zone": "b"},
            {"pool": "cpu"},
        ],
    }  # fmt: skip
    assert request([Demand(GPU, 0)]) == {"bundles": [], "bundle_label_selectors": []}


def test_the_backend_can_have_nodes_made() -> None:
    """`wiring` refuses pools otherwise."""
    assert issubclass(RayBackend, Provisioner)


def test_it_is_asked_once_and_again_while_nodes_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = Pools()
    assert pools.step([]) is None, "nobody has pools: what others asked for stays"
    pools.want([Demand(CPU, 2)])
    assert pools.step([]) == request([Demand(CPU, 2)])
    assert pools.step([CPU.node(0)]) is None
    monkeypatch.setattr(ray_pools, "AGAIN_S", 0.0)
    assert pools.step([CPU.node(0)]), "somebody else may have replaced it"
    assert pools.step([CPU.node(0), GPU.node(1)])
    assert pools.step([CPU.node(0), CPU.node(1)]) is None
    pools.want([Demand(CPU, 2, release=(NodeName("cpu-1"),))])
    assert pools.step([CPU.node(0), CPU.node(1)]), "one of them is to go"
    pools.want([Demand(CPU, 0)])
    assert pools.step([CPU.node(0)]) == request([])
    assert pools.step([CPU.node(0)]) is None
    pools.ask_anew()
    assert pools.step([CPU.node(0)]) == request([])
