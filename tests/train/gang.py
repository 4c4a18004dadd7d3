"""A gang of real replica processes without a server: contracts made by hand, reports received on a socket.

Replicas are forked from a process that has torch imported, as jobsched's warm interpreter does. They can be kept at a
step, so that nothing is over before a test that is held up has seen it, and wait longer for each other than by default.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from jobsched.contract import ReplicaEnv, to_environ
from tests.ports import held_ports

ROOT = Path(__file__).parents[2]
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["torch", "jobsched.train.ddp", "jobsched.train.parameter_server"])


PATIENCE_S = 120
"""Only a failing test waits as long, and replicas for one that is there but silent."""
AT_ONCE_S = 60
"""Far less than anything that replicas wait for in vain, and far more than a machine that others use needs."""


def run_script(argv: list[str], environ: dict[str, str], log: str, gate: Path) -> None:
    """What `python ARGV` would do, in a forked child."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = argv
    torch.set_num_threads(1)  # OMP_NUM_THREADS came too late for a torch that is imported already
    be_patient()
    stop_at(gate)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def be_patient() -> None:
    """Nobody is taken for lost because he is late."""
    from jobsched.train import ddp, parameter_server, progress

    progress.PATIENCE_S = PATIENCE_S
    parameter_server.PARTING_S = PATIENCE_S
    ddp.SETUP_S = PATIENCE_S
    for function, options in (
        (ddp.Elastic.__init__, {"lost_after_s": PATIENCE_S, "start_wait_s": PATIENCE_S, "timeout_s": PATIENCE_S}),
        (parameter_server.ParameterServer.__init__, {"worker_timeout_s": PATIENCE_S}),
    ):
        assert function.__kwdefaults__.keys() >= options.keys()
        function.__kwdefaults__.update(options)


def stop_at(gate: Path) -> None:
    """Whoever reports the step that is written there, or a later one, waits until a higher one is."""
    from jobsched.train.context import context

    report = context.report

    def report_and_wait(step: int | None = None, *args: Any, **fields: Any) -> None:
        report(step, *args, **fields)
        while step is not None and step >= float(gate.read_text()):
            time.sleep(0.01)

    context.report = report_and_wait  # type: ignore[method-assign]


@dataclass
class Report:
    at_s: float
    key: str
    body: dict[str, Any]


@dataclass
class Gang:
    """Roles and how many replicas each may have; `start` makes one a process."""

    directory: Path
    sizes: dict[str, int]
    wanted: dict[str, int] = field(default_factory=dict)
    min_replicas: int = 1
    in_place: bool = True
    attempt: int = 1
    reports: list[Report] = field(default_factory=list)
    running: dict[tuple[str, int], BaseProcess] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._held = ExitStack()
        ports = iter(self._held.enter_context(held_ports(sum(self.sizes.values()) + 1)))
        self.peers = {role: tuple(f"127.0.0.1:{next(ports)}" for _ in range(n)) for role, n in self.sizes.items()}
        self.coordinator = f"127.0.0.1:{next(ports)}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.directory / "report.sock"))
        self.let_on_to(float("inf"))
        self._changed = threading.Condition()
        self._everyone: list[BaseProcess] = []
        threading.Thread(target=self._receive, daemon=True).start()

    def env(self, role: str, index: int, restart: int = 0) -> ReplicaEnv:
        trains = role != "ps"
        count = self.wanted.get(role, self.sizes[role])
        return ReplicaEnv(
            job_id="job", job_name="gang", attempt=self.attempt, role=role, index=index, restart=restart,
            rank=index if trains else -1, role_rank=index, world_size=count, role_world_size=count,
            local_world_size=count, local_rank=index, coordinator=self.coordinator, peers=self.peers,
            min_replicas=self.min_replicas, max_replicas=self.sizes[role], in_place=self.in_place,
            checkpoint_dir=str(self.directory / "ckpt"), report=f"unix:{self.directory}/report.sock", threads=1)

    def start(self, role: str, index: int, command: Sequence[str], restart: int = 0) -> BaseProcess:
        environ = to_environ(self.env(role, index, restart), {**os.environ, "PYTHONPATH": str(ROOT)})
        log = str(self.directory / f"{role}-{index}.log")
        process = WARM.Process(target=run_script, args=(list(command), environ, log, self.directory / "gate"))
        process.start()
        self.running[role, index] = process
        self._everyone.append(process)
        return process

    def let_on_to(self, step: float) -> None:
        """No replica goes on from this step before this is called again."""
        (self.directory / "gate.new").write_text(str(step))
        (self.directory / "gate.new").replace(self.directory / "gate")
        self.gate = step

    def creep(self, wanted: Callable[[Report], bool], since_s: float = 0) -> Report:
        """Let replicas on step by step until such a report has come."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := self._find(wanted, 1.0, since_s)):
            assert time.monotonic() < deadline, f"no such report within {PATIENCE_S} s\n{self.logs()}"
            self.let_on_to(self.gate + 1)
        return found

    def kill(self, role: str, index: int, number: int = signal.SIGKILL) -> float:
        """Send a signal; returns when."""
        now = time.time()
        process = self.running[role, index]
        assert process.pid is not None
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            process.join()
        return now

    def wait_report(self, wanted: Callable[[Report], bool], since_s: float = 0) -> Report:
        """The first report (received after `since_s`) for which `wanted` holds."""
        found = self._find(wanted, PATIENCE_S, since_s)
        assert found, f"no such report within {PATIENCE_S} s\n{self.logs()}"
        return found

    def _find(self, wanted: Callable[[Report], bool], timeout_s: float, since_s: float) -> Report | None:
        with self._changed:
            return self._changed.wait_for(
                lambda: next((r for r in self.reports if r.at_s >= since_s and wanted(r)), None), timeout_s)

    def wait_exit(self, role: str, index: int) -> int:
        process = self.running[role, index]
        process.join(3 * PATIENCE_S)
        assert process.exitcode is not None, f"{role} {index} did not end\n{self.logs()}"
        return process.exitcode

    def told(self, role: str, index: int, name: str) -> dict[str, Any]:
        """The first report of a replica in this attempt, whatever its restart, with this field or metric."""
        prefix = f"job/{self.attempt}/{role}/{index}/"
        return self.wait_report(
            lambda r: r.key.startswith(prefix) and (name in r.body or name in r.body["metrics"])).body

    def log(self, role: str, index: int) -> str:
        return (self.directory / f"{role}-{index}.log").read_text()

    def logs(self) -> str:
        return "\n".join(f"--- {f.name}\n{f.read_text()[-1500:]}" for f in sorted(self.directory.glob("*.log")))

    def close(self) -> None:
        for process in self._everyone:
            process.kill()
            process.join()
        self.socket.close()
        self._held.close()

    def _receive(self) -> None:
        while True:
            try:
                body = json.loads(self.socket.recv(65_536))
            except OSError:
                return
            with self._changed:
                self.reports.append(Report(time.time(), body["key"], body))
                self._changed.notify_all()
