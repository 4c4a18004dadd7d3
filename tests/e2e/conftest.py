"""A server of its own for each test, with the configuration `CONFIG` of the test's module."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from jobsched.cli.demo import clear_away
from jobsched.client import locate
from jobsched.client.client import Client, JobHandle
from tests.ports import port_range

JOBS = Path(__file__).parents[2] / "jobs"
PATIENCE_S = 240.0


@pytest.fixture
def client(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    for name in ("JOBSCHED_SERVER", "JOBSCHED_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    config = yaml.safe_load(request.module.CONFIG)
    config["backend"]["local"]["ports"] = port_range()
    (home / "server.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("JOBSCHED_HOME", str(home))
    monkeypatch.setenv("JOBSCHED_CONFIG", str(home / "none.toml"))
    locate.start(home, config=home / "server.yaml")
    with Client() as found:
        yield found
    assert clear_away(home) == []


def until(job: JobHandle, holds: Callable[[JobHandle], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds(job.refresh()):
        assert not job.state.terminal, (job.state, [line.text for line in job.logs()][-20:])
        assert time.monotonic() < end, [stored.event for stored in job.events()][-12:]
        time.sleep(0.1)
