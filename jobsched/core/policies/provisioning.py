"""Nodes on demand: a gang that fits nowhere now but would fit on new nodes of a pool asks for those, all or nothing,
cheapest pool first; a pool that is late is left alone for a while and the next one by price is asked; nodes that nobody
used for a time are let go.

The loop follows Cluster Autoscaler (scale up for what cannot be scheduled, scale down what is unneeded for a time, back
off from a node group that does not deliver), with Kueue's ProvisioningRequest in mind: a gang asks once and whole. What
was asked is part of the job (`Job.asked`), so a new leader knows it. Called by the controller after each pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.job import Asked, Job, Shape
from jobsched.core.lines import Line
from jobsched.core.policies.admission import admit
from jobsched.core.policies.placement import Gang, place_gang
from jobsched.core.policies.quota import amounts_of
from jobsched.core.pools import BY, Demand, NodePool
from jobsched.core.resources import JobId, NodeName

LOOKED_AT = 256
"""Waiting jobs that one look considers, best first."""
LATE_FACTOR = 2
BACKOFF_MIN_MS = 10_000
BACKOFF_DOUBLINGS = 6

Decision = ev.CapacityRequested | ev.CapacityWithdrawn | ev.NodeCordoned | ev.NodeUncordoned


def provision(cluster: Cluster, now_ms: int) -> list[Decision]:
    """What to ask for, to take back and to let go. Cost: nodes of pools + jobs that ask + `LOOKED_AT`."""
    decisions: list[Decision] = []
    kept, going = _members(cluster)
    asking = dict(_still_asking(cluster, kept, now_ms, decisions))
    target = _targets(kept, asking)
    wanted = _ask(cluster, asking, target, going, now_ms, decisions)
    for pool in cluster.node_pools:
        _let_go(cluster, pool, kept[pool.name], pool.name in wanted, now_ms, decisions)
    gone = [name for name, cordon in cluster.fleet.cordoned.items() if cordon.by == BY and name in cluster.fleet.lost]
    decisions += [ev.NodeUncordoned(now_ms, name, BY) for name in gone]
    return decisions


def demands(cluster: Cluster) -> tuple[Demand, ...]:
    """What should exist of every pool, as decided so far."""
    kept, going = _members(cluster)
    target = _targets(kept, cluster.asking)
    return tuple(
        Demand(pool, max(pool.min, target[pool.name]), tuple(going[pool.name])) for pool in cluster.node_pools
    )


def next_look_ms(cluster: Cluster) -> int:
    """When something is to be decided although nothing happens; 0: never."""
    instants = [asked.until_ms for asked in cluster.asking.values()]
    instants += [_backoff_until(pool, cluster) for pool in cluster.node_pools if pool.name in cluster.late]
    pools = {pool.name: pool for pool in cluster.node_pools}
    instants += [since + pools[name].idle_ms for name, since in cluster.idle_since.values() if name in pools]
    return min(instants, default=0)


def _members(cluster: Cluster) -> tuple[dict[str, list[NodeName]], dict[str, list[NodeName]]]:
    """Nodes of each pool that are there: those that are kept, and those that are to go."""
    kept: dict[str, list[NodeName]] = {pool.name: [] for pool in cluster.node_pools}
    going: dict[str, list[NodeName]] = {pool.name: [] for pool in cluster.node_pools}
    for name, node in cluster.fleet.nodes.items():
        pool = next((pool for pool in cluster.node_pools if pool.has(node)), None)
        if pool is None or name in cluster.fleet.lost:
            continue
        cordon = cluster.fleet.cordoned.get(name)
        (going if cordon is not None and cordon.by == BY else kept)[pool.name].append(name)
    return kept, going


def _targets(kept: dict[str, list[NodeName]], asking: dict[JobId, Asked]) -> dict[str, int]:
    target = {name: len(nodes) for name, nodes in kept.items()}
    for asked in asking.values():
        if asked.pool in target:
            target[asked.pool] = max(target[asked.pool], asked.target)
    return target


def _still_asking(
    cluster: Cluster, kept: dict[str, list[NodeName]], now_ms: int, decisions: list[Decision]
) -> Iterator[tuple[JobId, Asked]]:
    """Those whose wait goes on; the others take back what they asked for."""
    for job_id, asked in cluster.asking.items():
        if asked.pool not in kept or cluster.line_of(job_id) is None:
            decisions.append(ev.CapacityWithdrawn(now_ms, job_id, asked.pool, "it does not wait for room any more"))
        elif now_ms >= asked.until_ms:
            came = len(kept[asked.pool]) >= asked.target
            text = "others took them" if came else f"pool {asked.pool} did not deliver in time"
            decisions.append(ev.CapacityWithdrawn(now_ms, job_id, asked.pool, text, late=not came))
        else:
            yield job_id, asked


def _ask(
    cluster: Cluster, asking: dict[JobId, Asked], target: dict[str, int], going: dict[str, list[NodeName]], now_ms: int,
    decisions: list[Decision],
) -> set[str]:  # fmt: skip
    """Pools that somebody waits for. What each job would take counts against quotas for those behind it."""
    late = {d.pool for d in decisions if isinstance(d, ev.CapacityWithdrawn) and d.late}
    open_pools = [p for p in cluster.node_pools if p.name not in late and _backoff_until(p, cluster) <= now_ms]
    wanted = {asked.pool for asked in asking.values()}
    with cluster.trial():
        for job in islice(_blocked(cluster), LOOKED_AT):
            if all(target[pool.name] >= pool.max for pool in open_pools):
                break
            shape = admit(cluster, job, now_ms)
            if not isinstance(shape, Shape):
                continue
            if job.id in asking:
                _count(cluster, job, shape)
            elif (found := _cheapest(open_pools, target, shape)) is not None:
                pool, nodes = found
                target[pool.name] += nodes
                wanted.add(pool.name)
                _count(cluster, job, shape)
                back = _kept_after_all(cluster, pool, going[pool.name], now_ms)[:nodes]
                going[pool.name] = [name for name in going[pool.name] if name not in back]
                decisions += [ev.NodeUncordoned(now_ms, name, BY) for name in back]
                if len(back) < nodes:
                    until_ms = now_ms + LATE_FACTOR * pool.delay_ms
                    decisions.append(
                        ev.CapacityRequested(now_ms, job.id, pool.name, nodes, target[pool.name], until_ms))
    return wanted


def _blocked(cluster: Cluster) -> Iterator[Job]:
    """Jobs of lines whose head was found not to fit, best first."""
    def waits(line: Line) -> bool:
        return line.blocked_at == line.stock.freed and line.refused_at != cluster.ledger.freed

    def places(line: Line) -> Iterator[tuple[int, int, str, Job]]:
        for place in line.places:
            if place.job_id in cluster.nominated:
                continue  # others make room for it
            yield -line.key.priority, place.submitted_at_ms, place.job_id, cluster.jobs[place.job_id]

    lines = [places(line) for line in cluster.lines.values() if waits(line)]
    return (entry[3] for entry in heapq.merge(*lines, key=lambda entry: entry[:3]))


def _cheapest(pools: list[NodePool], target: dict[str, int], shape: Shape) -> tuple[NodePool, int] | None:
    """The pool with room for the whole gang as it is preferred, else at its minimum."""
    least = replace(shape, roles=tuple(replace(role, prefer=role.min) for role in shape.roles))
    for size in (shape, least):
        found = [(pool, nodes_for(size, pool)) for pool in pools]
        found = [(pool, nodes) for pool, nodes in found if nodes and target[pool.name] + nodes <= pool.max]
        if found:
            return min(found, key=lambda entry: (entry[0].price * entry[1], entry[0].name))
    return None


@lru_cache(4_096)
def nodes_for(shape: Shape, pool: NodePool) -> int:
    """The fewest empty nodes of the pool that hold the gang at its preferred size; 0: no number up to its `max` does.
    O(log max) placements."""
    full = replace(shape, roles=tuple(replace(role, min=role.prefer) for role in shape.roles))
    replicas = sum(role.prefer for role in full.roles)
    low, high = 1, min(pool.max, max(1, replicas))
    if not _holds(full, pool, high):
        return 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _holds(full, pool, middle) else (middle + 1, high)
    return low


def _holds(shape: Shape, pool: NodePool, nodes: int) -> bool:
    empty = Cluster()
    for index in range(nodes):
        empty.evolve(ev.NodeSeen(0, pool.node(index)))
    with empty.trial():
        return isinstance(place_gang(empty, shape), Gang)


def _count(cluster: Cluster, job: Job, shape: Shape) -> None:
    for role in shape.roles:
        kind = role.gpu_kinds[0] if len(role.gpu_kinds) == 1 else ""
        for _ in range(role.min):
            cluster.quotas.book(job.spec.queue, job.owner, amounts_of(role, kind, role.gpu_milli), 1)
    if job.array_id:
        cluster.quotas.start(job.array_id, 1)


def _kept_after_all(cluster: Cluster, pool: NodePool, going: list[NodeName], now_ms: int) -> list[NodeName]:
    """Nodes that were to go long ago and still are there: whoever owns them keeps them."""
    return [name for name in going if now_ms - cluster.fleet.cordoned[name].since_ms >= LATE_FACTOR * pool.delay_ms]


def _backoff_until(pool: NodePool, cluster: Cluster) -> int:
    """When a pool that was late may be asked again; 0: at once."""
    times, since_ms = cluster.late.get(pool.name, (0, 0))
    if not times:
        return 0
    return since_ms + (max(BACKOFF_MIN_MS, LATE_FACTOR * pool.delay_ms) << min(times - 1, BACKOFF_DOUBLINGS))


def _let_go(
    cluster: Cluster, pool: NodePool, kept: list[NodeName], wanted: bool, now_ms: int, decisions: list[Decision]
) -> None:
    """Nodes that were idle for long enough, while nobody waits for the pool; those that run or hold something never."""
    spare = len(kept) - pool.min
    for name in kept:
        if cluster.fleet.on_node.get(name) or wanted or cluster.nominated or name in cluster.fleet.cordoned:
            cluster.idle_since.pop(name, None)
            continue
        _, since_ms = cluster.idle_since.setdefault(name, (pool.name, now_ms))
        if spare > 0 and now_ms - since_ms >= pool.idle_ms:
            spare -= 1
            cluster.idle_since.pop(name, None)
            why = f"idle for {pool.idle_ms // 1_000} s; pool {pool.name} lets it go"
            decisions.append(ev.NodeCordoned(now_ms, name, by=BY, why=why))
        elif spare <= 0:
            cluster.idle_since.pop(name, None)
