"""Commands against a server in memory: `cli(...)` runs one as the shell would and gives code, stdout and stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobsched.cli.main import run
from jobsched.client import locate, settings
from tests.client.fake_server import FakeServer


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


Cli = Callable[..., Result]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of the machine that runs the tests."""
    for name in (*(f"JOBSCHED_{n.upper()}" for n in settings.NAMES), "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JOBSCHED_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("JOBSCHED_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    settings._read.cache_clear()


@pytest.fixture
def cli(server: FakeServer, alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    endpoint = server.remote().endpoint
    monkeypatch.setattr(locate, "find", lambda *_, **__: endpoint)
    monkeypatch.setattr(locate, "find_or_start", lambda *_, **__: endpoint)
    monkeypatch.setattr(locate, "connect", lambda _: server.remote(patience_s=0.0))

    def call(*args: str) -> Result:
        capsys.readouterr()
        code = run(args)
        seen = capsys.readouterr()
        return Result(code, seen.out, seen.err)

    return call
