"""A local engine in a directory of its own, and the assurance that nothing of it is left running."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsched.backends import local_nodes
from jobsched.backends.local import LocalBackend
from jobsched.backends.supervisor import processes
from jobsched.backends.supervisor.protocol import Layout, Settings
from jobsched.core.observation import ReplicaReport
from tests.contracts.backend import PATIENCE_S, CommandEngine

NODES = local_nodes.virtual_nodes([local_nodes.VirtualGroup(2, gpus=(("sim-gpu", 4),))], 21_000, 21_999)
SETTINGS = Settings(kill_after_s=2.0, idle_exit_s=20.0, warm_wait_s=PATIENCE_S)


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
        name = f"jobsched-{Layout(self.home).home_id}"
        return [Path(place, folder) for place, folders, _ in os.walk("/sys/fs/cgroup") for folder in folders
                if folder.startswith(name)]

    def has_no_processes(self) -> bool:
        """Whether none is left within the patience: what was killed goes when the machine finds time for it."""
        deadline = time.monotonic() + PATIENCE_S
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(tmp_path / "home")
    yield engine
    engine.backend.quit_supervisor(kill=True)
    engine.backend.close()
    assert engine.has_no_processes()
    assert engine.groups() == []
    assert not Layout(engine.home).sockets.exists()
