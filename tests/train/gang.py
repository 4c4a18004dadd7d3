"""A gang of real replica processes without a server: contracts made by hand, reports received on a socket.

Replicas are forked from a process that has torch imported, as jobsched's warm interpreter does.
"""

from __future__ import annotations

import atexit
import contextlib
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
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from jobsched.contract import ReplicaEnv, to_environ

ROOT = Path(__file__).parents[2]
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["torch", "jobsched.train.ddp", "jobsched.train.parameter_server"])


def run_script(argv: list[str], environ: dict[str, str], log: str) -> None:
    """What `python ARGV` would do, in a forked child."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = argv
    torch.set_num_threads(1)  # OMP_NUM_THREADS came too late for a torch that is imported already
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on right now."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


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
        ports = iter(free_ports(sum(self.sizes.values()) + 1))
        self.peers = {role: tuple(f"127.0.0.1:{next(ports)}" for _ in range(n)) for role, n in self.sizes.items()}
        self.coordinator = f"127.0.0.1:{next(ports)}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.directory / "report.sock"))
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
        process = WARM.Process(target=run_script, args=(list(command), environ, log))
        process.start()
        self.running[role, index] = process
        self._everyone.append(process)
        return process

    def kill(self, role: str, index: int, number: int = signal.SIGKILL) -> float:
        """Send a signal; returns when."""
        now = time.time()
        process = self.running[role, index]
        assert process.pid is not None
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            process.join()
        return now

    def wait_report(self, wanted: Callable[[Report], bool], timeout_s: float = 30, since_s: float = 0) -> Report:
        """The first report (received after `since_s`) for which `wanted` holds."""
        def found() -> Report | None:
            return next((r for r in self.reports if r.at_s >= since_s and wanted(r)), None)

        with self._changed:
            assert self._changed.wait_for(found, timeout_s), f"no such report within {timeout_s} s\n{self.logs()}"
            report = found()
            assert report is not None
            return report

    def wait_exit(self, role: str, index: int, timeout_s: float = 60) -> int:
        process = self.running[role, index]
        process.join(timeout_s)
        assert process.exitcode is not None, f"{role} {index} did not end\n{self.logs()}"
        return process.exitcode

    def last(self, role: str, index: int) -> dict[str, Any]:
        """The newest report of a replica, whatever its restart."""
        return next(r.body for r in reversed(self.reports) if r.key.startswith(f"job/{self.attempt}/{role}/{index}/"))

    def log(self, role: str, index: int) -> str:
        return (self.directory / f"{role}-{index}.log").read_text()

    def logs(self) -> str:
        return "\n".join(f"--- {f.name}\n{f.read_text()[-1500:]}" for f in sorted(self.directory.glob("*.log")))

    def close(self) -> None:
        for process in self._everyone:
            process.kill()
            process.join()
        self.socket.close()

    def _receive(self) -> None:
        while True:
            try:
                body = json.loads(self.socket.recv(65_536))
            except OSError:
                return
            with self._changed:
                self.reports.append(Report(time.time(), body["key"], body))
                self._changed.notify_all()
