"""Backfill: who goes first and does not fit gets a reservation, and later jobs start only where they cannot delay it.

A reservation names seats and an instant: the earliest at which enough of what runs is expected to be over. Seats of it
that are free already are kept free for it; a later job may use them only if it is expected to be over by then. One
reservation is EASY backfill (Lifka 1995), several are conservative backfill (Feitelson & Weil 1998). Run times come
from `estimate`. Called by `schedule`. Without it small jobs would keep a big gang waiting for ever.

The same holds for quotas: whom its queue's limit has kept waiting for a while gets a claim on the limit, and later jobs
of that queue start only if they are over by the time at which it is expected to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding, Job, Phase, Reason, RoleShape, Shape
from jobsched.core.plan import Reservation
from jobsched.core.policies.admission import admit
from jobsched.core.policies.ordering import OrderKey
from jobsched.core.policies.placement import Choice, Gang, Score, place_gang
from jobsched.core.policies.quota import Refused
from jobsched.core.resources import JobId

SOONEST = 400
"""Ends of running jobs looked at, soonest first; a gang that does not fit even then gets no reservation yet."""
SURE = 0.9
"""A later job counts as over in time when so many of its like would be."""


@dataclass(frozen=True, slots=True)
class Backfill:
    """How many of the first blocked jobs hold reservations; 1 is EASY."""

    depth: int = 1
    patience_ms: int = 60_000
    """After so long a wait a limit of its queue is claimed for a job."""


def releases(cluster: Cluster, now_ms: int, quantile: float) -> list[tuple[int, JobId]]:
    """When each active job is expected to give its seats back, soonest first. O(active jobs)."""
    found = []
    for levels in cluster.active.values():
        for members in levels.values():
            for job_id in members:
                job = cluster.jobs[job_id]
                left = 0 if job.phase is Phase.STOPPING else cluster.estimates.left_ms(job, now_ms, quantile)
                found.append((now_ms + left, job_id))
    found.sort()
    return found


def drop_stale(cluster: Cluster) -> None:
    """Forget reservations whose jobs wait no more, or that were made for other nodes. Whoever then stands first among
    those that do not fit gets the next. Before a pass, outside its trial."""
    kept = {
        job_id: claim
        for job_id, claim in cluster.reservations.items()
        if cluster.waits(job_id) and claim.made_for == cluster.pools_moved
    }
    if len(kept) < len(cluster.reservations):
        cluster.reservations = kept
        cluster.ledger.unblock()


def reserve(
    cluster: Cluster,
    job: Job,
    shape: Shape,
    key: OrderKey,
    claims: Sequence[Reservation],
    now_ms: int,
    score: Choice = Score.AUTO,
) -> Reservation | None:
    """The earliest seats for a gang that does not fit now, beside the claims of those before it; None when they are too
    far off to tell. Must run inside `cluster.trial()`; leaves the ledger as it was. O(log(running) * (lent seats + a
    placement)), with claims O(running * placements)."""
    ends = releases(cluster, now_ms, 0.5)[:SOONEST]
    ahead = [claim for claim in claims if claim.job_id != job.id]
    if ahead:
        found = _beside(cluster, job, shape, ends, ahead, now_ms, score)
    else:
        found = _first(cluster, job, shape, ends, score)
    if found is None:
        return None
    at_ms, gang = found
    roles = {role.role: role for role in shape.roles}
    seats = tuple((binding, roles[binding.role]) for binding in gang.bindings)
    return Reservation(job.id, at_ms, seats, key, gang.coordinator_port, cluster.pools_moved)


def reserve_limit(cluster: Cluster, job: Job, refused: Refused, key: OrderKey, now_ms: int) -> Reservation | None:
    """When the limit that keeps a job waiting is expected to let it pass, as others end; None when that is too far off
    to tell. Must run inside `cluster.trial()`; leaves it as it was. O(log(running) * lent seats)."""
    ends = releases(cluster, now_ms, 0.5)[:SOONEST]
    mark = cluster.mark()

    def passes(count: int) -> bool:
        cluster.rollback(mark)
        for _, job_id in ends[:count]:
            other = cluster.jobs[job_id]
            cluster.lend(other, [r for r in other.replicas.values() if r.binding is not None])
        return isinstance(admit(cluster, job, now_ms, least=True), Shape)

    few, many = 0, len(ends)
    found = passes(many)
    while found and many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if passes(middle) else (middle, many)
    cluster.rollback(mark)
    if not found or not many:
        return None
    owner = job.owner if refused.reason is Reason.QUOTA_USER else ""
    return Reservation(
        job.id, ends[many - 1][0], (), key, made_for=cluster.pools_moved, queue=job.spec.queue, owner=owner
    )


def _first(
    cluster: Cluster, job: Job, shape: Shape, ends: Sequence[tuple[int, JobId]], score: Choice
) -> tuple[int, Gang] | None:
    """After as few ends as possible: the more are over, the more fits."""
    ledger = cluster.ledger
    mark = ledger.mark()

    def fits(count: int) -> Gang | None:
        ledger.rollback(mark)
        for _, job_id in ends[:count]:
            _lend(cluster, cluster.jobs[job_id])
        gang = place_gang(cluster, shape, job.avoid, score)
        return gang if isinstance(gang, Gang) else None

    few, many = 0, len(ends)
    best = fits(many)
    while best is not None and many - few > 1:
        middle = (few + many) // 2
        gang = fits(middle)
        if gang is None:
            few = middle
        else:
            many, best = middle, gang
    ledger.rollback(mark)
    return None if best is None or not many else (ends[many - 1][0], best)


def _beside(
    cluster: Cluster, job: Job, shape: Shape, ends: Sequence[tuple[int, JobId]], ahead: Sequence[Reservation],
    now_ms: int, score: Choice,
) -> tuple[int, Gang] | None:  # fmt: skip
    """The first instant at which the gang fits and disturbs no claim that overlaps its own time."""
    ledger = cluster.ledger
    mark = ledger.mark()
    estimates, jobs = cluster.estimates, cluster.jobs
    over = {c.job_id: c.at_ms + estimates.left_ms(jobs[c.job_id], now_ms, SURE) for c in ahead}
    takes_ms = estimates.left_ms(job, now_ms, SURE)
    instants = sorted([(at, job_id) for at, job_id in ends] + [(at, None) for at in over.values()], key=lambda e: e[0])
    found = None
    for at_ms, job_id in instants:
        if job_id is not None:
            _lend(cluster, jobs[job_id])
        here = ledger.mark()
        keep_free(cluster, [c for c in ahead if c.at_ms < at_ms + takes_ms and over[c.job_id] > at_ms])
        gang = place_gang(cluster, shape, job.avoid, score)
        ledger.rollback(here)
        if isinstance(gang, Gang):
            found = (at_ms, gang)
            break
    ledger.rollback(mark)
    return found


def in_the_way(
    cluster: Cluster, job: Job, key: OrderKey, claims: Sequence[Reservation], now_ms: int
) -> list[Reservation]:
    """Reservations whose seats or limits a job must leave alone: it is not surely over before they begin. One of higher
    priority need not; an older one that came too late for a reservation must, because a promise was given."""
    ahead = [claim for claim in claims if claim.key[0] <= key[0] and claim.binds(job)]
    if not ahead:
        return []
    over_ms = now_ms + cluster.estimates.left_ms(job, now_ms, SURE)
    return [claim for claim in ahead if over_ms > claim.at_ms]


def keep_free(cluster: Cluster, claims: Sequence[Reservation]) -> list[tuple[Binding, RoleShape]]:
    """Inside a trial: book what is free of these seats, so that nothing else is placed there. `let_go` undoes it."""
    ledger = cluster.ledger
    kept: list[tuple[Binding, RoleShape]] = []
    for claim in claims:
        for binding, role in claim.seats:
            space = ledger.spaces.get(binding.node)
            if space is None:
                continue
            free = tuple(s for s in binding.gpus if space.gpu_free.get(s.gpu, 0) >= s.milli)
            part = replace(
                role,
                cpu_milli=max(0, min(role.cpu_milli, space.cpu_milli)),
                memory_bytes=max(0, min(role.memory_bytes, space.memory_bytes)),
            )
            seat = Binding(binding.role, binding.index, binding.node, free)
            ledger.take(seat, part)
            kept.append((seat, part))
    return kept


def seats_free(cluster: Cluster, claim: Reservation, shape: Shape) -> bool:
    """Take a reservation's seats, if all of them are free and it was made for this shape; else nothing."""
    ledger = cluster.ledger
    if len(claim.seats) != sum(role.prefer for role in shape.roles):
        return False
    mark = ledger.mark()
    for binding, role in claim.seats:
        space = ledger.spaces.get(binding.node)
        if (
            space is None
            or space.cpu_milli < role.cpu_milli
            or space.memory_bytes < role.memory_bytes
            or not space.ports_used.isdisjoint(binding.ports)
            or any(space.gpu_free.get(share.gpu, 0) < share.milli for share in binding.gpus)
        ):
            ledger.rollback(mark)
            return False
        ledger.take(binding, role)
    return True


def let_go(cluster: Cluster, kept: Sequence[tuple[Binding, RoleShape]]) -> None:
    for seat, part in kept:
        cluster.ledger.lend(seat, part)


def seats_of(cluster: Cluster, job: Job) -> tuple[tuple[Binding, RoleShape], ...]:
    """What an active job holds."""
    return tuple(
        cluster.on_node[r.binding.node][job.id, r.id] for r in job.replicas.values() if r.binding is not None
    )


def _lend(cluster: Cluster, job: Job) -> None:
    for binding, role in seats_of(cluster, job):
        cluster.ledger.lend(binding, role)
