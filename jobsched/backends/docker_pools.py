"""Docker engines on demand: the user's command makes hosts and takes them away; it is told what should exist and prints
what does. Used by `docker`; decides nothing.

The command gets one JSON object on stdin and prints one on stdout. It is run again whenever the wish changes and every
`AGAIN_S` while what exists differs from it, so it may return before anything is ready; it must not mind repetition.

    {"pools": [{"name": "a100", "nodes": 2, "release": ["a100-7"], "gpus": "a100-80gb:8", "cpu_milli": 64000,
                "memory_bytes": 549755813888, "labels": {"pool": "a100"}}]}
    {"engines": [{"pool": "a100", "name": "a100-8", "url": "tcp://10.0.0.8:2376", "gpus": [{"kind": …, "ids": […]}]}]}
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
from pydantic import ValidationError

from jobsched.backends.docker_render import Json
from jobsched.core.pools import Demand
from jobsched.spec.backends import DockerEngine
from jobsched.spec.fields import SpecModel, Text

AGAIN_S = 10.0
LONGEST_S = 900.0
"""A command that runs longer is ended."""
SAID_CHARS = 500

log = structlog.get_logger("jobsched.docker")


class MadeEngine(DockerEngine):
    """An engine that the command made."""

    pool: Text


class Made(SpecModel):
    """What the command prints."""

    engines: tuple[MadeEngine, ...]


def request(demands: Sequence[Demand]) -> Json:
    """What the command is told."""
    return {
        "pools": [
            {
                "name": demand.pool.name, "nodes": demand.nodes, "release": list(demand.release),
                "gpus": f"{demand.pool.gpu_kind}:{demand.pool.gpus}" if demand.pool.gpus else "",
                "cpu_milli": demand.pool.cpu_milli, "memory_bytes": demand.pool.memory_bytes,
                "labels": dict(demand.pool.labels),
            }
            for demand in demands
        ]
    }  # fmt: skip


def made(output: bytes | str, demands: Sequence[Demand]) -> tuple[MadeEngine, ...]:
    """The engines that the command printed, with their pools' labels. Raises ValueError for what makes no sense."""
    found = Made.model_validate_json(output).engines
    pools = {demand.pool.name: demand.pool for demand in demands}
    for engine in found:
        if engine.pool not in pools:
            raise ValueError(f"there is no pool {engine.pool}")
        if not engine.name or not engine.host:
            raise ValueError("an engine needs a name, and an address unless its url has one")
    if len({engine.url for engine in found}) < len(found) or len({engine.name for engine in found}) < len(found):
        raise ValueError("two engines have the same url or name")
    return tuple(
        engine.model_copy(update={"labels": {**engine.labels, **dict(pools[engine.pool].labels)}}) for engine in found)


class Maker:
    """Runs the command on a thread of its own; `told` hears which engines there are, whenever that changes."""

    def __init__(self, command: Sequence[str], path: Path, told: Callable[[tuple[MadeEngine, ...]], None]) -> None:
        """`path` keeps the last answer, so that the next server knows the engines at once."""
        self._command, self._path, self._told = tuple(command), path, told
        self._demands: tuple[Demand, ...] | None = None
        self._wake, self._closing = threading.Event(), threading.Event()
        self.engines: tuple[MadeEngine, ...] = self._remembered()
        self._thread: threading.Thread | None = None

    def want(self, demands: Sequence[Demand]) -> None:
        self._demands = tuple(demands)
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="docker-pools", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def _remembered(self) -> tuple[MadeEngine, ...]:
        try:
            return Made.model_validate_json(self._path.read_bytes()).engines
        except (FileNotFoundError, ValidationError):
            return ()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(None if self._settled() else AGAIN_S)
            self._wake.clear()
            demands = self._demands
            if demands is None or self._closing.is_set():
                continue
            try:
                engines = made(self._answer(json.dumps(request(demands)).encode()), demands)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                if not self._closing.is_set():
                    log.warning("the command that makes nodes failed; it is run again", error=str(error)[:SAID_CHARS])
                continue
            if engines != self.engines:
                self.engines = engines
                self._path.write_text(Made(engines=engines).model_dump_json())
                self._told(engines)

    def _settled(self) -> bool:
        if self._demands is None:
            return True
        have = Counter(engine.pool for engine in self.engines)
        going = {name for demand in self._demands for name in demand.release}
        return not going & {engine.name for engine in self.engines} and all(
            have[demand.pool.name] == demand.nodes for demand in self._demands)

    def _answer(self, told: bytes) -> bytes:
        with subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            threading.Thread(target=self._end_in_time, args=(process,), daemon=True).start()
            output, said = process.communicate(told)
        if process.returncode:
            text = said.decode(errors="replace").strip()[-SAID_CHARS:]
            raise OSError(f"{self._command[0]} ended with {process.returncode}: {text}")
        return output

    def _end_in_time(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + LONGEST_S
        while process.poll() is None:
            if self._closing.wait(0.2) or time.monotonic() > until:
                process.kill()
                return
