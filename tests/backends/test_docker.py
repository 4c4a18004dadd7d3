"""The Docker backend on a real engine: it keeps every promise of a backend, and those of containers besides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from jobsched.backends.docker_render import HOME
from jobsched.core.observation import ReplicaReport
from jobsched.spec.server import DockerBackend as Config
from tests.backends import docker_stage
from tests.contracts.backend import ProcessBackendContract

pytestmark = [pytest.mark.e2e, docker_stage.needs_docker]


class DockerEngine:
    """`tests.contracts.backend.Engine` for containers."""

    can_run_commands = True

    def __init__(self, home: Path, **fields: object) -> None:
        engine = {"url": docker_stage.url(), "gpus": "sim-gpu:4", "same_files": True}
        self.home = home
        self.config = Config.model_validate({"image": docker_stage.image(), "engines": [engine]} | fields)
        self.backend = self._connect()

    def _connect(self):  # type: ignore[no-untyped-def]
        from jobsched.backends.docker import DockerBackend

        return DockerBackend(self.home, self.config)

    def reconnect(self):  # type: ignore[no-untyped-def]
        self.backend.close()
        self.backend = self._connect()
        return self.backend

    def ends(self, code: int) -> tuple[str, ...]:
        return ("/bin/sh", "-c", f"exit {code}")

    def goes_on(self) -> tuple[str, ...]:
        return ("/bin/sleep", "300")

    def kill(self, report: ReplicaReport) -> None:
        docker_stage.api().kill(report.ident)

    @property
    def label(self) -> str:
        return f"{HOME}={self.backend.home_id}"

    def clean_up(self) -> None:
        self.backend.close()
        api = docker_stage.api()
        for entry in api.containers(all=True, filters={"label": self.label}):
            with suppress(docker_stage.api_error()):  # it is being removed already
                api.remove_container(entry["Id"], force=True, v=True)
        for network in api.networks(filters={"label": self.label}):
            api.remove_network(network["Id"])


@pytest.fixture
def engine(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerEngine]:
    engine = DockerEngine(
        tmp_path / "home", user=f"{os.getuid()}:{os.getgid()}", volumes=[str(tmp_path_factory.getbasetemp())])
    yield engine
    engine.clean_up()


class TestDockerBackend(ProcessBackendContract):
    """`engine` is above."""
