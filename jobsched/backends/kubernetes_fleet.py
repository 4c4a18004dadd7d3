"""The cluster's nodes as they are offered: node objects, their Leases, and what others' pods hold there.

Fed by the informers of `kubernetes`; thread-safe. Whether a node is lost is decided from the age of its Lease by this
machine's own clock (never from the times written in it) and confirmed by the caller.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jobsched.backends import kubernetes_nodes as nodes
from jobsched.backends.kubernetes_nodes import Use
from jobsched.core.node import Node
from jobsched.core.resources import NodeName
from jobsched.spec.backends import KubernetesBackend

Json = dict[str, Any]

SETTLE_S = 1.0
"""How long changes of what others use are gathered before they are told."""
ALL_LATE = 3


@dataclass(slots=True)
class Lease:
    """A kubelet's sign of life: `stamp` is what it wrote, `seen_at` when we saw that first (monotonic)."""

    stamp: str
    seen_at: float


class Fleet:
    """Nodes by name."""

    def __init__(self, config: KubernetesBackend, held: Callable[[], Mapping[str, frozenset[str]]]) -> None:
        """`held()`: node -> GPUs that our own replicas hold there; only called by `nodes`."""
        self._config, self._held = config, held
        self._lock = threading.Lock()
        self._objects: dict[str, Json] = {}
        self._leases: dict[str, Lease] = {}
        self._uses: dict[str, Use] = {}
        """Others' pods, by uid."""
        self._on: dict[str, dict[str, Use]] = {}
        self._lost: dict[str, str] = {}
        """Node -> the stamp of the Lease with which it was lost."""
        self._silent: dict[str, str] = {}
        self._made: dict[NodeName, Node] = {}
        self._stale: set[str] = set()
        self._gathering: dict[str, float] = {}
        """Nodes where others' use changed -> when that began."""

    # what the informers bring -------------------------------------------------------------------------------------

    def list_nodes(self, found: Iterable[Json]) -> list[str]:
        """All there are; returns those that are gone."""
        with self._lock:
            before, self._objects = self._objects, {}
            for one in found:
                self._objects[one["metadata"]["name"]] = nodes.essence(one)
            self._stale |= {*before, *self._objects}
            return [name for name in before if name not in self._objects]

    def hear_node(self, kind: str, found: Json) -> None:
        name, fresh = found["metadata"]["name"], nodes.essence(found)
        with self._lock:
            if kind == "DELETED":
                self._objects.pop(name, None)
                self._lost.pop(name, None)
            elif self._objects.get(name) == fresh:
                return
            else:
                self._objects[name] = fresh
            self._stale.add(name)

    def list_leases(self, found: Iterable[Json]) -> None:
        """After a listing nobody is late: we may have been away."""
        now = time.monotonic()
        with self._lock:
            self._leases = {}
            for one in found:
                self._leases[one["metadata"]["name"]] = Lease(_stamp(one), now)
                self._back(one["metadata"]["name"], _stamp(one))

    def hear_lease(self, kind: str, found: Json) -> None:
        name, stamp = found["metadata"]["name"], _stamp(found)
        with self._lock:
            if kind == "DELETED":
                self._leases.pop(name, None)
            elif name not in self._leases or self._leases[name].stamp != stamp:
                self._leases[name] = Lease(stamp, time.monotonic())
                self._back(name, stamp)

    def list_others(self, found: Iterable[Json]) -> None:
        """All pods that are not ours."""
        uses = {one["metadata"]["uid"]: use for one in found if (use := nodes.use_of(one)) is not None}
        with self._lock:
            touched = {use.node for use in [*self._uses.values(), *uses.values()]}
            self._uses, self._on = uses, {}
            for uid, use in uses.items():
                self._on.setdefault(use.node, {})[uid] = use
            self._stale |= touched

    def hear_other(self, kind: str, found: Json) -> None:
        uid, use = found["metadata"]["uid"], None if kind == "DELETED" else nodes.use_of(found)
        with self._lock:
            before = self._uses.get(uid)
            if before == use:
                return
            if before is not None:
                del self._uses[uid]
                del self._on[before.node][uid]
            if use is not None:
                self._uses[uid] = use
                self._on.setdefault(use.node, {})[uid] = use
            for one in (before, use):
                if one is not None:
                    self._gathering.setdefault(one.node, time.monotonic())

    def _back(self, name: str, stamp: str) -> None:
        """A sign of life; under the lock."""
        if name in self._lost and self._lost[name] != stamp:
            del self._lost[name]
            self._stale.add(name)
        if self._silent.pop(name, None):
            self._stale.add(name)

    # questions ----------------------------------------------------------------------------------------------------

    def object(self, name: str) -> Json | None:
        with self._lock:
            return self._objects.get(name)

    def nodes(self) -> dict[NodeName, Node]:
        """Those that are not lost. The same objects again while nothing changed."""
        with self._lock:
            ripe = [name for name, since in self._gathering.items() if time.monotonic() - since >= SETTLE_S]
            for name in ripe:
                del self._gathering[name]
            self._stale.update(ripe)
            if self._stale:
                held = self._held()
                made = dict(self._made)
                for name in sorted(self._stale):
                    self._make(made, name, held.get(name, frozenset()))
                self._made = made
                self._stale.clear()
            return self._made

    def _make(self, made: dict[NodeName, Node], name: str, held: frozenset[str]) -> None:
        found = self._objects.get(name)
        if found is None or name in self._lost or not self._offered(found):
            made.pop(NodeName(name), None)
            return
        node = nodes.node_of(found, self._config, self._on.get(name, {}).values(), held, self._silent.get(name, ""))
        if made.get(node.name) != node:
            made[node.name] = node

    def _offered(self, found: Json) -> bool:
        labels = found["metadata"].get("labels") or {}
        return all(labels.get(name) == text for name, text in self._config.nodes.items())

    def touch(self, name: str) -> None:
        """What we hold there changed."""
        with self._lock:
            if self._on.get(name):
                self._stale.add(name)

    # lost nodes ---------------------------------------------------------------------------------------------------

    def late(self, age_s: float, since: float) -> list[tuple[str, float, str]]:
        """(node, age of its Lease in seconds, its stamp) of those whose Lease is older and who are not lost yet.
        `since`: when we last got in touch; what was not heard before does not count. When all nodes are late at once
        it is rather the way to them: then they are given `ALL_LATE` times as long."""
        now = time.monotonic()
        with self._lock:
            ages = {name: now - max(lease.seen_at, since) for name, lease in self._leases.items()
                    if name in self._objects and name not in self._lost}
            if len(ages) > 1 and min(ages.values()) >= age_s:
                age_s *= ALL_LATE
            return [(name, age, self._leases[name].stamp) for name, age in ages.items() if age >= age_s]

    def lose(self, name: str, stamp: str) -> None:
        """Not offered any more, until its Lease is renewed."""
        with self._lock:
            self._lost[name] = stamp
            self._stale.add(name)

    def silence(self, name: str, why: str) -> None:
        """Nothing new goes there, until its Lease is renewed."""
        with self._lock:
            if name not in self._silent:
                self._silent[name] = why
                self._stale.add(name)

    def is_lost(self, name: str) -> bool:
        with self._lock:
            return name in self._lost or name not in self._objects


def _stamp(lease: Json) -> str:
    return str(lease.get("spec", {}).get("renewTime") or "")
