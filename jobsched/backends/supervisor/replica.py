"""One replica as the supervisor keeps it: its process, its progress, its stop, its end, and the report made of these.

Used by the keeper. Instants are `time.monotonic()` seconds, but for the instant of the end.
"""

from __future__ import annotations

import math
import socket
import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from jobsched.backends.supervisor.limits import NOT_CONFINED, Confinement
from jobsched.backends.supervisor.loop import Timer
from jobsched.backends.supervisor.protocol import Key, Message, Order


class State(StrEnum):
    """As `core.observation.Seen`."""

    STARTING = "starting"
    RUNNING = "running"
    EXITED = "exited"


class Stage(StrEnum):
    """How far a stop has come."""

    ASKED = "asked"
    """The checkpoint signal was sent; waiting for the acknowledgement or the end of the grace."""
    TERMINATED = "terminated"
    """SIGTERM was sent."""
    KILLED = "killed"


@dataclass(slots=True)
class StopRequest:
    until: float
    """End of the grace."""
    acknowledged_before: object = None
    """`Progress.acknowledged` at the time of asking; anything else ends the grace."""
    stage: Stage | None = None
    kill_at: float = math.inf
    timer: Timer | None = None


@dataclass(slots=True)
class Progress:
    """The newest report of a replica."""

    step: int = -1
    total: int = -1
    world: int = 0
    saved: tuple[int, str] = (-1, "")
    acknowledged: object = None
    """The newest `saved` as it came: repeated in every report, so only one that differs acknowledges anything."""
    metrics: dict[str, float] = field(default_factory=dict)
    message: str = ""
    step_at: float = 0.0
    beat_at: float = 0.0
    pushed_at: float = -math.inf
    push_planned: bool = False

    def take(self, data: Message, now: float) -> None:
        """Fold one datagram in; absent fields stay as they are. TypeError or ValueError for nonsense."""
        step = int(data.get("step", self.step))
        if step != self.step or not self.step_at:
            self.step, self.step_at = step, now
        self.total = int(data.get("total", self.total))
        self.world = int(data.get("world", self.world))
        if data.get("metrics"):
            self.metrics = {str(name): float(value) for name, value in data["metrics"].items()}
        if data.get("saved"):
            self.saved = (int(data["saved"]["step"]), str(data["saved"]["path"]))
            self.acknowledged = data["saved"]
        self.message = str(data.get("message", self.message))
        self.beat_at = now

    def wire(self, now: float) -> Message:
        return {
            "step": self.step, "total": self.total, "world_size": self.world, "message": self.message,
            "step_age_ms": int((now - self.step_at) * 1000), "beat_age_ms": int((now - self.beat_at) * 1000),
            "saved_step": self.saved[0], "saved_path": self.saved[1],
            "metrics": sorted(self.metrics.items()),
        }


@dataclass(slots=True)
class End:
    """How it ended. Neither code nor signal: nobody saw it. `failure` is a `core.job.Reason` value or empty."""

    exit_code: int | None = None
    signal: int | None = None
    failure: str = ""
    message: str = ""
    tail: tuple[str, ...] = ()
    at: float = 0.0
    """Seconds since the epoch."""


@dataclass(slots=True)
class Replica:
    order: Order
    state: State = State.STARTING
    pid: int = 0
    start_ticks: int = 0
    pidfd: int = -1
    own_child: bool = True
    """False for one adopted from an earlier supervisor."""
    visited: bool = False
    """Somebody ran a command beside it, whose processes are nobody's children here."""
    waited: bool = False
    """For a warm interpreter; not again."""
    handshake: socket.socket | None = None
    """Open between asking a warm interpreter for it and letting it go."""
    confinement: Confinement = NOT_CONFINED
    oom_kills_before: int = 0
    progress: Progress | None = None
    stop: StopRequest | None = None
    reaped: End | None = None
    """The main process is gone, others of it may not be."""
    sweep_until: float = 0.0
    sweeps: int = 0
    end: End | None = None
    stacks: str = ""
    log_cut: int = 0
    cpu_ticks: int = -1
    cpu_at: float = 0.0
    """When its CPU time was last seen to have grown; looked at only while it is silent."""

    @property
    def key(self) -> Key:
        return self.order.key

    def forget_secrets(self) -> None:
        """Nobody needs the environment and the arguments of one that has ended."""
        self.order = replace(self.order, env={}, argv=())

    def stub(self) -> Message:
        """What the journal keeps of the order."""
        order = self.order
        return {
            "node": order.node, "token": order.token, "stop_signal": order.stop_signal,
            "memory_bytes": order.memory_bytes,
        }

    def wire(self, now: float) -> Message:
        message: dict[str, Any] = {"key": self.key, "node": self.order.node, "state": self.state.value}
        if self.pid:
            message["ident"] = str(self.pid)
        if self.progress is not None:
            message["progress"] = self.progress.wire(now)
        if self.stacks:
            message["stacks"] = self.stacks
        if self.cpu_ticks >= 0 and self.progress is not None and self.progress.beat_at < self.cpu_at:
            message["idle_age_ms"] = int((now - self.cpu_at) * 1000)
        if self.end is not None:
            message |= self.end_record() | {"ended_age_ms": max(int((time.time() - self.end.at) * 1000), 0)}
        return message

    def end_record(self) -> Message:
        """What the journal keeps of the end."""
        assert self.end is not None
        return {
            "exit_code": self.end.exit_code, "signal": self.end.signal, "failure": self.end.failure,
            "message": self.end.message, "tail": self.end.tail, "stacks": self.stacks, "ended_at": self.end.at,
        }
