"""A local engine in a directory of its own, and the assurance that nothing of it is left running."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsched.backends import local_nodes
from jobsched.backends.local import LocalBackend
from jobsched.backends.supervisor import processes
from jobsched.backends.supervisor.protocol import Layout, Settings
from jobsched.core.observation import ReplicaReport
from tests.contracts.backend import CommandEngine

NODES = local_nodes.virtual_nodes([local_nodes.VirtualGroup(2, gpus=(("sim-gpu", 4),))], 21_000, 21_999)
SETTINGS = Settings(kill_after_s=2.0, idle_exit_s=20.0)


class LocalEngine(CommandEngine[LocalBackend]):
    """`tests.contracts.backend.Engine` for processes of this machine."""

    def __init__(self, home: Path, settings: Settings = SETTINGS, warm: tuple[str, ...] = ()) -> None:
        self.home, self.settings, self.warm = home, settings, warm
        super().__init__()

    def connect(self) -> LocalBackend:
        return LocalBackend(self.home, local_nodes.fixed(NODES), settings=self.settings, warm=self.warm)

    def kill(self, report: ReplicaReport) -> None:
        os.kill(int(report.ident), signal.SIGKILL)

    def processes(self) -> set[int]:
        """Every living process that carries the mark of this home, replicas and what they left behind."""
        mark = Layout(self.home).home_id + ":"
        return {p.pid for p in processes.table().values() if p.alive and processes.marker(p.pid).startswith(mark)}

    def groups(self) -> list[Path]:
        """Control groups of this home that are still there."""
        return list(Path("/sys/fs/cgroup").rglob(f"jobsched-{Layout(self.home).home_id}*"))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(tmp_path / "home")
    yield engine
    engine.backend.quit_supervisor(kill=True)
    engine.backend.close()
    assert engine.processes() == set()
    assert engine.groups() == []
    assert not Layout(engine.home).sockets.exists()
