"""Nodes: what is free on them, whose jobs are there, and whether anything may be bound to them."""

from __future__ import annotations

from dataclasses import replace

from jobsched.core import events as ev
from jobsched.core.answers import NodeAnswer, NodeState
from jobsched.core.cluster import Cluster
from jobsched.core.fleet import cordon_of
from jobsched.core.node import Cordon
from jobsched.core.resources import NodeName, Resources
from jobsched.core.suspicion import BY
from jobsched.errors import NotFound
from jobsched.live import LiveView
from jobsched.ports import Clock, Store
from jobsched.service.finding import suggest


class Nodes:
    def __init__(self, store: Store, live: LiveView, clock: Clock) -> None:
        self._store = store
        self._live = live
        self._clock = clock

    def every(self) -> tuple[NodeAnswer, ...]:
        """Every node that was ever seen, by name."""
        with self._live.view() as (cluster, _):
            return tuple(_node_answer(cluster, name) for name in sorted(cluster.fleet.nodes))

    def cordon(self, name: str, *, drain: bool = False, by: str = "") -> NodeAnswer:
        """Bind nothing new on the node; with `drain`, its attempts save and move away."""
        answer = self._node(name)
        known = answer.cordon
        if known is None or known.drain != drain or known.gpus or known.by == BY:
            event = ev.NodeCordoned(self._clock.now_ms(), answer.node.name, by, drain)
            self._store.append([event])
            self._live.wake()
            known = cordon_of(event)
        return replace(answer, cordon=known, state=_cordoned(known))

    def uncordon(self, name: str, *, by: str = "") -> NodeAnswer:
        answer = self._node(name)
        if answer.cordon is not None:
            self._store.append([ev.NodeUncordoned(self._clock.now_ms(), answer.node.name, by)])
            self._live.wake()
        return replace(answer, cordon=None, state="ready")

    def _node(self, name: str) -> NodeAnswer:
        with self._live.view() as (cluster, _):
            if name not in cluster.fleet.nodes:
                raise NotFound(f"there is no node {name!r}", hint=suggest(name, tuple(cluster.fleet.nodes), "nodes"))
            return _node_answer(cluster, NodeName(name))


def _node_answer(cluster: Cluster, name: NodeName) -> NodeAnswer:
    space = cluster.ledger.spaces.get(name)
    return NodeAnswer(
        node=cluster.fleet.nodes[name],
        free=cluster.ledger.free(name) if space else Resources(),
        free_gpus=space.whole_total if space else 0,
        state=_node_state(cluster, name),
        cordon=cluster.fleet.cordoned.get(name),
        jobs=tuple(cluster.fleet.jobs_on(name)),
    )


def _node_state(cluster: Cluster, name: NodeName) -> NodeState:
    if name in cluster.fleet.lost:
        return "lost"
    if not cluster.fleet.is_up(name):
        return "not ready"
    return "ready" if cluster.fleet.usable(name) else _cordoned(cluster.fleet.cordoned[name])


def _cordoned(cordon: Cordon) -> NodeState:
    return "probation" if cordon.by == BY else "draining" if cordon.drain else "cordoned"
