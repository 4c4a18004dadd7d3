"""Seats on fewer nodes for jobs on more than they would have to be: replicas that talk over the network are slower.

Used by `preemption` for turns that ask for it (`Turn.gather`). A move costs a job its restart, so only those move that
have much to win by it, or little to lose: who asks to gather has long to run.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding, RoleShape, Shape
from jobsched.core.policies.placement import Gang, Score, place_gang
from jobsched.core.resources import WHOLE_GPU, JobId, NodeName

Bookings = Sequence[tuple[Binding, RoleShape]]


def lend(cluster: Cluster, bookings: Bookings) -> None:
    """As if they were gone; inside a trial."""
    for binding, role in bookings:
        cluster.ledger.lend(binding, role)


def gather(cluster: Cluster, shape: Shape, mine: Bookings, score: Score) -> Gang | None:
    """Seats on fewer nodes than a job has, which it then takes instead of its own."""
    nodes = len(nodes_of(mine))
    if nodes == 1:
        return None
    mark = cluster.ledger.mark()
    lend(cluster, mine)
    gang = place_gang(cluster, shape, (), score)
    if isinstance(gang, Gang) and len({binding.node for binding in gang.bindings}) < nodes:
        return gang
    cluster.ledger.rollback(mark)
    return None


def exchange(
    cluster: Cluster, shapes: Mapping[JobId, Shape], seats: Mapping[JobId, Bookings], runs: Container[JobId],
    score: Score,
) -> dict[JobId, Gang]:  # fmt: skip
    """Jobs that change places: one that is spread over nodes comes together on one of them, those that are wholly on
    that node go where it has been. `shapes`: who may be moved, best first; `seats`: what they have or will have, all of
    it taken; `runs`: who has been started, and moves only for others that have. Nobody ends up on more nodes than
    before, so that it comes to rest. O(jobs on the nodes of spread jobs)."""
    found: dict[JobId, Gang] = {}
    lives: dict[NodeName, list[JobId]] = {}
    for job_id in shapes:
        if len(nodes := nodes_of(seats[job_id])) == 1:
            lives.setdefault(next(iter(nodes)), []).append(job_id)
    for job_id in shapes:
        nodes = nodes_of(seats[job_id])
        if job_id in found or len(nodes) <= _fewest(cluster, seats[job_id]):
            continue
        for node in sorted(nodes, key=lambda name: (-nodes[name], name)):
            others = [o for o in lives.get(node, ()) if o not in found and (job_id in runs or o not in runs)]
            if moved := _exchanged(cluster, job_id, node, others, shapes, seats, score):
                found |= moved
                break
    return found


def _exchanged(
    cluster: Cluster, job_id: JobId, node: NodeName, others: Sequence[JobId], shapes: Mapping[JobId, Shape],
    seats: Mapping[JobId, Bookings], score: Score,
) -> dict[JobId, Gang]:  # fmt: skip
    """New places of a spread job and of as few as will do of the others on that node; empty: it does not work out."""
    ledger = cluster.ledger
    if node not in ledger.spaces:
        return {}
    mark = ledger.mark()
    lend(cluster, seats[job_id])
    need = _gpu_milli(seats[job_id]) - WHOLE_GPU * sum(ledger.spaces[node].whole.values())
    leave: list[JobId] = []
    for other in sorted(others, key=lambda each: (_gpu_milli(seats[each]), each)):
        if need > 0:
            lend(cluster, seats[other])
            leave.append(other)
            need -= _gpu_milli(seats[other])
    found: dict[JobId, Gang] = {}
    for each in (job_id, *leave):
        most = len(nodes_of(seats[each])) - (each == job_id)
        gang = place_gang(cluster, shapes[each], (), score)
        if not isinstance(gang, Gang) or len({binding.node for binding in gang.bindings}) > most:
            ledger.rollback(mark)
            return {}
        found[each] = gang
    return found


def nodes_of(bookings: Bookings) -> dict[NodeName, int]:
    """Node -> thousandths of its GPUs."""
    found: dict[NodeName, int] = {}
    for binding, role in bookings:
        found[binding.node] = found.get(binding.node, 0) + role.gpu_milli
    return found


def _gpu_milli(bookings: Bookings) -> int:
    return sum([role.gpu_milli for _, role in bookings])


def _fewest(cluster: Cluster, bookings: Bookings) -> int:
    """On how few nodes of the same GPUs so much would fit, if they were free; the number of its nodes where that cannot
    be told."""
    for binding, role in bookings:
        space = cluster.ledger.spaces.get(binding.node)
        if space is None:
            break
        if role.gpu_milli >= WHOLE_GPU and binding.gpus:
            widest = cluster.fleet.widest(space.gpu_class[binding.gpus[0].gpu])
            return -(-_gpu_milli(bookings) // (widest * WHOLE_GPU))
    return len(nodes_of(bookings))
