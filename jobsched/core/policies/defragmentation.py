"""Defragmentation: moving jobs so that a gang which would fit, were the free GPUs together, starts.

Called by `schedule` for heads of lines that found no place. Nobody moves on a hunch: the whole move is tried on the
ledger first, and decided on only if the gang then has its places and everybody who gives way has others. The gang's
places are kept for it until it starts (`Cluster.nominated`).

Only jobs that lose little move: elastic ones, whose replicas leave one place and come back in another, and those that
saved a moment ago. A move costs the GPU time since the last checkpoint and a restart; the cheapest domain (a node, or
what the gang wants to be within) is cleared first, at most `most_moves` jobs and what `pays_ms` of the gang are worth.
KAI-Scheduler consolidates likewise, without asking what is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.job import Cause, FailureClass, Job, Outcome, Phase, Reason, Replica, ReplicaState, RoleShape, Shape
from jobsched.core.ledger import Space
from jobsched.core.node import domain
from jobsched.core.plan import Decision
from jobsched.core.policies.admission import admit
from jobsched.core.policies.placement import Gang, Score, place_gang, place_more
from jobsched.core.resources import WHOLE_GPU, NodeName
from jobsched.spec.job import resizes_in_place


@dataclass(frozen=True, slots=True)
class Defragmentation:
    every_ms: int = 30_000
    """How often a way is looked for."""
    heads: int = 4
    """Most waiting gangs looked at each time."""
    most_moves: int = 4
    """Most jobs moved for one gang."""
    fresh_ms: int = 60_000
    """A job counts as just saved for so long."""
    rest_ms: int = 120_000
    """No job moves sooner after its start."""
    restart_ms: int = 30_000
    """What a move costs beside what is lost; replicas that come and go in place cost a tenth of it."""
    pays_ms: int = 300_000
    """Running the gang for so long is worth as much as the moves may cost."""


@dataclass(frozen=True, slots=True)
class Move:
    """What one job gives up to get it elsewhere: some replicas in place, or all of them (`stops`)."""

    job: Job
    replicas: tuple[Replica, ...]
    stops: bool
    cost: int
    """GPU time lost, in thousandths of a GPU times milliseconds."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a gang comes to its places."""

    job: Job
    gang: Gang
    moves: tuple[Move, ...]


def find_way(cluster: Cluster, now_ms: int, how: Defragmentation, score: Score, heads: Sequence[Job]) -> Way | None:
    """The first of the waiting jobs that starts if others move, and how. Must run inside `cluster.trial()`; leaves it
    as it was. O(running jobs), for each head O(nodes + what may move), and the placements tried."""
    nodes: dict[NodeName, None] | None = None
    for job in heads[: how.heads]:
        shape = admit(cluster, job, now_ms, least=True)
        if isinstance(shape, Shape) and _enough_free(cluster, shape):
            if nodes is None:
                nodes = _with_movers(cluster, now_ms, how)
            way = _way(cluster, job, shape, nodes, now_ms, how, score) if nodes else None
            if way is not None:
                return way
    return None


def _enough_free(cluster: Cluster, shape: Shape) -> bool:
    """Whether the free whole GPUs would do if they were together; else moving is no help."""
    widest = _widest(shape)
    if widest is None:
        return False
    need = sum(r.min * (r.gpu_milli // WHOLE_GPU) for r in shape.roles)
    pool, classes = cluster.fleet.pool(shape), set(cluster.ledger.matching(widest))
    spaces = cluster.ledger.spaces
    return sum(n for name in pool if name in spaces for c, n in spaces[name].whole.items() if c in classes) >= need


def _widest(shape: Shape) -> RoleShape | None:
    roles = [role for role in shape.roles if role.gpu_milli >= WHOLE_GPU]
    return max(roles, key=lambda role: role.gpu_milli) if roles else None


def _way(
    cluster: Cluster, job: Job, shape: Shape, nodes: Collection[NodeName], now_ms: int, how: Defragmentation,
    score: Score,
) -> Way | None:  # fmt: skip
    """Clear domains, the cheapest first, until the gang fits; where it must be within one, each by itself."""
    moves: list[Move] = []
    limit = how.pays_ms * sum(r.min * r.gpu_milli for r in shape.roles)
    for bundle in _bundles(cluster, job, shape, nodes, now_ms, how):
        known = {move.job.id for move in moves}
        moves = list(bundle) if shape.within else [*moves, *(m for m in bundle if m.job.id not in known)]
        if len(moves) > how.most_moves or sum(move.cost for move in moves) > limit:
            if shape.within:
                continue
            return None
        gang = _works(cluster, job, shape, moves, score)
        if gang is None:
            continue
        for move in sorted(moves, key=lambda m: (-m.cost, m.job.id)):  # spare whoever need not move after all
            rest = [m for m in moves if m is not move]
            without = _works(cluster, job, shape, rest, score) if rest else None
            if without is not None:
                moves, gang = rest, without
        return Way(job, gang, tuple(moves))
    return None


def _works(cluster: Cluster, job: Job, shape: Shape, moves: Sequence[Move], score: Score) -> Gang | None:
    """The gang's places if it fits once these have left and all of them find places beside it. Leaves the trial as it
    was."""
    mark = cluster.mark()
    try:
        for move in moves:
            cluster.lend(move.job, move.replicas)
        gang = place_gang(cluster, shape, job.avoid, score)
        if not isinstance(gang, Gang):
            return None
        cluster.charge(job, gang.bindings, starts=True)
        for move in sorted(moves, key=lambda m: (-sum(_gpus(r) for r in m.replicas), m.job.id)):
            if not _finds_places(cluster, move, score):
                return None
        return gang
    finally:
        cluster.rollback(mark)


def _finds_places(cluster: Cluster, move: Move, score: Score) -> bool:
    shape, counts = cluster.shape(move.job), _counts(move.replicas)
    if move.stops:
        same = tuple(replace(r, min=counts.get(r.role, 0), prefer=counts.get(r.role, 0)) for r in shape.roles)
        return isinstance(place_gang(cluster, replace(shape, roles=same), move.job.avoid, score), Gang)
    leaving = {replica.id for replica in move.replicas}
    stay = [r.binding for r in move.job.replicas.values() if r.binding is not None and r.id not in leaving]
    for role in shape.roles:
        count = counts.get(role.role, 0)
        if count and len(place_more(cluster, shape, role, range(count), stay, score)) < count:
            return False
    return True


# ---- who may move ----


def _with_movers(cluster: Cluster, now_ms: int, how: Defragmentation) -> dict[NodeName, None]:
    """Nodes on which something runs that might move: an elastic job, or one that has saved a moment ago."""
    found: dict[NodeName, None] = {}
    for levels in cluster.active.values():
        for members in levels.values():
            for job_id in members:
                job = cluster.jobs[job_id]
                if cluster.shape(job).elastic or _fresh(job, now_ms, how):
                    found |= dict.fromkeys(r.binding.node for r in job.replicas.values() if r.binding is not None)
    return found


def _fresh(job: Job, now_ms: int, how: Defragmentation) -> bool:
    saved = job.checkpoint
    return saved is not None and saved.attempt == job.attempt and now_ms - saved.at_ms <= how.fresh_ms


def _bundles(
    cluster: Cluster, job: Job, shape: Shape, nodes: Collection[NodeName], now_ms: int, how: Defragmentation
) -> Iterator[tuple[Move, ...]]:
    """For each domain in which one replica (or, `within`, the gang) nearly has room: the cheapest moves that clear it;
    the cheapest domain first."""
    widest = _widest(shape)
    assert widest is not None
    level = shape.within or "node"
    need = sum(r.min * r.gpu_milli for r in shape.roles) if shape.within else widest.gpu_milli
    classes, pool = set(cluster.ledger.matching(widest)), cluster.fleet.pool(shape)
    in_question = {domain(cluster.fleet.nodes[name], level) for name in nodes if name in pool}
    domains: dict[str, dict[NodeName, Space]] = {}
    for name, space in cluster.ledger.spaces.items():
        if name in pool and (key := domain(space.node, level)) in in_question:
            domains.setdefault(key, {})[name] = space
    rows: list[tuple[int, str, tuple[Move, ...]]] = []
    for key, names in domains.items():
        spaces = names.values()
        free = WHOLE_GPU * sum(count for space in spaces for c, count in space.whole.items() if c in classes)
        if free >= need:
            continue  # room enough: something else is missing there
        offers = [
            move
            for job_id in dict.fromkeys(job_id for space in spaces for job_id in cluster.fleet.jobs_on(space.node.name))
            if (move := _offer(cluster.jobs[job_id], job, names, now_ms, how)) is not None
        ]
        chosen: list[Move] = []
        for move in sorted(offers, key=lambda m: (m.cost, m.job.id)):
            chosen.append(move)
            free += sum(_gpus(r) for r in move.replicas if r.binding is not None and r.binding.node in names)
            if free >= need:
                rows.append((sum(m.cost for m in chosen), key, tuple(chosen)))
                break
    yield from (moves for _, _, moves in sorted(rows, key=lambda row: row[:2]))


def _offer(job: Job, gang: Job, nodes: Collection[NodeName], now_ms: int, how: Defragmentation) -> Move | None:
    """What a job could give up in a domain without losing much."""
    bound = [r for r in job.replicas.values() if r.binding is not None]
    if job.phase is not Phase.RUNNING or job.cancel_by or job.stop_wish is not Reason.NONE or job.suspected_since_ms:
        return None
    if job.priority > gang.priority or now_ms - job.attempt_started_at_ms < how.rest_ms:
        return None
    if any(r.state is not ReplicaState.RUNNING for r in bound):
        return None
    here = tuple(r for r in bound if r.binding is not None and r.binding.node in nodes)
    if _may_leave(job, here, bound):
        return Move(job, here, False, how.restart_ms // 10 * sum(map(_gpus, here)))
    elastic = any(role.replicas.elastic for role in job.spec.roles.values())
    if not elastic and not _fresh(job, now_ms, how):
        return None
    lost_ms = job.unsaved_ms(now_ms) if not elastic else 0  # elastic jobs save when asked
    return Move(job, tuple(bound), True, (lost_ms + how.restart_ms) * sum(map(_gpus, bound)))


def _may_leave(job: Job, here: Sequence[Replica], bound: Sequence[Replica]) -> bool:
    """Whether these replicas may go and come back elsewhere while the attempt goes on."""
    counts, have = _counts(here), _counts(bound)
    return all(
        job.spec.roles[name].replicas.elastic
        and resizes_in_place(job.spec, name)
        and have[name] - count >= job.spec.roles[name].replicas.min
        for name, count in counts.items()
    )


def _counts(replicas: Sequence[Replica]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for replica in replicas:
        counts[replica.role] = counts.get(replica.role, 0) + 1
    return counts


def _gpus(replica: Replica) -> int:
    """In thousandths."""
    return sum(share.milli for share in replica.binding.gpus) if replica.binding is not None else 0


# ---- decisions ----


def decisions_of(way: Way, now_ms: int) -> list[Decision]:
    """Who leaves, each for the gang."""
    found: list[Decision] = []
    for move in way.moves:
        job, gang = move.job, way.job
        if move.stops:
            text = f"moves elsewhere, so that job {gang.name} of queue {gang.spec.queue} has its places together"
            cause = Cause(Reason.MOVED, FailureClass.PREEMPTED, text)
            outcome = Outcome(Phase.QUEUED, Reason.MOVED, cause, for_job=gang.id)
            found.append(ev.AttemptStopping(now_ms, job.id, job.attempt, outcome))
        else:
            ids = tuple(r.id for r in move.replicas)
            text = f"so that job {gang.name} of queue {gang.spec.queue} has its places together"
            found.append(ev.ReplicasReleased(now_ms, job.id, job.attempt, ids, Reason.MOVED, gang.id, text))
    return found
