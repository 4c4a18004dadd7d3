"""An engine and a container as the Docker backend keeps them: what was heard of them, and when. Used by `docker`."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from jobsched.backends import docker_render as render
from jobsched.backends.containers import instant
from jobsched.backends.docker_engine import Engine
from jobsched.backends.docker_render import Json, Site
from jobsched.backends.gpus import read_inventory
from jobsched.backends.replica_table import Known
from jobsched.core.launch import LaunchKey, own_key
from jobsched.core.node import Gpu, Node
from jobsched.core.observation import ReplicaReport
from jobsched.core.resources import NOTHING, GpuShare, NodeName

GPU_REFRESH_S = 10.0
IDLE_PER_MILLE = 5
"""A container that uses less of one CPU than this is idle: its init process and the kernel's accounts of interrupts are
never quite still (0.03 measured)."""


@dataclass(slots=True)
class Replica(Known):
    """One container, or what shall become one."""

    engine: Station = field(kw_only=True)
    container: str = ""
    died_at: float = 0.0
    """When the engine told its end; its log may still be on its way."""
    died_with: int | None = None
    died_in: int = 0
    """The touch (see `Station`) in which the engine told it."""
    killed_by_engine: bool = False
    """It ended when the engine was restarted."""
    attended: bool = False
    log: Any = None
    """The stream that is being read, to be closed by others."""
    cpu_ns: int = -1
    """CPU time used up to `looked_at`."""
    looked_at: float = 0.0
    cpu_at: float = 0.0
    """When it was last found to use the CPU."""

    def told(self) -> ReplicaReport:
        report, progress = Known.told(self), self.progress
        if progress is not None and self.cpu_ns >= 0 and progress.beat_at < self.cpu_at:
            return replace(report, idle_age_ms=int((time.monotonic() - self.cpu_at) * 1000))
        return report

    def take_look(self, cpu_ns: int, now: float) -> None:
        """Its CPU time used so far (-1: not known). By share, not by change: see `IDLE_PER_MILLE`."""
        if cpu_ns < 0:
            return
        if self.cpu_ns < 0 or cpu_ns - self.cpu_ns > (now - self.looked_at) * IDLE_PER_MILLE * 10**6:
            self.cpu_at = now
        self.cpu_ns, self.looked_at = cpu_ns, now


@dataclass(slots=True)
class Station:
    """One engine as the backend keeps it."""

    engine: Engine
    site: Site
    pool: ThreadPoolExecutor
    node: Node | None = None
    """None while it does not answer."""
    problem: str = ""
    touch: int = 0
    """How often it was lost. What was heard in an earlier touch may have been the last words of an engine that has been
    restarted since."""
    last_event: str = ""
    """`seconds.nanoseconds` of the newest event seen, by its own clock."""
    gpus: tuple[Gpu, ...] = ()
    gpus_at: float = 0.0
    foreign_gpus: tuple[GpuShare, ...] = ()
    """GPUs that processes outside of any container use."""
    listed: threading.Event = field(default_factory=threading.Event)
    """Its first listing came, or failed to."""
    clock: tuple[datetime, float] = (datetime.min, 0.0)
    """The engine's own time at a monotonic instant of ours."""
    networks: threading.Lock = field(default_factory=threading.Lock)
    left: threading.Event = field(default_factory=threading.Event)
    """It was taken away."""

    def now(self) -> datetime:
        """The engine's own time."""
        return self.clock[0] + timedelta(seconds=time.monotonic() - self.clock[1])

    @property
    def gpus_old(self) -> bool:
        """Whether the GPUs were read a while ago."""
        return time.monotonic() - self.gpus_at >= GPU_REFRESH_S

    def look_around(self, home_id: str, ours: Sequence[str], info: Json | None = None, name: str = "") -> Node:
        """The engine as a node: what it has, and what others than `home_id`'s containers (`ours`) use of it."""
        engine, site = self.engine, self.site
        info = info or engine.info()
        name = NodeName(name or (self.node.name if self.node else str(info["Name"]).lower()))
        others = engine.others(render.HOME, home_id)
        gpus = render.listed_gpus(name, engine.config)
        if engine.config.gpus is None and engine.config.shares_files:
            gpus = self._own_gpus(ours)
        used, taken = render.foreign_use(others, gpus) if others else (NOTHING, ())
        taken = tuple(dict.fromkeys((*taken, *self.foreign_gpus)))
        return render.node(name, info, engine.config, site.config, site.several, gpus, (used, taken))

    def _own_gpus(self, ours: Sequence[str]) -> tuple[Gpu, ...]:
        """From NVML, not oftener than every ten seconds. `ours`: containers whose use is not foreign."""
        if self.gpus_at and not self.gpus_old:
            return self.gpus
        inventory = read_inventory()
        if inventory.foreign:
            pids = set[int]().union(*(self.engine.pids(container) for container in ours))
            inventory = read_inventory(pids.__contains__)
        self.gpus, self.foreign_gpus, self.gpus_at = inventory.gpus, inventory.foreign, time.monotonic()
        return self.gpus


def key_of(inspected: Json) -> LaunchKey | None:
    """None for a label that is none of ours."""
    return own_key(inspected["Config"]["Labels"].get(render.KEY, ""))


def stamp(text: str) -> str:
    """RFC 3339 -> `seconds.nanoseconds`, as events are asked for."""
    return f"{instant(text).timestamp():.6f}000"


def event_stamp(event: Json) -> str:
    nanos = int(event.get("timeNano", 0))
    return f"{nanos // 10**9}.{nanos % 10**9:09d}"
