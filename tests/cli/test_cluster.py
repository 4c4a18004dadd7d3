"""Nodes, queues, doctor."""

import pytest

from jobsched import errors
from jobsched.client import locate
from tests.cli.conftest import Cli
from tests.client.fake_server import FakeServer


def test_nodes(cli: Cli) -> None:
    head, row = cli("nodes").out.splitlines()
    assert head.split() == ["NODE", "STATE", "GPU", "FREE-GPUS", "FREE-CPU", "FREE-MEMORY", "JOBS"]
    assert row.split() == ["n01", "ready", "sim-gpu:2", "1/2", "4/8", "16.0Gi/32.0Gi", "0"]
    assert cli("nodes", "--gpu", "h100", "-q").out == ""
    assert cli("nodes", "--gpu", "sim", "-q").out == "n01\n"
    assert cli("nodes", "--json").json["nodes"][0]["free_gpus"] == 1


def test_one_node(cli: Cli) -> None:
    assert "g1" in cli("node", "describe", "n01").out
    result = cli("node", "describe", "n99")
    assert result.code == 3
    assert "nodes: n01" in result.err


@pytest.mark.parametrize(
    ("verb", "route", "body"),
    [
        ("cordon", "cordon", {"drain": False}),
        ("drain", "cordon", {"drain": True}),
        ("uncordon", "uncordon", {}),
    ],
)
def test_node_wishes(verb: str, route: str, body: object, cli: Cli, server: FakeServer) -> None:
    assert cli("node", verb, "n01", "-q").out == "n01\n"
    assert server.sent(f"POST nodes/n01/{route}") == body


def test_queues(cli: Cli) -> None:
    assert cli("queues", "--no-headers").out.split() == [
        "default", "1", "open", "3", "1", "2.5", "-", "0%", "-", "-", "-"
    ]  # fmt: skip


def test_usage(cli: Cli, server: FakeServer) -> None:
    server.replies["GET usage"] = 200, [
        {"queue": "research", "owner": "ann", "jobs": 3, "succeeded": 2, "failed": 1, "cancelled": 0,
         "gpu_hours": 12.5, "mean_wait_s": 61.0, "longest_wait_s": 90.0},
    ]
    assert cli("usage", "--no-headers").out.split() == ["research", "ann", "3", "2", "1", "12.50", "61.0s", "90.0s"]
    assert cli("usage", "-u", "bob", "--json").json["usage"] == []
    refused = cli("usage", "--since", "soon")
    assert refused.code == 2
    assert "neither an RFC 3339 time nor a duration" in refused.err


def test_doctor_with_a_server(cli: Cli) -> None:
    checks = {c["name"]: c for c in cli("doctor", "-o", "json").json["checks"]}
    assert {"python", "torch", "gpus", "cgroup", "disk", "server", "server store"} <= checks.keys()
    assert "version 9.9" in checks["server"]["message"]


def test_doctor_without_a_server(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object, **__: object) -> object:
        raise errors.Unreachable("none is running", hint="start one")

    monkeypatch.setattr(locate, "find", nothing)
    result = cli("doctor")
    assert result.code == 0
    assert "none is running" in result.out


def test_doctor_fails_when_something_is_wrong(cli: Cli, server: FakeServer) -> None:
    server.replies["GET doctor"] = 200, [{"name": "store", "ok": False, "message": "disk full", "hint": "make room"}]
    result = cli("doctor")
    assert result.code == 1
    assert "make room" in result.out
