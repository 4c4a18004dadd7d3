from __future__ import annotations

import pytest
from pydantic import ValidationError

from jobsched.spec.queue import QueueSpec
from jobsched.spec.server import ElasticConfig, Listen, ServerConfig


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
