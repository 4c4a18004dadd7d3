"""What the command that makes Docker engines is told, and what it may answer."""

from __future__ import annotations

import json

import pytest

from jobsched.backends.docker_pools import made, request
from jobsched.core.pools import Demand, NodePool
from jobsched.core.resources import NodeName

POOL = NodePool("a100", 64_000, 512 << 30, "a100-80gb", 8, labels=(("pool", "a100"), ("zone", "b")))
DEMANDS = (Demand(POOL, 2, (NodeName("a100-7"),)),)
ENGINE = {"pool": "a100", "name": "a100-8", "url": "tcp://10.0.0.8:2376"}


def test_the_command_is_told_what_should_exist() -> None:
    assert request(DEMANDS) == {
        "pools": [{
            "name": "a100", "nodes": 2, "release": ["a100-7"], "gpus": "a100-80gb:8", "cpu_milli": 64_000,
            "memory_bytes": 512 << 30, "labels": {"pool": "a100", "zone": "b"},
        }]
    }  # fmt: skip


def test_its_engines_have_the_labels_of_their_pool() -> None:
    (engine,) = made(json.dumps({"engines": [ENGINE | {"labels": {"rack": "r"}}]}), DEMANDS)
    assert dict(engine.labels) == {"pool": "a100", "zone": "b", "rack": "r"}
    assert engine.host == "10.0.0.8"


@pytest.mark.parametrize(("answer", "why"), [
    ("", "Invalid JSON"),
    ('{"engines": 3}', "engines"),
    (json.dumps({"engines": [ENGINE | {"pool": "h100"}]}), "no pool h100"),
    (json.dumps({"engines": [ENGINE, ENGINE]}), "same url"),
    (json.dumps({"engines": [{**ENGINE, "name": ""}]}), "needs a name"),
    (json.dumps({"engines": [{**ENGINE, "url": "unix:///x.sock"}]}), "an address"),
])  # fmt: skip
def test_nonsense_is_refused(answer: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        made(answer, DEMANDS)
