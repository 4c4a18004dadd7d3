"""Making room: who shrinks or stops for a waiting job, and who may not be made to.

Called by `schedule` for heads of lines that found no place among what is free or about to be. What a job may take:

- *reclaim*: what neighbours in its cohort borrow, as long as it stays within the quota of its own side; a job that
  holds more than was borrowed goes only while the quota itself is needed back, not to defragment;
- *priority*: what jobs of lower priority hold, in its own queue, and in its cohort as far as those hold borrowed
  resources only;
- what elastic jobs hold above their minimum, from jobs of the same priority too: a minimum goes before a surplus.

Each of these is a strict order, so nobody takes back what was taken: after a reclaim the victim would have to borrow to
come back, and borrowers reclaim nothing; priority only falls along a chain of victims. (Kueue's classic preemption,
with its borrowWithinCohort restricted to what is wholly borrowed.) A job that has not run for `min_runtime_ms` is left
alone, and one that has lost more than its share of work to others' priority may only be reclaimed.

Victims are the cheapest per place made, and no more than needed. A victim costs the GPU time since its last
acknowledged checkpoint, and its restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster, LineKey
from jobsched.core.job import (
    Binding,
    Cause,
    FailureClass,
    Job,
    Outcome,
    Phase,
    Reason,
    Replica,
    ReplicaId,
    ReplicaState,
    RoleShape,
)
from jobsched.core.plan import Decision
from jobsched.core.policies.admission import admit, least_needs, limited
from jobsched.core.policies.placement import Gang, Score, place_gang
from jobsched.core.policies.quota import Account, Refused
from jobsched.core.resources import JobId, NodeName
from jobsched.spec.job import resizes_in_place

PRUNED = 64
"""Of so many victims it is asked whether the job could do without them."""


class Scope(StrEnum):
    """From whom priority may take."""

    OFF = "off"
    QUEUE = "queue"
    COHORT = "cohort"


@dataclass(frozen=True, slots=True)
class Preemption:
    """How far room is made for waiting jobs."""

    reclaim: bool = True
    """Queues get back what they lent."""
    priority: Scope = Scope.COHORT
    min_runtime_ms: int = 60_000
    """No attempt is stopped sooner after its placement."""
    lost_pct: int = 25
    """Most of a job's run time that priority may make it lose, in percent of what it ran."""
    lost_free_ms: int = 600_000
    """So much may be lost whatever the job ran."""
    restart_ms: int = 30_000
    """What a restart costs, where the job has not shown how long it takes."""
    tries: int = 16
    """Most heads of a queue for which room is looked for in vain in one pass."""


@dataclass(frozen=True, slots=True)
class Victim:
    """Replicas that one job gives up: some of its surplus, or all it has."""

    job: Job
    replicas: tuple[Replica, ...]
    stops: bool
    reclaimed: bool
    cost: int
    """GPU time lost, in thousandths of a GPU times milliseconds; of jobs without GPUs, milliseconds."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a victim gives up beside those chosen before it: who stops after it has shrunk gives the rest of it."""

    victim: Victim
    replicas: tuple[Replica, ...]
    mark: tuple[int, int]
    """The trial before that."""


@dataclass(slots=True)
class Hunt:
    """The search for room for one line of like jobs, inside a trial in which everything that leaves anyhow is lent.
    `wait_ms`: when a job that is protected now will no longer be; 0: none is."""

    cluster: Cluster
    how: Preemption
    score: Score
    now_ms: int
    promised: Mapping[tuple[str, str], int]
    """(Queue or cohort, limit) -> what is booked for jobs that do not run yet, so that it makes nobody a borrower."""
    lent: set[tuple[JobId, ReplicaId]] = field(default_factory=set)
    """Replicas that were made to leave already, by earlier searches of the same pass too."""
    wait_ms: int = 0
    _left: list[Victim] | None = None
    """Candidates, the best last."""

    def room_for(self, job: Job) -> tuple[Gang, tuple[Victim, ...]] | None:
        """Where the job would run and who gives way: nobody, when what leaves anyhow is enough. What the victims hold
        stays lent and the job's places stay taken. None: no room can be made.

        O(candidates log) for the first job of a line, then O(victims)."""
        gang = self._place(job)
        if gang is not None:
            return gang, ()
        if self._left is None:
            self._left = self._candidates(job)
        mark = self.cluster.mark()
        chosen = self._enough(job)
        if not chosen:
            self.cluster.rollback(mark)
            return None
        gang, chosen = self._only_needed(job, chosen)
        return gang, tuple(replace(given.victim, replicas=given.replicas) for given in chosen)

    # ---- who may be made to give way ----

    def _claim(self, job: Job, theirs: Account) -> Claim | None:
        return Claim.of(self.cluster, self.how, job, theirs, self.promised)

    def _leaves_quota(self, claim: Claim, victim: Job, replicas: Iterable[Replica]) -> bool:
        """Whether their side still has all of its quota in use without these replicas: what they hold was borrowed."""
        takes = limited(self.cluster, victim, [r.binding for r in replicas if r.binding is not None])
        pairs = ((a, key) for a in claim.chain for key in takes if a.nominal.get(key))
        return all(_spare(a, key, self.promised) + takes[key] <= 0 for a, key in pairs)

    def _candidates(self, job: Job) -> list[Victim]:
        cluster = self.cluster
        mine = cluster.quotas.account(job.spec.queue)
        found: list[Victim] = []
        for queue in mine.root.tree:
            claim = self._claim(job, queue)
            if claim is None:
                continue
            levels = cluster.active.get(queue.name, {})
            ids = dict.fromkeys(
                job_id for level, jobs in levels.items() if claim.reclaims or level < job.priority for job_id in jobs
            )
            for job_id in ids | cluster.surplus.get(queue.name, {}):
                found += self._offers(cluster.jobs[job_id], claim)
        bundles = _by_place(cluster, job, [v for v in found if v.stops])
        bundles.sort(key=self._straddles)
        shrinks = sorted((v for v in found if not v.stops), key=_cheapest)
        return [*reversed(bundles), *reversed(shrinks)]

    def _offers(self, job: Job, claim: Claim) -> Iterator[Victim]:
        if job.cancel_by or job.stop_wish is not Reason.NONE:
            return
        bound = [r for r in job.replicas.values() if r.binding is not None and (job.id, r.id) not in self.lent]
        restart_ms = self._restart_ms(job)
        surplus = tuple(_surplus(job, bound)) if job.phase is Phase.RUNNING and claim.surplus_of(job) else ()
        for replica in surplus:
            yield Victim(job, (replica,), False, claim.reclaims, restart_ms * _size((replica,)))
        if not claim.all_of(job) or not bound:
            return
        since = job.attempt_started_at_ms
        if self.now_ms - since < self.how.min_runtime_ms:
            ready = since + self.how.min_runtime_ms
            self.wait_ms = min(self.wait_ms or ready, ready)
            return
        saved = job.checkpoint.at_ms if job.checkpoint is not None else 0
        lost_ms = self.now_ms - max(since, saved)
        if not claim.reclaims and not self._affords(job, lost_ms):
            return
        yield Victim(job, tuple(bound), True, claim.reclaims, (lost_ms + restart_ms) * _size(bound))

    def _affords(self, job: Job, lost_ms: int) -> bool:
        """The job's budget: what preemption has made it lose, and would now, against what it ran."""
        ran = job.ran_ms + (self.now_ms - job.running_since_ms if job.running_since_ms else 0)
        return job.lost_ms + lost_ms <= max(self.how.lost_free_ms, ran * self.how.lost_pct // 100) or not job.lost_ms

    def _restart_ms(self, job: Job) -> int:
        started = job.running_since_ms - job.attempt_started_at_ms if job.running_since_ms else 0
        return started if started > 0 else self.how.restart_ms

    def _straddles(self, victim: Victim) -> bool:
        """Whether its queue would fall below its quota, so that it goes last."""
        theirs = self.cluster.quotas.account(victim.job.spec.queue)
        alone = Claim(0, True, False, False, theirs.path[:1])
        return victim.reclaimed and not self._leaves_quota(alone, victim.job, victim.replicas)

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
        claim = self._claim(job, self.cluster.quotas.account(victim.job.spec.queue))
        if not rest or claim is None or not claim.covers(victim):
            return None
        if claim.chain and not self._leaves_quota(claim, victim.job, rest) and not (
            claim.reclaims and isinstance(admit(self.cluster, job, self.now_ms, least=True), Refused)
        ):  # fmt: skip
            return None  # what is not wholly borrowed goes only where the quota itself is needed back
        return self._give(victim, rest)

    def _rest(self, victim: Victim) -> tuple[Replica, ...]:
        """What the victim still has to give."""
        return tuple(r for r in victim.replicas if (victim.job.id, r.id) not in self.lent)

    def _give(self, victim: Victim, replicas: tuple[Replica, ...]) -> Given:
        mark = self.cluster.mark()
        self.cluster.lend(victim.job, replicas)
        self.lent.update((victim.job.id, r.id) for r in replicas)
        return Given(victim, replicas, mark)

    def _unlend(self, lent: list[Given], keep: int) -> None:
        if len(lent) > keep:
            self.cluster.rollback(lent[keep].mark)
        while len(lent) > keep:
            given = lent.pop()
            self.lent.difference_update((given.victim.job.id, r.id) for r in given.replicas)

    def _only_needed(self, job: Job, chosen: list[Given]) -> tuple[Gang, list[Given]]:
        """Put back, dearest first, whoever the job does not need after all."""
        assert self._left is not None
        dearest = sorted((g.victim for g in chosen), key=lambda v: (v.cost, str(v.job.id)), reverse=True)
        for victim in dearest[:PRUNED] if len(chosen) > 1 else ():
            before = [given.victim for given in chosen]
            self._unlend(chosen, 0)
            chosen = self._give_all(v for v in before if v is not victim)
            if chosen and self._would_fit(job):
                self._left.append(victim)
            else:
                self._unlend(chosen, 0)
                chosen = self._give_all(before)
        gang = self._place(job)
        assert gang is not None, "it fitted a moment ago"
        return gang, chosen

    def _give_all(self, victims: Iterable[Victim]) -> list[Given]:
        """Lend each without asking for a claim, what those before it left of it."""
        return [self._give(victim, rest) for victim in victims if (rest := self._rest(victim))]


def may_claim(cluster: Cluster, how: Preemption, key: LineKey) -> bool:
    """Whether it is worth a search: somebody runs from whom a job of this line might take. O(queues of its tree)."""
    mine = cluster.quotas.account(key.queue)
    for account in mine.root.tree:
        levels = cluster.active.get(account.name)
        if not levels:
            continue
        lower = how.priority is not Scope.OFF and (
            min(levels) < key.priority or bool(cluster.surplus.get(account.name))
        )
        if account is mine:
            if lower:
                return True
            continue
        limits = mine.root.nominal
        borrows = any(account.own_room(limit) < 0 for limit in limits)
        if (how.reclaim and borrows) or (how.priority is Scope.COHORT and lower and (borrows or not limits)):
            return True
    return False


@dataclass(frozen=True, slots=True)
class Claim:
    """What one job may take from the jobs of one queue, as things stand."""

    priority: int
    reclaims: bool
    """Whatever their priority: their queue borrows what is this job's."""
    below: bool
    """Of jobs with lower priority."""
    surplus: bool
    """What elastic jobs of no higher priority hold above their minimum."""
    chain: tuple[Account, ...] = ()
    """Where quotas stand between both: their side of the tree, from their queue up to below where both meet."""

    @classmethod
    def of(
        cls, cluster: Cluster, how: Preemption, job: Job, theirs: Account, promised: Mapping[tuple[str, str], int]
    ) -> Claim | None:
        """None: nothing at all."""
        mine = cluster.quotas.account(job.spec.queue)
        if mine is theirs:
            by_priority = how.priority is not Scope.OFF
            return cls(job.priority, False, by_priority, by_priority) if by_priority else None
        met = next((a for a in mine.path if a in theirs.path), None)
        if met is None:
            return None
        chain = theirs.path[: theirs.path.index(met)]
        ours = mine.path[: mine.path.index(met)]
        needs = least_needs(cluster, mine, cluster.shape(job))
        borrows = [key for key in needs if chain and all(_spare(a, key, promised) < 0 for a in chain)]
        reclaims = bool(
            how.reclaim and borrows and ours and all(ours[-1].own_room(key) >= n for key, n in needs.items())
        )
        cohort = how.priority is Scope.COHORT and (bool(borrows) or not mine.root.nominal)
        if not reclaims and not cohort:
            return None
        return cls(job.priority, reclaims, cohort, cohort, chain if mine.root.nominal else ())

    def all_of(self, victim: Job) -> bool:
        return self.reclaims or (self.below and victim.priority < self.priority)

    def surplus_of(self, victim: Job) -> bool:
        return self.reclaims or (self.surplus and victim.priority <= self.priority)

    def covers(self, victim: Victim) -> bool:
        return self.all_of(victim.job) if victim.stops else self.surplus_of(victim.job)


def _spare(account: Account, key: str, promised: Mapping[tuple[str, str], int]) -> int:
    """What an account does not use of its quota itself; below 0: it borrows. Counts only what runs."""
    return account.own_room(key) + promised.get((account.name, key), 0)


def _surplus(job: Job, bound: Iterable[Replica]) -> Iterator[Replica]:
    """Replicas above the minimum that may leave in place, highest index first."""
    serving = (ReplicaState.BOUND, ReplicaState.RUNNING)
    bound = [r for r in bound if r.state in serving]
    for name, role in job.spec.roles.items():
        if role.replicas.elastic and resizes_in_place(job.spec, name):
            held = sorted((r for r in bound if r.role == name), key=lambda r: r.index)
            yield from reversed(held[role.replicas.min :])


def _size(replicas: Iterable[Replica]) -> int:
    """GPUs in thousandths; 1 for replicas without."""
    return sum(sum(s.milli for s in r.binding.gpus) for r in replicas if r.binding is not None) or 1


def _cheapest(victim: Victim) -> tuple[bool, int, int, int, str, int]:
    """Borrowers first, then lower priority, cheaper, younger."""
    job = victim.job
    return (not victim.reclaimed, job.priority, victim.cost, -job.attempt_started_at_ms, str(job.id),
            -max(r.index for r in victim.replicas))  # fmt: skip


def _by_place(cluster: Cluster, job: Job, victims: list[Victim]) -> list[Victim]:
    """Victims in the order in which they make places for one replica of the job at the least cost: per node the
    cheapest that free enough for one more replica form a bundle, and the cheapest bundles go first."""
    shape = cluster.shape(job)
    widest = max(shape.roles, key=lambda r: (r.gpu_milli, r.cpu_milli))
    on_node: dict[NodeName, list[tuple[Victim, int]]] = {}
    pool, classes = cluster.pool(shape), set(cluster.ledger.matching(widest)) if widest.gpu_milli else set()
    for victim in sorted(victims, key=_cheapest):
        frees: dict[NodeName, int] = {}
        for replica in victim.replicas:
            binding = replica.binding
            assert binding is not None
            space = cluster.ledger.spaces.get(binding.node)
            if space is None or binding.node not in pool:
                continue
            if widest.gpu_milli:
                amount = sum(s.milli for s in binding.gpus if space.gpu_class.get(s.gpu) in classes)
            else:
                amount = cluster.on_node[binding.node][victim.job.id, replica.id][1].cpu_milli
            frees[binding.node] = frees.get(binding.node, 0) + amount
        for node, amount in frees.items():
            if amount:
                on_node.setdefault(node, []).append((victim, amount))
    each = widest.gpu_milli or widest.cpu_milli
    rows: list[tuple[tuple[bool, int, float, int, str], int, Victim]] = []
    for node in sorted(on_node):
        space = cluster.ledger.spaces[node]
        free = (sum(space.whole.get(c, 0) for c in classes) * 1_000 if widest.gpu_milli else max(0, space.cpu_milli))
        rows += _bundles(node, free % max(1, each), each, on_node[node])
    rows.sort(key=lambda row: row[:2])
    seen: dict[JobId, Victim] = {}
    for _, _, victim in rows:
        seen.setdefault(victim.job.id, victim)
    rest = (v for v in sorted(victims, key=_cheapest) if v.job.id not in seen)
    return [*seen.values(), *rest]


def _bundles(
    node: NodeName, free: int, each: int, offers: list[tuple[Victim, int]]
) -> Iterator[tuple[tuple[bool, int, float, int, str], int, Victim]]:
    """Rows (key of the bundle, place in it, victim) of one node; a later bundle never goes before an earlier one."""
    bundle: list[Victim] = []
    least = (False, -(10**9), -inf)
    for place, (victim, amount) in enumerate(offers):
        bundle.append(victim)
        free += amount
        if free >= each or place == len(offers) - 1:
            whole = free >= each
            cost = sum(v.cost for v in bundle) if whole else inf
            least = max(least, (not all(v.reclaimed for v in bundle), max(v.job.priority for v in bundle), cost))
            start = -max(v.job.attempt_started_at_ms for v in bundle)
            yield from (((*least, start, str(node)), place - len(bundle) + 1 + i, v) for i, v in enumerate(bundle))
            bundle, free = [], free % each if each else 0


def hold(cluster: Cluster, job: Job, bindings: Iterable[Binding]) -> tuple[Binding, ...]:
    """Inside a trial: keep the part of promised places that is free already, so that nobody else takes it. Returns the
    other part: devices of those that are still leaving."""
    roles = {role.role: role for role in cluster.shape(job).roles}
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


NOTHING = RoleShape("", 0, 0, 0, 0, 0)
"""Books devices alone, where CPUs and memory are booked already."""


def evictions(victims: Iterable[tuple[Job, Victim]], now_ms: int) -> list[Decision]:
    """The decisions that make victims leave, each for the job named beside it, in that order. A job that shrinks for
    one may stop for another."""
    found: list[Decision] = []
    stopped: set[JobId] = set()
    for job, victim in victims:
        assert victim.job.id not in stopped, "it leaves as a whole already"
        last = found[-1] if found else None
        if victim.stops:
            stopped.add(victim.job.id)
            found.append(_stop(job, victim, now_ms))
            continue
        ids = tuple(r.id for r in victim.replicas)
        if isinstance(last, ev.ReplicasReleased) and (last.job_id, last.for_job) == (victim.job.id, job.id):
            found[-1] = replace(last, replicas=(*last.replicas, *ids))
        else:
            released = ev.ReplicasReleased(now_ms, victim.job.id, victim.job.attempt, ids, Reason.PREEMPTED, job.id)
            found.append(released)
    return found


def _stop(job: Job, victim: Victim, now_ms: int) -> ev.AttemptStopping:
    what = f"job {job.name} of queue {job.spec.queue}"
    why = (f"{what} takes back what its queue lent" if victim.reclaimed
           else f"{what} goes first: its priority is {job.priority}, this job's {victim.job.priority}")  # fmt: skip
    cause = Cause(Reason.PREEMPTED, FailureClass.PREEMPTED, why)
    outcome = Outcome(Phase.QUEUED, Reason.PREEMPTED, cause, for_job=job.id)
    return ev.AttemptStopping(now_ms, victim.job.id, victim.job.attempt, outcome)
