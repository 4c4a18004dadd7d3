"""The scheduling pass: cluster + now + policy -> plan. Pure: it works on ledger and quotas inside a trial.

Cost follows what may have changed: a line whose head did not fit is not looked at again until something became free
(`Ledger.freed`), so a pass over 10^5 unchanged waiting jobs costs the number of distinct lines at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding, Job, Reason, ReplicaState, Shape
from jobsched.core.lines import Alike, Line, Rank, all_alike, equal_rank
from jobsched.core.plan import Decision, Plan, Reservation
from jobsched.core.policies.admission import admit, least_needs, more
from jobsched.core.policies.backfill import (
    Backfill,
    Guard,
    drop_stale,
    in_the_way,
    reserve,
    reserve_limit,
    seats_free,
    soonest,
)
from jobsched.core.policies.defragmentation import Defragmentation, decisions_of, find_way
from jobsched.core.policies.elasticity import WAITING, Elasticity, rebalance, start_gang
from jobsched.core.policies.fairness import FairShare, Turn, turn
from jobsched.core.policies.health import Health
from jobsched.core.policies.ordering import Factors, Ordering, OrderKey, multifactor, priority
from jobsched.core.policies.placement import Gang, Score, place_gang, place_more
from jobsched.core.policies.preemption import Replan, replan
from jobsched.core.policies.quota import Books, Refused
from jobsched.core.policies.room import Room
from jobsched.core.policies.victims import Preemption, Victim, evictions, may_claim
from jobsched.core.pools import NodePool
from jobsched.core.resources import JobId
from jobsched.spec.job import resizes_in_place

NOTHING_TO_DO = Plan()
EVICTIONS = 100
"""Most victims found in one pass, give or take those of one gang: each search costs what those before it found."""
BEHIND = 50
"""Jobs looked at in a pass behind those that only a reservation keeps from starting."""
DROPS = 8
"""All lines are looked through once one in so many was dropped."""
VAIN = 2
"""Gangs more than may hold reservations for which seats are sought in a pass, when those are too far off to tell."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Named pure functions chosen in the server's config."""

    ordering: Ordering = priority
    factors: Factors | None = None
    """Weighted factors in place of `ordering`."""
    rank: Rank = equal_rank
    """Order between like jobs, before their age."""
    alike: Alike = all_alike
    """Which of them are alike."""
    preemption: Preemption | None = None
    """Room is made for waiting jobs: reclaim and priority; None: nobody is stopped for another."""
    fair: FairShare | None = None
    """Queues take turns by fair share, `ordering` holds within each; None: `ordering` over all queues together."""
    backfill: Backfill | None = None
    """The first that do not fit hold reservations which later jobs respect; None: whatever fits starts."""
    strict: bool = False
    """When the first job of a queue does not fit, its others wait too (Kueue's StrictFIFO, Helios)."""
    replan: Replan | None = None
    """All runnable jobs are placed anew at each pass, in an order of its own."""
    elastic: Elasticity | None = None
    """Elastic jobs get the sizes that speed them up most; None: those that their specs prefer."""
    defragmentation: Defragmentation | None = None
    """Jobs that lose little move when a waiting gang then starts; None: nobody moves."""
    pass_every_ms: int = 0
    """Passes only at multiples of this; 0: whenever something happened."""
    score: Score = Score.AUTO
    node_pools: tuple[NodePool, ...] = ()
    """Nodes that can be had (`policies.provisioning`)."""
    health: Health | None = None
    """When nodes are doubted; None: never."""
    batch: int = 1_000
    """Most gangs placed in one pass, so that a cold start with a long queue still answers in between."""

    def order(self, cluster: Cluster, now_ms: int) -> Ordering | None:
        """Who goes first among those that wait, as it is now; None: a `replan` weighs all jobs anew."""
        if self.replan is not None:
            return None
        return self.ordering if self.factors is None else multifactor(cluster, now_ms, self.factors)


@dataclass(slots=True)
class Pass:
    """One pass under way, inside `cluster.trial()`; each step adds its decisions and books them at once, so that the
    next step sees what is left."""

    cluster: Cluster
    now_ms: int
    policy: Policy
    decisions: list[Decision] = field(default_factory=list)
    examined: int = 0
    settled: set[JobId] = field(default_factory=set)
    """Waiting jobs about which this pass has decided: they start, or places are kept for them."""
    guard: Guard = field(init=False)
    """Keeps reserved seats free."""
    room: Room = field(init=False)
    """Who leaves for whom, and what there is then."""
    claims: list[Reservation] = field(init=False)
    """Reservations, with those that this pass makes."""
    eased: bool = False
    """Whether a reservation was taken back or put off, so that it hinders fewer than before."""
    sought: int = 0
    """Searches for seats that are too far off to tell."""
    _ends: list[tuple[int, JobId]] | None = None
    _sated: bool | None = None
    _claimants: dict[tuple[str, int], bool] = field(default_factory=dict)
    """(Queue, priority) -> whether its jobs may make others leave."""

    def __post_init__(self) -> None:
        self.guard = Guard(self.cluster)
        self.room = Room(self.cluster, self.guard)
        self.claims = list(self.cluster.reservations.values())

    @property
    def full(self) -> bool:
        """Whether the rest is left to the next pass."""
        return len(self.decisions) >= self.policy.batch or len(self.room.evicted) >= EVICTIONS

    def ends(self) -> list[tuple[int, JobId]]:
        """When those that run are likely to end; reckoned when first asked for."""
        if self._ends is None:
            self._ends = soonest(self.cluster, self.now_ms)
        return self._ends

    @property
    def sated(self) -> bool:
        """Whether the pass has no reservation for those without one: all are held, or too many were sought in vain."""
        if self._sated is None:
            how = self.policy.backfill
            held = sum([1 for claim in self.claims if claim.seats])
            self._sated = how is None or held >= how.depth or self.sought >= how.depth + VAIN
        return self._sated

    def reserved(self, job: Job, found: Reservation | None) -> None:
        """A job has this reservation in place of what it had."""
        self._sated = None
        self.claims[:] = [claim for claim in self.claims if claim.job_id != job.id]
        before = self.cluster.reservations.pop(job.id, None)
        if before is not None or found is not None:
            self.cluster.claims_made += 1  # whom one hindered is worth another try
        if found is not None:
            self.cluster.reservations[job.id] = found
            self.claims.append(found)
        if before is not None and (found is None or found.at_ms > before.at_ms):
            self.eased = True

    def pass_over(self, line: Line, head: JobId) -> bool:
        """Whether nothing can come of a look at a line: its jobs need more GPUs than are free, there is no reservation
        to give, and nobody would have to leave for them. If so, it is left alone until something becomes free."""
        cluster, key, how = self.cluster, line.key, self.policy.preemption
        if (
            key.shape.least_gpu_milli <= self.room.free_milli(line.stock)
            or not self.sated or head in cluster.reservations
        ):  # fmt: skip
            return False
        if cluster.quotas.account(key.queue).bounded:
            return False
        if how is not None and self.room.vain.get(key.queue, 0) < how.tries:
            level = (key.queue, key.priority)
            if level not in self._claimants:
                self._claimants[level] = may_claim(cluster, how, key)
            if self._claimants[level]:
                return False
        line.blocked_at = line.stock.freed
        line.hindered_at = -1
        return True

    def hopeful(self, lines: Sequence[Line]) -> Sequence[Line]:
        """These lines without those from which nothing can come."""
        if self.policy.strict:
            return lines
        return [line for line in lines if not self.pass_over(line, line.places[0].job_id)]

    def start(self, job: Job, shape: Shape) -> bool:
        """Place a waiting job's gang, if it fits."""
        if job.id in self.cluster.targets:
            gang = start_gang(self.cluster, job, shape, self.now_ms)
        else:
            gang = place_gang(self.cluster, shape, job.avoid, self.policy.score)
        if isinstance(gang, Gang):
            self.charge(job, gang)
            self.place(job, gang)
        return isinstance(gang, Gang)

    def charge(self, job: Job, gang: Gang) -> None:
        """Count a gang that starts in its queue, where a limit or an order could tell."""
        cluster, policy = self.cluster, self.policy
        if (
            job.array_id or policy.fair is not None or policy.factors is not None
            or cluster.quotas.account(job.spec.queue).bounded
        ):  # fmt: skip
            cluster.charge(job, gang.bindings, starts=True)

    def place(self, job: Job, gang: Gang) -> None:
        """Decide that a job starts in places which are taken already."""
        attempt = job.attempt + 1
        self.decisions.append(ev.AttemptPlaced(self.now_ms, job.id, attempt, gang.bindings, gang.coordinator_port))
        self.cluster.ledger.stay(gang.bindings)
        self.settled.add(job.id)

    def keep(self, job: Job, gang: Gang) -> None:
        """Keep places for a job that cannot start in them yet."""
        self.room.keep(job, gang)
        self.settled.add(job.id)

    def heads(self, line: Line) -> Iterator[Job]:
        """The jobs of a line about which nothing is decided yet, best first."""
        for place in line.places:
            if place.job_id not in self.settled:
                yield self.cluster.jobs[place.job_id]


def schedule(cluster: Cluster, now_ms: int, policy: Policy) -> Plan:
    """One pass.

    1. Jobs whose backoff is over join their lines; lines that wait for a budget's window are worth a try in the next.
    2. Running jobs below their minimum get replicas back.
    3. Jobs for which others had to make room start, or their places are kept.
    4. Waiting jobs start, best first. For a head that does not fit, room is made if it has a claim: elastic jobs
       shrink, borrowers and lower priorities stop. Else its line is left until something becomes free. When free
       GPUs only have to be brought together, jobs that lose little move.
    5. Elastic jobs change their size where that pays; running jobs below what they want grow into what is left.

    With a `replan`, all runnable jobs are placed anew in its order instead of 3 and 4.
    """
    cluster.unpark(now_ms)
    if policy.pass_every_ms and now_ms % policy.pass_every_ms:
        cluster.next_pass_ms = now_ms - now_ms % policy.pass_every_ms + policy.pass_every_ms if cluster.jobs else 0
        return NOTHING_TO_DO
    _turn_windows(cluster, now_ms)
    if policy.fair is not None:
        cluster.quotas.age(now_ms, policy.fair.half_life_ms, policy.fair.entry_ms)
    elif policy.factors is not None:
        cluster.quotas.age(now_ms, policy.factors.half_life_ms, 0)
    if policy.factors is not None:
        policy = replace(policy, ordering=multifactor(cluster, now_ms, policy.factors))
    if policy.backfill is not None:
        drop_stale(cluster)
    freed = cluster.ledger.freed
    hungry: list[Job] = []
    if cluster.growing:
        hungry += [cluster.jobs[job_id] for job_id, tried in cluster.growing.items() if tried != freed]
        hungry.sort(key=_by_claim)
    if policy.replan is None:
        _ripe(cluster, now_ms)
        if policy.backfill is not None:
            _overdue(cluster, policy.backfill, now_ms)
    seen = (freed, cluster.lines.news, cluster.lines.started, cluster.claims_made)
    lines = list(_worth_a_try(cluster, policy)) if policy.replan is None and cluster.looked != seen else []
    plan = NOTHING_TO_DO
    if lines or hungry or policy.replan is not None or cluster.nominated or _turns_to(cluster, now_ms, policy):
        run = Pass(cluster, now_ms, policy, examined=len(hungry))
        with cluster.trial():
            _steps(run, hungry, run.hopeful(lines))
        plan = Plan(tuple(run.decisions), run.examined, run.full or run.eased)
    cluster.looked = None if plan.more or cluster.nominated else _once_folded(seen, plan.decisions)
    if policy.replan is None:
        instants = list(cluster.ripening.values())
        if policy.backfill is not None:
            late_ms = [claim.at_ms + policy.backfill.patience_ms for claim in cluster.reservations.values()]
            instants += [max(at_ms, cluster.overdue_ms) for at_ms in late_ms]
        if cluster.window_ms and cluster.lines:
            instants.append(cluster.window_ms)
        if policy.elastic is not None and cluster.elastic:
            instants.append(cluster.resize_ms)
        if policy.defragmentation is not None and cluster.lines:
            instants.append(cluster.tidy_ms)
        cluster.next_pass_ms = min(instants, default=0)
    return plan


def _steps(run: Pass, hungry: Sequence[Job], lines: Sequence[Line]) -> None:
    """Inside a trial, steps 2 to 5 of a pass."""
    policy = run.policy
    for job in hungry:
        if below_minimum(job):
            grow(run, job)
    moving: list[Decision] = []
    if policy.replan is not None:
        _replan(run, policy.replan)
    else:
        start_nominated(run)
        start_waiting(run, lines)
        run.decisions += evictions(run.cluster, run.room.evicted, run.now_ms)
        if policy.defragmentation is not None and not run.room.evicted:
            moving = defragment(run, policy.defragmentation)
    run.decisions += moving
    leaving = {d.job_id for d in run.decisions if isinstance(d, ev.AttemptStopping)}
    if policy.elastic is not None and not (leaving or run.room.evicted or moving):
        run.decisions += resize(run, policy.elastic)
        leaving = {d.job_id for d in run.decisions if isinstance(d, ev.AttemptStopping)}
    if len(run.decisions) < policy.batch:
        for job in hungry:
            if not below_minimum(job) and job.id not in leaving:
                grow(run, job)


def _once_folded(seen: tuple[int, int, int, int], decisions: Sequence[Decision]) -> tuple[int, int, int, int] | None:
    """What the next pass sees if nothing but these decisions is folded, and they only start jobs; else None."""
    if not decisions:
        return seen
    starts = sum([isinstance(decision, ev.AttemptPlaced) for decision in decisions])
    freed, news, started, claims = seen
    return (freed, news, started + starts, claims) if starts == len(decisions) else None


def _turns_to(cluster: Cluster, now_ms: int, policy: Policy) -> bool:
    """Whether it is time for what is done now and then."""
    sizes = policy.elastic is not None and bool(cluster.elastic) and now_ms >= cluster.resize_ms
    return sizes or (policy.defragmentation is not None and bool(cluster.lines) and now_ms >= cluster.tidy_ms)


def _turn_windows(cluster: Cluster, now_ms: int) -> None:
    """A budget's window that begins gives its queues another try."""
    if cluster.window_ms and now_ms >= cluster.window_ms:
        cluster.ledger.unblock()
    cluster.window_ms = cluster.quotas.next_window_ms(now_ms)


def _replan(run: Pass, how: Replan) -> None:
    """Quotas and array limits count from nothing: whoever stands first gets them first."""
    cluster, now_ms, policy = run.cluster, run.now_ms, run.policy

    def booked(job: Job, bindings: tuple[Binding, ...]) -> None:
        if job.array_id or cluster.quotas.account(job.spec.queue).bounded:
            cluster.charge(job, bindings, starts=True)

    with cluster.quotas.seen_as(Books()):
        decisions, examined = replan(
            cluster, now_ms, how, policy.score,
            admit=lambda job: admit(cluster, job, now_ms),
            booked=booked,
        )  # fmt: skip
    run.decisions += decisions
    run.examined += examined
    if policy.pass_every_ms:
        cluster.next_pass_ms = now_ms + policy.pass_every_ms if cluster.jobs else 0


def _by_claim(job: Job) -> tuple[int, int, str]:
    return (-job.priority, job.submitted_at_ms, str(job.id))


def below_minimum(job: Job) -> bool:
    have: dict[str, int] = {}
    for replica in job.replicas.values():
        have[replica.role] = have.get(replica.role, 0) + (replica.binding is not None)
    return any(have.get(name, 0) < role.replicas.min for name, role in job.spec.roles.items())


# ---- waiting jobs ----


def start_waiting(run: Pass, lines: Iterable[Line]) -> None:
    """Start the jobs of these lines, best first."""
    cluster, policy = run.cluster, run.policy
    heads, claims, looks = Heads(run, lines), run.claims, BEHIND
    while not run.full and (head := heads.pop()) is not None:
        line, at = head
        place = line.places[at]
        if line.key.queue in cluster.lines.stuck:
            continue
        if not policy.strict and run.pass_over(line, place.job_id):
            heads.drop(run.pass_over)
            continue
        job, key = cluster.jobs[place.job_id], policy.ordering(line.key, place)
        run.examined += 1
        shape = admit(cluster, job, run.now_ms)
        near = isinstance(shape, Shape) and _might_fit(run, line, shape)
        felt = claims if near else [claim for claim in claims if claim.queue]
        others = in_the_way(cluster, job, key, felt, run.now_ms) if felt else []
        barred = bool(others) and _barred(cluster, job, others)
        if near and not barred and isinstance(shape, Shape) and _start(run, line, job, shape, others):
            heads.push(line, at + 1)
            continue
        if isinstance(shape, Refused):
            line.refused_at, line.hindered_at = cluster.ledger.freed, -1
            if policy.backfill is not None:
                _claim_limit(run, policy.backfill, job, shape, key)
        else:
            line.blocked_at = line.stock.freed
            line.hindered_at = cluster.claims_made if others else -1
            if near and others and looks > 0:  # who stands behind it may be over sooner
                looked, found = heads.seek(line, at, looks, partial(_freer, run, key, claims, len(others)))
                looks -= looked
                if found:
                    if policy.backfill is not None and job.id not in run.settled:
                        _reserve(run, policy.backfill, job, shape, key)
                    continue
        if policy.preemption is not None and not barred:
            make_room(run, policy.preemption, line)
        if policy.backfill is not None and isinstance(shape, Shape) and job.id not in run.settled:
            _reserve(run, policy.backfill, job, shape, key)
        if policy.strict:
            cluster.lines.stuck[line.key.queue] = line
    run.room.leave()
    run.guard.let_go()


def _barred(cluster: Cluster, job: Job, others: Sequence[Reservation]) -> bool:
    """Whether a limit is promised to another job, and was not promised to this one for an earlier instant."""
    mine = cluster.reservations.get(job.id)
    since_ms = mine.at_ms if mine is not None and mine.queue else 0
    return any(claim.limits(job) and not 0 < since_ms <= claim.at_ms for claim in others)


def _start(run: Pass, line: Line, job: Job, shape: Shape, others: Sequence[Reservation]) -> bool:
    """Start a job that has to leave the seats of others alone: in those that were reserved for it, else in any. Where
    it may use reserved seats, it takes others if there are any."""
    run.room.leave()
    guard, mine = run.guard, run.cluster.reservations.get(job.id)
    kept = [claim for claim in others if claim.seats]
    if mine is None and all(claim in guard.claims for claim in kept):
        if run.start(job, shape):
            return True
        if len(kept) == len(guard.claims) or not _might_fit(run, line, shape):
            return False
    guard.keep(kept)
    if (mine is not None and _sit_down(run, job, shape, mine)) or run.start(job, shape):
        return True
    if mine is None:
        return False
    # Of two that hinder each other the one with the earlier promise goes, or neither would ever start: run times are
    # expected to be longer now than when seats were promised side by side, and limits are promised apart from seats.
    guard.keep([claim for claim in kept if claim.at_ms < mine.at_ms])
    return _sit_down(run, job, shape, mine) if mine.seats else run.start(job, shape)


def _freer(run: Pass, key: OrderKey, claims: Sequence[Reservation], than: int, job: Job) -> bool:
    """Whether a job has a reservation, or fewer others' than so many are in its way."""
    if job.id in run.cluster.reservations:
        return True
    return len(in_the_way(run.cluster, job, key, claims, run.now_ms)) < than


def _might_fit(run: Pass, line: Line, shape: Shape) -> bool:
    """Whether there are enough GPUs for a gang of a line if none are kept free for others."""
    return shape.least_gpu_milli <= run.room.free_milli(line.stock)


def _sit_down(run: Pass, job: Job, shape: Shape, claim: Reservation) -> bool:
    """Start a job in the seats that were reserved for it, if they are free."""
    if not seats_free(run.cluster, claim, shape):
        return False
    gang = Gang(tuple(binding for binding, _ in claim.seats), claim.coordinator_port)
    run.charge(job, gang)
    run.place(job, gang)
    return True


def _reserve(run: Pass, how: Backfill, job: Job, shape: Shape, key: OrderKey) -> None:
    """A reservation for a job that does not fit, unless it has one that is not overdue or others have them all."""
    mine = run.cluster.reservations.get(job.id)
    if mine is not None and mine.seats and mine.at_ms > run.now_ms:
        return
    if mine is None and run.sated:
        return
    others = [claim for claim in run.claims if claim.seats and claim is not mine]
    if len(others) >= how.depth:
        return
    if run.sought >= how.depth + VAIN or run.cluster.far_off.get(job.id, 0) > run.now_ms:
        return
    run.room.leave()
    run.guard.let_go()
    found = reserve(run.cluster, job, shape, key, others, run.ends(), run.now_ms, run.policy.score)
    if isinstance(found, int):
        run.sought += 1
        run.cluster.far_off[job.id] = found
        run.reserved(job, None)
        return
    if mine is not None:
        found = replace(found, queue=mine.queue, owner=mine.owner)  # what its queue may take stays claimed
    run.reserved(job, found)


def _claim_limit(run: Pass, how: Backfill, job: Job, refused: Refused, key: OrderKey) -> None:
    """A claim on the limit that has kept a job waiting for a while, unless another job has one on it."""
    mine = run.cluster.reservations.get(job.id)
    if (
        refused.reason not in (Reason.QUOTA_QUEUE, Reason.QUOTA_USER)
        or run.now_ms - job.submitted_at_ms < how.patience_ms
        or (mine is not None and mine.queue and mine.at_ms > run.now_ms)
        or any(claim.limits(job) for claim in run.claims)
    ):
        return
    run.room.leave()
    run.reserved(job, reserve_limit(run.cluster, job, refused, key, run.ends(), run.now_ms))


class Heads:
    """Lines worth a try, by their heads: queues take turns by fair share (`Policy.fair`), lines by `Policy.ordering`.

    A queue is put in anew whenever its share or its best line changes; older entries are skipped. O(log queues).
    """

    def __init__(self, run: Pass, lines: Iterable[Line]) -> None:
        self._cluster, self._policy, self._settled = run.cluster, run.policy, run.settled
        self._capacity, self._now_ms = run.cluster.fleet.capacity(), run.now_ms
        self._lines: dict[str, list[tuple[OrderKey, int, Line, int]]] = {}
        """Queue (or "": all queues) -> heap of its lines: (order, serial, line, place in it of its head)."""
        self._count = self._dropped = 0
        """Lines in those heaps, and lines dropped one by one since all were looked through."""
        ordering, fair = run.policy.ordering, run.policy.fair is not None
        for line in lines:
            at = self._first(line, 0)
            if at < len(line.places):
                group = self._lines.setdefault(line.key.queue if fair else "", [])
                group.append((ordering(line.key, line.places[at]), self._count, line, at))
                self._count += 1
        self._serial = self._count
        for group in self._lines.values():
            heapq.heapify(group)
        self._turns: dict[str, tuple[int, Shape, Turn]] = {}
        """Queue -> its turn when so much was booked in its tree, for a head of such a shape."""
        self._queued: dict[str, Turn] = {}
        """Queue -> which of its entries in `_queues` holds."""
        self._queues: list[tuple[Turn, str]] = []
        for queue in self._lines:
            self._put(queue)

    def _first(self, line: Line, at: int) -> int:
        """The first place from `at` on about whose job nothing is decided."""
        if self._settled:
            while at < len(line.places) and line.places[at].job_id in self._settled:
                at += 1
        return at

    def _turn(self, queue: str) -> Turn:
        assert self._policy.fair is not None
        account = self._cluster.quotas.account(queue)
        root, shape = account.root, self._lines[queue][0][2].key.shape
        known = self._turns.get(queue)
        if known is None or known[0] != root.booked or (known[1] is not shape and root.nominal):
            needs = least_needs(self._cluster, account, shape)
            found = turn(account, self._capacity, needs, self._policy.fair, self._now_ms)
            known = self._turns[queue] = (root.booked, shape, found)
        return known[2]

    def _put(self, queue: str) -> None:
        if self._lines[queue] and self._policy.fair is not None:
            now = self._turn(queue)
            if self._queued.get(queue) != now:
                self._queued[queue] = now
                heapq.heappush(self._queues, (now, queue))

    def pop(self) -> tuple[Line, int] | None:
        """The line whose head goes next, taken out, and the head's place in it; None at the end."""
        entry = self._pop() if self._policy.fair is not None else self._best("")
        if entry is None:
            return None
        self._count -= 1
        return entry[2], entry[3]

    def _best(self, queue: str) -> tuple[OrderKey, int, Line, int] | None:
        lines = self._lines.get(queue)
        return heapq.heappop(lines) if lines else None

    def _pop(self) -> tuple[OrderKey, int, Line, int] | None:
        while self._queues:
            known, queue = heapq.heappop(self._queues)
            if self._queued.get(queue) != known:
                continue
            del self._queued[queue]
            entry = self._best(queue) if self._lines[queue] and self._turn(queue) == known else None
            self._put(queue)
            if entry is not None:
                return entry
        return None

    def drop(self, unwanted: Callable[[Line, JobId], bool]) -> None:
        """A line that was taken out is not wanted, nor are others of which the same is true: they are looked through
        whenever so many went one by one."""
        self._dropped += 1
        if self._dropped * DROPS < self._count:
            return
        self._count = self._dropped = 0
        for queue, lines in self._lines.items():
            lines[:] = [entry for entry in lines if not unwanted(entry[2], entry[2].places[entry[3]].job_id)]
            heapq.heapify(lines)
            self._count += len(lines)
            self._put(queue)

    def seek(self, line: Line, at: int, most: int, wanted: Callable[[Job], bool]) -> tuple[int, bool]:
        """Look at so many jobs behind the head for one that is wanted; it becomes the head. (How many were looked at,
        whether one was found.)"""
        for looked in range(1, most + 1):
            at = self._first(line, at + 1)
            if at >= len(line.places):
                return looked - 1, False
            if wanted(self._cluster.jobs[line.places[at].job_id]):
                self.push(line, at)
                return looked, True
        return most, False

    def push(self, line: Line, at: int) -> None:
        """A line has another head, from that place on."""
        at = self._first(line, at)
        if at < len(line.places):
            queue = line.key.queue if self._policy.fair else ""
            order = self._policy.ordering(line.key, line.places[at])
            heapq.heappush(self._lines[queue], (order, self._serial, line, at))
            self._count += 1
            self._serial += 1
            self._put(queue)


def _worth_a_try(cluster: Cluster, policy: Policy) -> Iterator[Line]:
    """Lines whose head may fit now, or may get something else from this pass. O(lines); with `strict`, O(queues) while
    nothing changes."""
    fits_or_waits = policy.preemption is None and policy.backfill is None
    for queue, lines in cluster.lines.of_queue.items():
        first = cluster.lines.stuck.get(queue)
        if first is not None:
            if not _may_fit(cluster, first):
                continue
            del cluster.lines.stuck[queue]
        if policy.strict:
            first = min(lines.values(), key=lambda line: policy.ordering(line.key, line.places[0]))
            if fits_or_waits and first.key.shape.least_gpu_milli > first.stock.free_milli:
                first.blocked_at = first.stock.freed
            if not _may_fit(cluster, first):
                cluster.lines.stuck[queue] = first
                continue
            yield from lines.values()
            continue
        for line in lines.values():
            if _may_fit(cluster, line):
                yield line


def _may_fit(cluster: Cluster, line: Line) -> bool:
    if line.hindered_at >= 0 and line.hindered_at != cluster.claims_made:
        return True
    return line.blocked_at != line.stock.freed and line.refused_at != cluster.ledger.freed


# ---- making room ----


def start_nominated(run: Pass) -> None:
    """Start jobs for which others left, or keep for them what is free of the places that they will have; in the order
    in which room was made for them, after those that made it by starting anew in what they kept."""
    cluster = run.cluster
    late = [cluster.jobs[job_id] for job_id in cluster.nominated if cluster.line_of(job_id) is not None]
    late.sort(key=lambda job: not cluster.stays(job))
    for at, job in enumerate(late):
        shape = admit(cluster, job, run.now_ms)
        if not isinstance(shape, Shape) or not run.start(job, shape):
            late = late[at:]
            break
    else:
        late = []
    for job, gang in _promised(run, late):
        if _real(run, job, gang):
            run.place(job, gang)
        else:
            run.keep(job, gang)


def _promised(run: Pass, jobs: Sequence[Job]) -> list[tuple[Job, Gang]]:
    """Where these jobs will run once everybody who leaves has left; who will not even then loses its nomination when
    nobody leaves for it any more. Leaves ledger and quotas as they were."""
    cluster = run.cluster
    found: list[tuple[Job, Gang]] = []
    if not jobs:
        return found
    mark = cluster.mark()
    cluster.lend_leaving()
    for job in jobs:
        shape = admit(cluster, job, run.now_ms, least=True)
        gang = place_gang(cluster, shape, job.avoid, run.policy.score) if isinstance(shape, Shape) else None
        if isinstance(gang, Gang):
            cluster.charge(job, gang.bindings, starts=True)
            found.append((job, gang))
        elif not cluster.nominated[job.id]:
            del cluster.nominated[job.id]
    cluster.rollback(mark)
    return found


def _real(run: Pass, job: Job, gang: Gang) -> bool:
    """Take a job's promised places if they are free by now, and its queue admits it."""
    cluster, mark = run.cluster, run.cluster.mark()
    roles = {role.role: role for role in cluster.shape(job).roles}
    needs: dict[str, int] = {}
    for binding in gang.bindings:
        for resource, amount in cluster.amounts(binding, roles[binding.role]):
            needs[resource] = needs.get(resource, 0) + amount
    fits = cluster.quotas.refuses(job.spec.queue, job.owner, needs, run.now_ms) is None
    for binding in gang.bindings if fits else ():
        space = cluster.ledger.spaces[binding.node]
        fits = fits and space.ports_used.isdisjoint(binding.ports) and all(
            space.gpu_free.get(share.gpu, 0) >= share.milli for share in binding.gpus
        )
        if not fits:
            break
        cluster.ledger.take(binding, roles[binding.role])
        fits = space.cpu_milli >= 0 and space.memory_bytes >= 0
    if fits:
        cluster.charge(job, gang.bindings, starts=True)
    else:
        cluster.rollback(mark)
    return fits


def make_room(run: Pass, how: Preemption, line: Line) -> None:
    """Look for room for the jobs of a line whose head does not fit, until one is sought in vain. Works on what is there
    once everybody who leaves has left, so that a job which only has to wait for that makes nobody else leave."""
    cluster, room, queue = run.cluster, run.room, line.key.queue
    if room.vain.get(queue, 0) >= how.tries or not may_claim(cluster, how, line.key):
        return
    found: list[tuple[Job, Gang, tuple[Victim, ...]]] = []
    hunt = room.hunt(how, run.policy.score, run.now_ms)
    if ready_ms := hunt.candidates.ready_ms(line.key):
        cluster.ripening[line.key] = ready_ms
        room.vain[queue] = room.vain.get(queue, 0) + 1
        return
    with room.ahead():
        leaving, mark = len(room.evicted), cluster.mark()
        for job in run.heads(line):
            if len(run.decisions) + len(found) >= run.policy.batch or leaving >= EVICTIONS:
                line.blocked_at = -1
                cluster.lines.news += 1
                break
            way = hunt.room_for(job)
            if way is None:
                room.vain[queue] = room.vain.get(queue, 0) + 1
                break
            found.append((job, *way))
            leaving += len(way[1])
        patient = [(job, gang) for job, gang, victims in found if not victims]
        if len(patient) == len(found):
            cluster.rollback(mark)
        else:
            for job, gang in patient:
                room.forgo(job, gang)
    if hunt.wait_ms:
        cluster.ripening[line.key] = hunt.wait_ms
    for job, gang, victims in found:
        if victims:
            run.keep(job, gang)
            room.evicted += [(job, victim) for victim in victims]


def defragment(run: Pass, how: Defragmentation) -> list[Decision]:
    """Move jobs for the best head that then starts, when nobody leaves anyhow. O(lines), when it is time."""
    cluster, ordering = run.cluster, run.policy.ordering
    if run.now_ms < cluster.tidy_ms or cluster.leaving or not cluster.lines:
        return []
    cluster.tidy_ms = run.now_ms + how.every_ms
    blocked = [
        (ordering(line.key, line.places[0]), job)
        for line in cluster.lines.values()
        if line.refused_at != cluster.ledger.freed and (job := next(run.heads(line), None)) is not None
    ]
    heads = [job for _, job in heapq.nsmallest(how.heads, blocked, key=lambda entry: entry[0])]
    way = find_way(cluster, run.now_ms, how, run.policy.score, heads)
    if way is None:
        return []
    run.keep(way.job, way.gang)
    return decisions_of(way, run.now_ms)


def _ripe(cluster: Cluster, now_ms: int) -> None:
    """Lines that were left alone because a victim was still protected, which it is no longer, are worth a try."""
    if not cluster.ripening:
        return
    for key, ready_ms in list(cluster.ripening.items()):
        line = cluster.lines.get(key)
        if line is None or ready_ms <= now_ms:
            del cluster.ripening[key]
            if line is not None:
                line.blocked_at = line.refused_at = -1
                cluster.lines.news += 1


def _overdue(cluster: Cluster, how: Backfill, now_ms: int) -> None:
    """Who should have started a while ago is promised another instant: what runs takes longer than was expected, and
    until it is over others may have the seats that are kept."""
    if now_ms < cluster.overdue_ms:
        return
    for job_id, claim in cluster.reservations.items():
        line = cluster.line_of(job_id)
        if line is not None and now_ms >= claim.at_ms + how.patience_ms:
            line.blocked_at = line.refused_at = -1
            cluster.lines.news += 1
            cluster.overdue_ms = now_ms + how.patience_ms


# ---- running jobs ----


def resize(run: Pass, how: Elasticity) -> list[Decision]:
    """Changes of size; the best of the jobs that wait are thought of too. O(lines), when it is time."""
    cluster, ordering = run.cluster, run.policy.ordering
    if run.now_ms < cluster.resize_ms or not cluster.elastic:
        return []
    waiting = [
        (ordering(line.key, place), cluster.jobs[place.job_id])
        for line in cluster.lines.values()
        for place in line.places[: len(run.settled) + WAITING]
        if place.job_id not in run.settled
    ]
    best = heapq.nsmallest(WAITING, waiting, key=lambda entry: entry[0])
    return rebalance(cluster, run.now_ms, how, [job for _, job in best])


def grow(run: Pass, job: Job) -> None:
    """Bind replicas that a running job may get now: only of roles whose replicas come and go in place."""
    if job.cancel_by or job.stop_wish is not Reason.NONE or job.suspected_since_ms:
        return
    cluster = run.cluster
    shape = cluster.shape(job)
    taken = [r.binding for r in job.replicas.values() if r.binding is not None]
    for name, lacking in cluster.lacking(job).items():
        if not resizes_in_place(job.spec, name):
            cluster.growing[job.id] = cluster.ledger.freed
            continue
        role = next(r for r in shape.roles if r.role == name)
        kind = next((cluster.fleet.kind_of(b) for b in taken if b.role == name and b.gpus), "")
        count = more(cluster, job, role, lacking, kind, run.now_ms)
        bindings = place_more(cluster, shape, role, _free_indices(job, name)[:count], taken, run.policy.score)
        if bindings:
            target = cluster.targets.get(job.id)
            why = target.why if target is not None else ""
            run.decisions.append(ev.ReplicasBound(run.now_ms, job.id, job.attempt, bindings, why))
            cluster.charge(job, bindings, starts=False)
        else:
            cluster.growing[job.id] = cluster.ledger.freed


def _free_indices(job: Job, role: str) -> list[int]:
    vacant = (ReplicaState.UNBOUND, ReplicaState.GONE)
    held = {r.index for r in job.replicas.values() if r.role == role and r.state not in vacant}
    return [i for i in range(job.spec.roles[role].replicas.max) if i not in held]
