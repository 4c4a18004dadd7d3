"""Room: what there is once everybody who leaves has left, and how many more would have to leave for a waiting job.

Called by `schedule` for heads of lines that found no place. Who may be made to give way is said by `victims`; here, how
few of them are enough. A search works on the cluster as it will be, so that a job which only has to wait makes nobody
leave. That view is kept from one search of a pass to the next: a pass costs what it decides, not lines * jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding, Job, Phase, Replica, ReplicaState, RoleShape, Shape
from jobsched.core.ledger import Stock
from jobsched.core.plan import Reservation
from jobsched.core.policies.admission import admit, limited
from jobsched.core.policies.backfill import Guard
from jobsched.core.policies.placement import Gang, Score, place_gang
from jobsched.core.policies.quota import Books, Refused
from jobsched.core.policies.victims import Candidates, Lent, Preemption, Victim

PRUNED = 64
"""Of so many victims it is asked whether the job could do without them."""
NOTHING = RoleShape("", 0, 0, 0, 0, 0)
"""Books devices alone, where CPUs and memory are booked already."""


@dataclass(slots=True)
class Room:
    """Inside the trial of one pass, two views of ledger and quotas: as they are, and as they will be. Between searches
    the quotas are as they are; the ledger stays as it will be until `leave`."""

    cluster: Cluster
    guard: Guard
    evicted: list[tuple[Job, Victim]] = field(default_factory=list)
    """Who leaves for whom, as decided in this pass."""
    promised: dict[tuple[str, str], int] = field(default_factory=dict)
    """(Queue or cohort, limit) -> what is booked for jobs that cannot start yet."""
    vain: dict[str, int] = field(default_factory=dict)
    """Queue -> searches in vain."""
    _awaited: list[Binding] = field(default_factory=list)
    """Devices that are kept for somebody once those who hold them have left."""
    _owed: list[tuple[Job, Gang]] = field(default_factory=list)
    """Places that are to be kept once the ledger is as it is."""
    _candidates: Candidates | None = None
    _mark: int | None = None
    """The ledger before it was made as it will be; None: it is as it is."""
    _books: Books = field(init=False)
    """The quotas as they will be; there while the ledger is."""
    _free_milli: int = 0

    def free_milli(self, stock: Stock) -> int:
        """Thousandths of GPUs that are free there as things are, kept for reservations or not; or more than that."""
        return stock.free_milli + self.guard.milli if self._mark is None else self._free_milli

    def too_full(self, shape: Shape, kept: Sequence[Reservation]) -> bool:
        """Whether it is known without going back to things as they are that too few GPUs are free beside kept seats:
        nothing has been taken since these were kept last."""
        claims, milli, free = self.guard.last
        same = self._mark is not None and free == self._free_milli and claims == kept
        return same and shape.least_gpu_milli > free - milli

    def keep(self, job: Job, gang: Gang) -> None:
        """Keep places for a job that cannot start in them yet."""
        self.cluster.charge(job, gang.bindings, starts=True)
        for key, amount in limited(self.cluster, job, gang.bindings).items():
            for account in self.cluster.quotas.account(job.spec.queue).path:
                self.promised[account.name, key] = self.promised.get((account.name, key), 0) + amount
        if self._mark is None:
            self._awaited += hold(self.cluster, job, gang.bindings)
        else:
            self._owed.append((job, gang))

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """As it will be. The first time since the ledger was as it is: O(what leaves)."""
        if self._mark is None:
            self._enter()
        with self.cluster.quotas.seen_as(self._books):
            yield

    def _enter(self) -> None:
        cluster, ledger = self.cluster, self.cluster.ledger
        self.guard.let_go()
        self._mark, self._free_milli = ledger.mark(), ledger.free_gpu_milli
        self._books = cluster.quotas.copied()
        with cluster.quotas.seen_as(self._books):
            cluster.lend_leaving()
            for _, victim in self.evicted:
                cluster.lend(victim.job, victim.replicas)
        for binding in self._awaited:
            ledger.take(binding, NOTHING)

    def forgo(self, job: Job, gang: Gang) -> None:
        """While it is as it will be: give up places that were found for a job."""
        cluster = self.cluster
        roles = cluster.shape(job).by_name
        for binding in gang.bindings:
            role = roles[binding.role]
            cluster.ledger.lend(binding, role)
            cluster.quotas.book(job.spec.queue, job.owner, cluster.amounts(binding, role), -1)
        if job.array_id:
            cluster.quotas.start(job.array_id, -1)

    def leave(self) -> None:
        """The ledger is to be as it is, without the places that were promised meanwhile."""
        if self._mark is None:
            return
        self.cluster.ledger.rollback(self._mark)
        self._mark = None
        for job, gang in self._owed:
            self._awaited += hold(self.cluster, job, gang.bindings)
        self._owed.clear()

    def hunt(self, how: Preemption, score: Score, now_ms: int) -> Hunt:
        """A search for like jobs."""
        if self._candidates is None:
            lent: Lent = {}
            for job_id in self.cluster.leaving:
                job = self.cluster.jobs[job_id]
                if job.phase is not Phase.STOPPING:
                    lent[job_id] = {r.id: None for r in job.replicas.values() if r.state is ReplicaState.STOPPING}
            self._candidates = Candidates(self.cluster, how, now_ms, self.promised, lent)
        return Hunt(self.cluster, score, now_ms, self._candidates)


@dataclass(frozen=True, slots=True)
class Given:
    """What a victim gives up beside those chosen before it: who stops after it has shrunk gives the rest of it."""

    victim: Victim
    replicas: tuple[Replica, ...]
    mark: tuple[int, int]
    """The trial before that."""


@dataclass(slots=True)
class Hunt:
    """The search for room for one line of like jobs, while ledger and quotas are as they will be."""

    cluster: Cluster
    score: Score
    now_ms: int
    candidates: Candidates
    wait_ms: int = 0
    """When a job that is protected now will no longer be; 0: none is, or nobody was asked to leave."""
    _left: list[Victim] | None = None
    """Who might leave, the best last."""

    def room_for(self, job: Job) -> tuple[Gang, tuple[Victim, ...]] | None:
        """Where the job would run and who gives way: nobody, when what leaves anyhow is enough. What the victims hold
        stays lent and the job's places stay taken. None: no room can be made.

        O(candidates log) for the first job of a line, then O(victims)."""
        gang = self._place(job)
        if gang is not None:
            return gang, ()
        if self._left is None:
            offers = self.candidates.offers(job)
            self.wait_ms = offers.wait_ms
            self._left = self.candidates.best_last(job, offers)
        if self._hopeless(job):
            return None
        mark = self.cluster.mark()
        chosen = self._enough(job)
        if not chosen:
            self.cluster.rollback(mark)
            return None
        gang, chosen = self._only_needed(job, chosen)
        return gang, tuple(replace(given.victim, replicas=given.replicas) for given in chosen)

    def _hopeless(self, job: Job) -> bool:
        """Whether there are too few GPUs even if everybody left who might."""
        assert self._left is not None
        gives = sum([victim.gpu_milli for victim in self._left])
        return self.cluster.shape(job).least_gpu_milli > self.cluster.ledger.free_gpu_milli + gives

    # ---- how many ----

    def _place(self, job: Job) -> Gang | None:
        """Take places for the job at its minimum, if its queue admits it and they are there."""
        shape = admit(self.cluster, job, self.now_ms, least=True)
        if isinstance(shape, Refused):
            return None
        mark = self.cluster.mark()
        gang = place_gang(self.cluster, shape, job.avoid, self.score)
        if isinstance(gang, Gang):
            self.cluster.charge(job, gang.bindings, starts=True)
            return gang
        self.cluster.rollback(mark)
        return None

    def _enough(self, job: Job) -> list[Given]:
        """The shortest row of candidates, best first, whose leaving makes room; they stay lent, nothing is taken. Tries
        1, 2, 4, … of them, then halves the last step."""
        assert self._left is not None
        lent: list[Given] = []
        passed: list[Victim] = []
        want, low, fits = 1, 0, False
        while not fits:
            while len(lent) < want and self._left:
                victim = self._left.pop()
                given = self._lend(job, victim)
                if given is None:
                    passed.append(victim)
                else:
                    lent.append(given)
            if len(lent) == low:
                break
            fits = self._would_fit(job)
            if not fits:
                low, want = len(lent), 2 * len(lent)
        if not fits:
            self._unlend(lent, 0)
            self._left = []
            return []
        high = len(lent)
        order = [given.victim for given in lent]
        while high - low > 1:
            middle = (low + high) // 2
            self._unlend(lent, middle)
            if self._would_fit(job):
                high = middle
            else:
                low = middle
            for victim in order[len(lent) : high]:
                again = self._lend(job, victim)
                if again is not None:
                    lent.append(again)
        self._unlend(lent, high)
        self._left += [*passed, *reversed(order[high:])]
        return lent

    def _would_fit(self, job: Job) -> bool:
        mark = self.cluster.mark()
        fits = self._place(job) is not None
        self.cluster.rollback(mark)
        return fits

    def _lend(self, job: Job, victim: Victim) -> Given | None:
        """As if the victim had left; None when the claim on it no longer holds, or it has given that way already."""
        rest = self._rest(victim)
        if victim.stops and self.candidates.anew.get(victim.job.id, job.id) != job.id:
            return None  # it goes on, smaller, for whom it gave way to
        claim = self.candidates.claim(job, self.cluster.quotas.account(victim.job.spec.queue))
        if not rest or claim is None or not claim.covers(victim):
            return None
        if claim.chain and not self.candidates.leaves_quota(claim, victim.job, rest) and not (
            claim.reclaims and isinstance(admit(self.cluster, job, self.now_ms, least=True), Refused)
        ):  # fmt: skip
            return None  # what is not wholly borrowed goes only where the quota itself is needed back
        if victim.anew:
            self.candidates.anew.setdefault(victim.job.id, job.id)
        return self._give(victim, rest)

    def _rest(self, victim: Victim) -> tuple[Replica, ...]:
        """What the victim still has to give."""
        lent = self.candidates.lent.get(victim.job.id)
        return victim.replicas if lent is None else tuple(r for r in victim.replicas if r.id not in lent)

    def _give(self, victim: Victim, replicas: tuple[Replica, ...]) -> Given:
        mark = self.cluster.mark()
        self.cluster.lend(victim.job, replicas)
        self.candidates.lent.setdefault(victim.job.id, {}).update((r.id, None) for r in replicas)
        return Given(victim, replicas, mark)

    def _unlend(self, lent: list[Given], keep: int) -> None:
        if len(lent) > keep:
            self.cluster.rollback(lent[keep].mark)
        while len(lent) > keep:
            self._forget(lent.pop())

    def _forget(self, given: Given) -> None:
        """It is not lent after all."""
        lent, job_id = self.candidates.lent, given.victim.job.id
        for replica in given.replicas:
            del lent[job_id][replica.id]
        if not lent[job_id]:
            del lent[job_id]
            self.candidates.anew.pop(job_id, None)

    def _only_needed(self, job: Job, chosen: list[Given]) -> tuple[Gang, list[Given]]:
        """Take back, dearest first, whoever the job does not need after all. O(victims) placements."""
        assert self._left is not None
        dearest = sorted([given.victim for given in chosen], key=lambda v: (v.cost, str(v.job.id)), reverse=True)
        for victim in dearest[:PRUNED]:
            given = next(each for each in chosen if each.victim is victim)
            rest = [each for each in chosen if each is not given]
            heir = next((each for each in rest if each.victim.stops and each.victim.job is victim.job), None)
            if heir is not None:  # it stops anyhow
                all_of_it = replace(heir, replicas=(*given.replicas, *heir.replicas))
                chosen = [all_of_it if each is heir else each for each in rest]
            elif rest and self._fits_without(job, given):
                chosen = rest
            else:
                continue
            self._left.append(victim)
        gang = self._place(job)
        assert gang is not None, "it fitted a moment ago"
        return gang, chosen

    def _fits_without(self, job: Job, given: Given) -> bool:
        """Whether the job fits while one of its victims stays, which then is no longer lent."""
        mark = self.cluster.mark()
        self.cluster.take_back(given.victim.job, given.replicas)
        if self._would_fit(job):
            self._forget(given)
            return True
        self.cluster.rollback(mark)
        return False


def hold(cluster: Cluster, job: Job, bindings: Iterable[Binding]) -> tuple[Binding, ...]:
    """Inside a trial: keep the part of promised places that is free already, so that nobody else takes it. Returns the
    other part: devices of those that are still leaving."""
    roles = cluster.shape(job).by_name
    awaited = []
    for binding in bindings:
        space = cluster.ledger.spaces.get(binding.node)
        if space is None:
            continue
        free = tuple(s for s in binding.gpus if space.gpu_free.get(s.gpu, 0) >= s.milli)
        cluster.ledger.take(replace(binding, gpus=free, ports=()), roles[binding.role])
        if len(free) < len(binding.gpus):
            rest = tuple(s for s in binding.gpus if s not in free)
            awaited.append(replace(binding, gpus=rest, ports=()))
    return tuple(awaited)
