"""The scheduling policy, and one pass under way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.job import Job, Shape
from jobsched.core.lines import Alike, Line, Rank, all_alike, equal_rank
from jobsched.core.plan import Decision, Reservation
from jobsched.core.policies.backfill import RESERVATIONS, Backfill, Guard, meets, soonest
from jobsched.core.policies.defragmentation import Defragmentation
from jobsched.core.policies.elasticity import Elasticity, start_gang
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.health import Health
from jobsched.core.policies.ordering import Factors, Ordering, multifactor, priority
from jobsched.core.policies.placement import Gang, Score, place_gang
from jobsched.core.policies.preemption import Replan
from jobsched.core.policies.room import Room
from jobsched.core.policies.victims import Preemption, may_claim
from jobsched.core.pools import NodePool
from jobsched.core.resources import JobId

EVICTIONS = 100
"""Most victims found in one pass, give or take those of one gang: each search costs what those before it found."""
DUE_MS = 1_000
"""A reservation that moves on by less, while its instant comes or has passed, hinders as many as before."""
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
    _sated: dict[int, bool] = field(default_factory=dict)
    """By identity of the shape, whether all reservations are held that jobs of it might have."""
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

    def sated(self, shape: Shape) -> bool:
        """Whether the pass has no reservation for jobs of a line's shape without one: all are held, or too many were
        sought in vain."""
        how, known = self.policy.backfill, self._sated.get(id(shape))
        if how is None or self.sought >= how.depth + VAIN:
            return True
        if known is None:
            known = self._sated[id(shape)] = self.held(how, shape, [claim for claim in self.claims if claim.seats])
        return known

    def held(self, how: Backfill, shape: Shape, claims: Sequence[Reservation]) -> bool:
        """Whether these are all the reservations that there may be where such a job might run, or anywhere."""
        if len(claims) < how.depth:
            return False
        return len(claims) >= max(how.depth, RESERVATIONS) or (
            sum([meets(self.cluster, shape, claim) for claim in claims]) >= how.depth
        )

    def reserved(self, job: Job, found: Reservation | None) -> None:
        """A job has this reservation in place of what it had."""
        self._sated.clear()
        self.claims[:] = [claim for claim in self.claims if claim.job_id != job.id]
        before = self.cluster.reservations.pop(job.id, None)
        if before is not None or found is not None:
            self.cluster.claims_made += 1  # whom one hindered is worth another try
        if found is not None:
            self.cluster.reservations[job.id] = found
            self.claims.append(found)
        if before is not None and (found is None or found.at_ms > max(before.at_ms, self.now_ms) + DUE_MS):
            self.eased = True

    def pass_over(self, line: Line, head: JobId) -> bool:
        """Whether nothing can come of a look at a line: its jobs need more GPUs than are free, there is no reservation
        to give, and nobody would have to leave for them. If so, it is left alone until something becomes free."""
        cluster, key, how = self.cluster, line.key, self.policy.preemption
        if (
            key.shape.least_gpu_milli <= self.room.free_milli(line.stock)
            or head in cluster.reservations or not self.sated(key.shape)
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
