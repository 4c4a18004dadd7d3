"""What an adapter knows of its replicas, and what of it has not been told yet. Used by adapters.

One lock guards it all; `changed` is told on every end, acknowledgement, and change that cannot wait. Who waits for one
replica is woken by its own news only: a thousand stops at a time must not wake each other.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from jobsched.backends import reports
from jobsched.backends.supervisor.replica import Progress
from jobsched.core.launch import LaunchKey, parse_key
from jobsched.core.node import Node
from jobsched.core.observation import Observation, ReplicaReport, Seen
from jobsched.core.resources import NodeName

GLANCE_S = 0.1
"""How long news of mere progress may wait."""


@dataclass(slots=True)
class Stop:
    """A stop under way. Instants are monotonic seconds."""

    until: float
    """End of the grace."""
    acknowledged_before: object
    now: bool = False
    """No grace at all."""


@dataclass(slots=True)
class Known:
    """One replica; adapters add what they need."""

    report: ReplicaReport
    token: str = ""
    stop_signal: str = "USR1"
    progress: Progress | None = None
    stop: Stop | None = None
    withdrawn: bool = False
    """Stopped before the engine had made it: who makes it takes it back."""
    ended_at: float = 0.0
    news: threading.Condition | None = None
    """Told with `changed` when this replica changed; made when somebody waits for it."""

    @property
    def key(self) -> LaunchKey:
        return self.report.key

    @property
    def alive(self) -> bool:
        return self.report.state is not Seen.EXITED

    @property
    def acknowledged(self) -> object:
        return self.progress.acknowledged if self.progress is not None else None

    def told(self) -> ReplicaReport:
        """Its report as of now."""
        report = self.report
        if self.progress is not None:
            report = replace(report, progress=reports.seen(self.progress))
        return replace(report, ended_age_ms=int((time.monotonic() - self.ended_at) * 1000)) if self.ended_at else report


R = TypeVar("R", bound=Known)


def place(key: LaunchKey) -> str:
    """Without the restart."""
    return key.rpartition("/")[0]


class ReplicaTable(Generic[R]):
    """Replicas by key."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._replicas: dict[LaunchKey, R] = {}
        self._past: dict[str, int] = {}
        """`job/attempt/role/index` -> the highest restart that was forgotten."""
        self._dirty: dict[LaunchKey, None] = {}
        self._gone: dict[LaunchKey, None] = {}
        self._urgent = False
        self._told_nodes: dict[NodeName, Node] | None = None

    @property
    def told(self) -> bool:
        """Whether anything was ever told."""
        return self._told_nodes is not None

    def get(self, key: LaunchKey) -> R | None:
        with self.lock:
            return self._replicas.get(key)

    def known(self, keys: Iterable[LaunchKey]) -> list[R]:
        with self.lock:
            return [self._replicas[key] for key in keys if key in self._replicas]

    def all(self) -> list[R]:
        with self.lock:
            return list(self._replicas.values())

    def started(self, key: LaunchKey) -> bool:
        """Whether this key is known, or was forgotten."""
        with self.lock:
            return key in self._replicas or parse_key(key).restart <= self._past.get(place(key), -1)

    def add(self, replica: R) -> None:
        with self.changed:
            self._replicas[replica.key] = replica
            self._dirty[replica.key] = None

    def tell(self, replica: R, **changes: Any) -> None:
        """Change the report of a replica that has not ended."""
        with self.changed:
            if replica.alive and any(getattr(replica.report, name) != value for name, value in changes.items()):
                replica.report = replace(replica.report, **changes)
                self.mark(replica)

    def report(self, replica: R, report: ReplicaReport) -> None:
        """The newest one of a replica that has not ended, its progress included: mere progress may wait a little."""
        with self.changed:
            if not replica.alive:
                return
            before, replica.report = replica.report, report
            saved = report.progress is not None and (
                before.progress is None or before.progress.saved_step != report.progress.saved_step)
            other = replace(report, progress=before.progress, idle_age_ms=before.idle_age_ms) != before
            if saved or other:
                self.mark(replica)
            else:
                self.glance(replica)

    def mark(self, replica: R) -> None:
        """Its report changed (under the lock)."""
        if self._replicas.get(replica.key) is replica:
            self._dirty[replica.key] = None
            self._urgent = True
            self.stir(replica)

    def stir(self, replica: R) -> None:
        """Wake those who wait for it (under the lock)."""
        self.changed.notify_all()
        if replica.news is not None:
            replica.news.notify_all()

    def glance(self, replica: R) -> None:
        """Its progress is to be told again, without hurry (under the lock)."""
        self._dirty[replica.key] = None

    def end(self, replica: R, report: ReplicaReport) -> bool:
        """Its end, once and for all; whether it is news."""
        with self.changed:
            if not replica.alive:
                return False
            replica.report = replace(report, state=Seen.EXITED)
            replica.ended_at = time.monotonic() - report.ended_age_ms / 1000
            self.mark(replica)
            return True

    def stop(self, keys: Iterable[LaunchKey], grace_ms: int, made: Callable[[R], bool]) -> list[tuple[R, Stop]]:
        """Ask for the end of replicas: the stops that begin by that, to be carried out. One that is not `made` yet ends
        here; a stop under way may only become shorter."""
        until, begun = time.monotonic() + grace_ms / 1000, []
        with self.changed:
            for replica in self.known(keys):
                if not replica.alive:
                    continue
                if not made(replica):
                    replica.withdrawn = True
                    self.end(replica, replace(
                        replica.report, signal=int(signal.SIGTERM), message="stopped before it ran"))
                elif replica.stop is None:
                    replica.stop = Stop(until, replica.acknowledged, now=grace_ms <= 0)
                    begun.append((replica, replica.stop))
                elif until < replica.stop.until:
                    replica.stop.until, replica.stop.now = until, grace_ms <= 0
                    self.stir(replica)
            self.changed.notify_all()
        return begun

    def drop(self, replica: R) -> None:
        """As if it had never been."""
        with self.changed:
            if self._replicas.get(replica.key) is replica:
                del self._replicas[replica.key]
                self._gone[replica.key] = None
                self._urgent = True
                self.changed.notify_all()

    def forget(self, replica: R) -> None:
        """It is not to be started again."""
        with self.changed:
            self.drop(replica)
            self._past[place(replica.key)] = max(self._past.get(place(replica.key), 0), parse_key(replica.key).restart)

    def take(self, data: dict[str, Any]) -> R | None:
        """A report came from a replica; None when it is none of ours, or makes no sense."""
        with self.changed:
            replica = self._replicas.get(LaunchKey(str(data.get("key", ""))))
            if replica is None or not replica.alive:
                return None
            before, first = replica.acknowledged, replica.progress is None
            progress = reports.take(replica.progress, data, replica.token)
            if progress is None:
                return None
            replica.progress = progress
            self._dirty[replica.key] = None
            if first or progress.acknowledged != before:
                self.mark(replica)
            return replica

    def wait(self, holds: Callable[[], bool], until: Callable[[], float], replica: R | None = None) -> None:
        """Until it holds, or an instant that others may bring nearer; of one replica, if it is about one."""
        with self.lock:
            if replica is not None and replica.news is None:
                replica.news = threading.Condition(self.lock)
            news = self.changed if replica is None or replica.news is None else replica.news
            while not holds() and (left := until() - time.monotonic()) > 0:
                news.wait(min(left, 1.0))

    def start_over(self) -> None:
        """What is told next is told in full: whoever is asked has lost touch."""
        with self.changed:
            self._told_nodes = None
            self.changed.notify_all()

    def hurry(self) -> None:
        """Something other than a replica changed."""
        with self.changed:
            self.changed.notify_all()

    # telling ------------------------------------------------------------------------------------------------------

    def observe(self, nodes: Callable[[], dict[NodeName, Node]], timeout_ms: int) -> Observation:
        """What is new, waited for. `nodes` gives all there are; what it raises goes through."""
        deadline = time.monotonic() + timeout_ms / 1000
        with self.changed:
            while True:
                now = nodes()
                left = deadline - time.monotonic()
                if not self.told or self._urgent or now != self._told_nodes or left <= 0:
                    return self._observation(now)
                self.changed.wait(min(left, GLANCE_S))
                self._urgent = self._urgent or bool(self._dirty)

    def _observation(self, nodes: dict[NodeName, Node]) -> Observation:
        before = self._told_nodes
        full = before is None
        keys: Sequence[LaunchKey] = list(self._replicas) if full else [k for k in self._dirty if k in self._replicas]
        found = Observation(
            full=full,
            nodes=tuple(node for node in nodes.values() if before is None or before.get(node.name) != node),
            replicas=tuple(self._replicas[key].told() for key in keys),
            gone=() if full else tuple(key for key in self._gone if key not in self._replicas),
            gone_nodes=tuple(name for name in before or () if name not in nodes),
        )
        self._told_nodes, self._urgent = dict(nodes), False
        self._dirty.clear()
        self._gone.clear()
        return found
