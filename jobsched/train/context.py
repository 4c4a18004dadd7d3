"""`context`: who this replica is, what it reports, and what jobsched asks of it.

    from jobsched import context

    for step in range(start, total):
        ...
        context.report(step=step, loss=loss, total=total)
        if context.should_checkpoint():
            context.checkpoint_saved(save(step), step)

Standard library only. Works outside jobsched too, as a single process that reports to nobody. The environment is read
and the reporting thread started at first use, never at import; a forked child starts afresh. Signals are caught only
once the script asks about them (`should_checkpoint`, `should_stop`), because a caught signal promises an answer.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import SupportsFloat

from jobsched.contract import ReplicaEnv, from_environ
from jobsched.train.progress import Reporter

_ALONE = ReplicaEnv(job_id="local", job_name="local", attempt=1, role="worker", index=0, rank=0)


class Context:
    """This replica. Attributes not named here are in `env`."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._env: ReplicaEnv | None = None
        self._reporter: Reporter | None = None
        self._caught: set[signal.Signals] = set()
        self._asked_at_s: float | None = None
        self._checkpoint_wanted = False
        self._stop_wanted = False

    @property
    def env(self) -> ReplicaEnv:
        """The whole contract record."""
        if self._env is None:
            self._env = from_environ(os.environ) or _ALONE
        return self._env

    @property
    def managed(self) -> bool:
        """Whether jobsched started this process."""
        return self.env is not _ALONE

    @property
    def role(self) -> str:
        return self.env.role

    @property
    def index(self) -> int:
        return self.env.index

    @property
    def rank(self) -> int:
        """Among training replicas at the start of the attempt; -1 for ps and evaluator."""
        return self.env.rank

    @property
    def world_size(self) -> int:
        return self.env.world_size

    @property
    def local_rank(self) -> int:
        return self.env.local_rank

    @property
    def attempt(self) -> int:
        return self.env.attempt

    @property
    def restart(self) -> int:
        """How often this replica was started anew within the attempt."""
        return self.env.restart

    @property
    def peers(self) -> Mapping[str, tuple[str, ...]]:
        """Role -> "host:port" per index."""
        return self.env.peers

    @property
    def address(self) -> str:
        """This replica's own "host:port"."""
        return self.env.address

    @property
    def checkpoint_dir(self) -> str:
        """Directory for checkpoints, kept across attempts; empty outside jobsched."""
        return self.env.checkpoint_dir

    @property
    def deadline(self) -> float | None:
        """Unix seconds at which the replica is stopped at the latest, if that is known: the end of the grace once a
        checkpoint or stop was asked for, else the job's time limit."""
        limits = [self.env.deadline_ms / 1_000] if self.env.deadline_ms else []
        if self._asked_at_s is not None:
            limits.append(self._asked_at_s + self.env.grace_ms / 1_000)
        return min(limits, default=None)

    def report(self, step: int | None = None, loss: SupportsFloat | None = None, total: int | None = None, *,
               world: int | None = None, message: str | None = None, **metrics: SupportsFloat) -> None:
        """Tell how far training is: numbers only, newest wins. About two microseconds, so call it on every step.

        `step` rising is what keeps a job from being taken for hung; `message` says what it waits for ("" clears it).

        Elastic jobs are sized by one of these: `samples_per_s`, what all replicas of the job process together;
        `local_samples_per_s`, what this one does, where that is all it knows; `step_s`, the seconds of a step.
        """
        if loss is not None:
            metrics["loss"] = loss
        (self._reporter or self._start()).put(step, total, world, message, metrics)

    def should_checkpoint(self) -> bool:
        """Whether jobsched wants a checkpoint now (before a stop, or on request). Answer with `checkpoint_saved`."""
        name = self.env.checkpoint_signal
        if name != "none":
            self._catch(signal.Signals[f"SIG{name}"])
        return self._checkpoint_wanted

    def checkpoint_every_s(self, otherwise: float) -> float:
        """How often the job wants to save (`checkpoint: {interval: …}`), in seconds; `otherwise` if it does not say."""
        return self.env.checkpoint_interval_ms / 1_000 if self.env.checkpoint_interval_ms else otherwise

    def checkpoint_saved(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        """Acknowledge: everything up to `step` (default: the last reported one) is in `path`. Ends the grace time."""
        reporter = self._reporter or self._start()
        known = reporter.fields.get("step", 0)
        self._checkpoint_wanted = False
        reporter.saved(step if step is not None else known if isinstance(known, int) else 0, os.fspath(path))

    def should_stop(self) -> bool:
        """Whether SIGTERM has come. A script that asks must exit by itself before the `deadline`."""
        self._catch(signal.SIGTERM)
        return self._stop_wanted

    def _catch(self, number: signal.Signals) -> None:
        if number in self._caught or threading.current_thread() is not threading.main_thread():
            return
        signal.signal(number, self._on_signal)
        self._caught.add(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked_at_s = self._asked_at_s or time.time()
        if number == signal.SIGTERM:
            self._stop_wanted = True
        if signal.Signals(number).name == f"SIG{self.env.checkpoint_signal}":
            self._checkpoint_wanted = True

    def _start(self) -> Reporter:
        env = self.env
        try:
            faulthandler.register(signal.SIGQUIT, all_threads=True, file=sys.stderr)
        except (AttributeError, OSError, ValueError):
            pass  # stderr is no file here (a notebook): stacks then come from py-spy alone
        self._reporter = Reporter(env.launch_key, env.token, env.report if self.managed else None)
        return self._reporter


context = Context()
os.register_at_fork(after_in_child=context._reset)
