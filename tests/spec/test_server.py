from __future__ import annotations

import pytest
from pydantic import ValidationError

from jobsched.spec.queue import QueueSpec
from jobsched.spec.server import ElasticConfig, GpuStock, Listen, PortRange, ServerConfig, VirtualNodes


def test_a_server_needs_no_configuration() -> None:
    config = ServerConfig()
    assert config == ServerConfig.model_validate({})
    assert (config.listen.host, config.listen.port) == ("127.0.0.1", 0)
    assert config.backend.local.virtual_nodes == ()
    assert config.queues == (QueueSpec(name="default"),)
    assert config.backend.local.ports.last < 32_768


def test_a_configuration_reads_back_from_its_json() -> None:
    config = ServerConfig.model_validate(
        {
            "listen": "[::1]:8080",
            "backend": {"local": {"virtual_nodes": [{"count": 4, "gpus": "sim-gpu:8", "memory": "64Gi"}]}},
            "queues": [{"name": "a", "max_gpus": 3}],
            "timers": {"node_grace": "1m"},
            "store": "postgresql+psycopg://u@h/d",
        }
    )
    assert ServerConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("written", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8_080),
        (":8080", "127.0.0.1", 8_080),
        (8080, "127.0.0.1", 8_080),
        ("[::1]:80", "::1", 80),
        ({"host": "0.0.0.0"}, "0.0.0.0", 0),
        ("h:0", "h", 0),
    ],
)
def test_listen(written: object, host: str, port: int) -> None:
    assert Listen.model_validate(written) == Listen(host=host, port=port)


@pytest.mark.parametrize("written", ["", "host", "h:x", "h:99999", "a b:80", True, 70_000, -1, []])
def test_listen_nonsense(written: object) -> None:
    with pytest.raises(ValidationError):
        Listen.model_validate(written)


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


@pytest.mark.parametrize(
    "fields",
    [
        {"store": "mysql://x"},
        {"store": "jobs.db"},
        {"queues": []},
        {"queues": [{"name": "a"}, {"name": "a"}]},
        {"policy": {"ordering": "x"}},
        {"policy": {"elastic": {"every": "0s"}}},
        {"policy": {"elastic": 5}},
        {"timers": {"lease_ttl": 0}},
        {"queues": [{"paused": "yes"}]},
        {"queues": [{"weight": -1}]},
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ServerConfig.model_validate(fields)


def test_elasticity_is_on_off_or_told_how() -> None:
    def policy(elastic: object) -> object:
        return ServerConfig.model_validate({"policy": {"elastic": elastic}}).policy.elastic

    assert policy(True) == policy({}) == ServerConfig().policy.elastic == ElasticConfig()
    assert policy(False) is None
    assert policy({"restart": "2s"}) == ElasticConfig().model_copy(update={"restart": 2_000})


def test_port_ranges() -> None:
    assert PortRange.model_validate("20000 - 21000") == PortRange(first=20_000, last=21_000)
