"""Virtual nodes, this machine, and the config that asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobsched.backends import registry
from jobsched.backends.gpus import Inventory, Ours, nobody
from jobsched.backends.local_nodes import Machine, VirtualGroup, virtual_nodes
from jobsched.core.node import Gpu
from jobsched.core.resources import GpuId, GpuShare
from jobsched.errors import MissingExtra
from jobsched.spec.backends import BackendConfig
from tests.backends.conftest import LocalEngine


def test_virtual_nodes_share_the_ports_and_have_gpus_of_their_own() -> None:
    nodes = virtual_nodes([VirtualGroup(3, "a", gpus=(("sim-gpu", 2),)), VirtualGroup(1, "b")], 20_000, 20_402)
    assert [node.name for node in nodes] == ["a-0", "a-1", "a-2", "b-0"]
    taken = [set(range(node.port_lo, node.port_hi + 1)) for node in nodes]
    assert [len(ports) for ports in taken] == [100] * 4
    assert set.union(*taken) <= set(range(20_000, 20_403))
    assert len(set.union(*taken)) == 400
    assert len({gpu.id for node in nodes for gpu in node.gpus}) == 6


def test_too_few_ports_are_refused() -> None:
    with pytest.raises(ValueError, match="more ports"):
        virtual_nodes([VirtualGroup(10)], 20_000, 20_008)


def test_the_machine_has_its_cpus_memory_and_gpus_and_looks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [100.0], 0
    monkeypatch.setattr("jobsched.backends.local_nodes.time.monotonic", lambda: now[0])
    gpu = Gpu(GpuId("GPU-1"), "t4-16gb")

    def inventory(ours: Ours) -> Inventory:
        nonlocal looks
        looks += 1
        return Inventory((gpu,), () if ours(7) else (GpuShare(gpu.id),))

    machine = Machine("box", inventory=inventory)
    (node,) = machine({7}.__contains__)
    now[0] += 5
    assert machine(nobody) == (node,)
    assert looks == 1
    assert node.cpu_milli >= 1_000
    assert node.memory_bytes > 2**27
    assert [gpu.kind for gpu in node.gpus] == ["t4-16gb"]
    now[0] += 6
    assert machine(nobody)[0].foreign_gpus == (GpuShare(gpu.id),)
    now[0] += 1.5  # whoever else is there may have gone by now
    assert machine({7}.__contains__) == (node,)
    assert looks == 3


def test_a_config_becomes_a_backend(tmp_path: Path) -> None:
    config = BackendConfig.model_validate({"local": {"virtual_nodes": [
        {"count": 2, "name_prefix": "v", "gpus": "sim-gpu:3", "cpu": 4, "labels": {"rack": "a"}},
    ], "ports": "20000-20999"}})
    backend = registry.make_backend(config, tmp_path / "home")
    nodes = backend.observe().nodes
    backend.close()
    LocalEngine(tmp_path / "home").backend.quit_supervisor(kill=True)
    assert [(n.name, n.cpu_milli, len(n.gpus), n.label("rack")) for n in nodes] == [
        ("v-0", 4_000, 3, "a"), ("v-1", 4_000, 3, "a"),
    ]


def test_a_missing_engine_says_how_to_install_it() -> None:
    with pytest.raises(MissingExtra) as caught:
        registry.load_engine("no_such_engine.client", "docker")
    assert 'pip install "jobsched[docker]"' in caught.value.hint
