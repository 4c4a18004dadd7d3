"""Backfill: who goes first and does not fit gets a reservation, and later jobs start only where they cannot delay it.

A reservation names seats and an instant: the earliest at which enough of what runs is expected to be over. Seats of it
that are free already are kept free for it; a later job may use them only if it is expected to be over by then. One
reservation is EASY backfill (Lifka 1995), several are conservative backfill (Feitelson & Weil 1998). Run times come
from `estimate`; when what runs takes longer than they said, the reservation is put off, so that others use the time.
Called by `schedule`. Without it small jobs would keep a big gang waiting for ever.

The same holds for quotas: whom its queue's limit has kept waiting for a while gets a claim on the limit, and later jobs
of that queue start only if they are over by the time at which it is expected to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
SEATS = 4_000
"""Most of their replicas looked at."""
FAR_OFF_KEPT = 1_000
RESERVATIONS = 16
"""Most reservations in the whole cluster, unless one part of it may have more: each costs whoever comes behind it."""
SURE = 0.9
"""A later job counts as over in time when so many of its like would be."""


@dataclass(frozen=True, slots=True)
class Backfill:
    """How many of the first blocked jobs hold reservations; 1 is EASY."""

    depth: int = 1
    """So many on the GPUs that a job may use: jobs that want other kinds or other nodes have reservations of their own,
    or they would not be kept from starving. Altogether no more than `RESERVATIONS`, or than this."""
    patience_ms: int = 60_000
    """After so long a wait a limit of its queue is claimed for a job, and so long after the instant that a job was
    promised it is promised another."""


def meets(cluster: Cluster, shape: Shape, claim: Reservation) -> bool:
    """Whether any of the claimed seats is one that such a job might have."""
    ledger, pool = cluster.ledger, cluster.fleet.pool(shape)
    classes = {cls for role in shape.roles if role.gpu_milli for cls in ledger.matching(role)}
    for binding, _ in claim.seats:
        space = ledger.spaces.get(binding.node) if binding.node in pool else None
        if space is not None and (
            not classes or not binding.gpus or any(space.gpu_class.get(s.gpu) in classes for s in binding.gpus)
        ):  # fmt: skip
            return True
    return False


def soonest(cluster: Cluster, now_ms: int) -> list[tuple[int, JobId]]:
    """When the first `SOONEST` of the jobs that hold seats are likely to give them back."""
    jobs = cluster.jobs
    stopping = [(now_ms, job_id) for job_id in cluster.leaving if jobs[job_id].phase is Phase.STOPPING]
    running = cluster.ends.soonest(SOONEST, jobs, cluster.estimates, now_ms)
    return sorted([*stopping, *[(end.at_ms, end.job_id) for end in running]])[:SOONEST]


def drop_stale(cluster: Cluster) -> None:
    """Forget reservations whose jobs wait no more, or that were made for other nodes. Whoever then stands first among
    those that do not fit gets the next. Before a pass, outside its trial."""
    kept = {
        job_id: claim
        for job_id, claim in cluster.reservations.items()
        if cluster.waits(job_id) and claim.made_for == cluster.fleet.moved
    }
    if len(kept) < len(cluster.reservations):
        cluster.reservations = kept
        cluster.ledger.unblock()
    if len(cluster.far_off) > FAR_OFF_KEPT:
        cluster.far_off = {job_id: at for job_id, at in cluster.far_off.items() if cluster.waits(job_id)}


def reserve(
    cluster: Cluster,
    job: Job,
    shape: Shape,
    key: OrderKey,
    claims: Sequence[Reservation],
    ends: Sequence[tuple[int, JobId]],
    now_ms: int,
    score: Choice = Score.AUTO,
) -> Reservation | int:
    """The earliest seats for a gang that does not fit now, beside the claims of those before it; when they are too far
    off to tell, the instant at which it is worth another look. `ends`: who ends soonest. Must run inside
    `cluster.trial()`; leaves the ledger as it was. O(seats lent + log(those) placements), with claims O(running *
    placements)."""
    ahead = [claim for claim in claims if claim.job_id != job.id]
    if ahead:
        found = _beside(cluster, job, shape, ends, ahead, now_ms, score)
    else:
        found = _first(cluster, job, shape, ends, score)
    if found is None:
        return max(now_ms + 1, ends[len(ends) // 4][0]) if ends else now_ms + 1
    at_ms, gang = found
    roles = shape.by_name
    seats = tuple((binding, roles[binding.role]) for binding in gang.bindings)
    return Reservation(job.id, at_ms, seats, key, gang.coordinator_port, cluster.fleet.moved)


def reserve_limit(
    cluster: Cluster, job: Job, refused: Refused, key: OrderKey, ends: Sequence[tuple[int, JobId]], now_ms: int
) -> Reservation | None:
    """When the limit that keeps a job waiting is expected to let it pass, as others end; None when that is too far off
    to tell. Must run inside `cluster.trial()`; leaves it as it was. O(log(running) * lent seats)."""
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
        job.id, ends[many - 1][0], (), key, made_for=cluster.fleet.moved, queue=job.spec.queue, owner=owner
    )


def _first(
    cluster: Cluster, job: Job, shape: Shape, ends: Sequence[tuple[int, JobId]], score: Choice
) -> tuple[int, Gang] | None:
    """After as few ends as possible: the more are over, the more fits. Tries 1, 2, 4, … of them, then halves the last
    step."""
    ledger = cluster.ledger
    need = shape.least_gpu_milli
    marks = [ledger.mark()]
    """Before each of the ends that are lent."""

    def over(count: int) -> None:
        if count < len(marks) - 1:
            ledger.rollback(marks[count])
            del marks[count + 1 :]
        for _, job_id in ends[len(marks) - 1 : count]:
            _lend(cluster, cluster.jobs[job_id])
            marks.append(ledger.mark())

    def fits() -> Gang | None:
        if ledger.free_gpu_milli < need:
            return None
        gang = place_gang(cluster, shape, job.avoid, score)
        ledger.rollback(marks[-1])
        return gang if isinstance(gang, Gang) else None

    few, many, best = 0, 0, None
    while best is None and many < len(ends) and marks[-1] - marks[0] < SEATS:
        few, many = many, min(len(ends), 2 * many or 1)
        over(many)
        best = fits()
    while best is not None and many - few > 1:
        middle = (few + many) // 2
        over(middle)
        gang = fits()
        if gang is None:
            few = middle
        else:
            many, best = middle, gang
    ledger.rollback(marks[0])
    return None if best is None else (ends[many - 1][0], best)


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
        Guard(cluster).keep([c for c in ahead if c.at_ms < at_ms + takes_ms and over[c.job_id] > at_ms])
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


@dataclass(slots=True)
class Guard:
    """Inside a trial: books what is free of the seats of reservations, so that nothing else is placed there. They stay
    booked until other ones are to be kept or all are let go, because most jobs have to leave the same ones alone."""

    cluster: Cluster
    claims: list[Reservation] = field(default_factory=list)
    """Whose seats are kept."""
    milli: int = 0
    """Thousandths of GPUs that are kept."""
    last: tuple[Sequence[Reservation], int, int] = ((), 0, -1)
    """Whose seats were kept last, how many thousandths of GPUs of them were free, and how many were in all."""
    _kept: list[tuple[Binding, RoleShape]] = field(default_factory=list)

    def keep(self, claims: Sequence[Reservation]) -> None:
        """Keep the seats of these, and of no others."""
        if list(claims) == self.claims:
            return
        self.let_go()
        self.claims, free = list(claims), self.cluster.ledger.free_gpu_milli
        for claim in claims:
            for binding, role in claim.seats:
                self._book(binding, role)
        self.last = self.claims, self.milli, free

    def _book(self, binding: Binding, role: RoleShape) -> None:
        ledger = self.cluster.ledger
        space = ledger.spaces.get(binding.node)
        if space is None:
            return
        free = tuple([s for s in binding.gpus if space.gpu_free.get(s.gpu, 0) >= s.milli])
        part = replace(
            role,
            cpu_milli=max(0, min(role.cpu_milli, space.cpu_milli)),
            memory_bytes=max(0, min(role.memory_bytes, space.memory_bytes)),
        )
        seat = Binding(binding.role, binding.index, binding.node, free)
        before = ledger.free_gpu_milli
        ledger.take(seat, part)
        self.milli += before - ledger.free_gpu_milli
        self._kept.append((seat, part))

    def let_go(self) -> None:
        for seat, part in self._kept:
            self.cluster.ledger.lend(seat, part)
        self._kept.clear()
        self.claims, self.milli = [], 0


def seats_free(cluster: Cluster, claim: Reservation, shape: Shape) -> bool:
    """Take a reservation's seats, if all of them are free and it was made for this shape; else nothing."""
    ledger = cluster.ledger
    if len(claim.seats) != sum(role.prefer for role in shape.roles):
        return False
    mark = ledger.mark()
    for binding, role in claim.seats:
        if not ledger.has_room_for(binding, role):
            ledger.rollback(mark)
            return False
        ledger.take(binding, role)
    return True


def seats_of(cluster: Cluster, job: Job) -> tuple[tuple[Binding, RoleShape], ...]:
    """What an active job holds."""
    return tuple(
        cluster.fleet.on_node[r.binding.node][job.id, r.id] for r in job.replicas.values() if r.binding is not None
    )


def _lend(cluster: Cluster, job: Job) -> None:
    for binding, role in seats_of(cluster, job):
        cluster.ledger.lend(binding, role)
