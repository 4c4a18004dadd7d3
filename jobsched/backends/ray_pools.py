"""Nodes on demand on Ray: what the cluster's autoscaler is asked for. Used by `ray`; decides nothing.

Ray keeps one request for a cluster (`ray.autoscaler.sdk.request_resources`), which outlives whoever made it and which
the next one replaces as a whole, whoever makes it. So everything is said each time: a bundle as large as a node for
each node that should exist, selected by the labels of its pool. Ray counts nodes that are there, used or not. Those
that are to go are left to the autoscaler, which ends what is idle and not asked for: nothing is bound there any more.

What Ray cannot be told: all or nothing (it makes what it can; gangs start once all nodes are there, and what came in
vain goes again), prices (the next pool is asked once one is late), and which of several idle nodes shall go. Its first
autoscaler knows no labels either: there the size of a pool's nodes must tell it from others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from jobsched.backends import ray_render as render
from jobsched.backends.ray_render import Json
from jobsched.core.node import Node
from jobsched.core.pools import Demand, NodePool
from jobsched.core.resources import WHOLE_GPU, Resources

AGAIN_S = 10.0
"""While nodes are missing the request is made again so often: somebody else may have replaced it."""


def request(demands: Sequence[Demand]) -> Json:
    """Arguments of `request_resources`."""
    wanted = [demand.pool for demand in demands for _ in range(demand.nodes)]
    return {
        "bundles": [_bundle(pool) for pool in wanted],
        "bundle_label_selectors": [render.selector(pool.labels) for pool in wanted],
    }


def _bundle(pool: NodePool) -> dict[str, float]:
    """A whole node, but for its memory: a type of node that does not tell how much it has counts as having none."""
    return render.amounts(Resources(pool.cpu_milli, 0, pool.gpus * WHOLE_GPU))


class Pools:
    """Remembers what was asked for. Not thread-safe."""

    def __init__(self) -> None:
        self._demands: tuple[Demand, ...] | None = None
        self._asked: Json | None = None
        self._asked_at = 0.0

    def want(self, demands: Sequence[Demand]) -> None:
        self._demands = tuple(demands)

    def ask_anew(self) -> None:
        """The last request may not have been heard."""
        self._asked = None

    def step(self, nodes: Iterable[Node]) -> Json | None:
        """What is to be requested now, with the nodes that there are; None: nothing."""
        if self._demands is None:
            return None
        wanted = request(self._demands)
        there = list(nodes)
        missing = any(
            sum(demand.pool.has(node) and node.name not in demand.release for node in there) < demand.nodes
            for demand in self._demands)
        if wanted == self._asked and not (missing and time.monotonic() - self._asked_at >= AGAIN_S):
            return None
        self._asked, self._asked_at = wanted, time.monotonic()
        return wanted
