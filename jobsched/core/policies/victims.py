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

Elastic jobs whose replicas cannot leave in place give up their surplus by starting anew with fewer: who might be
stopped as a whole may be made to do that, and goes on at once in the places that it keeps (`Target.stays`). Nobody
takes that way from jobs of its own priority: whether the restart pays there is for `elasticity` to say.

Victims are the cheapest per place made, and no more than needed: first who shrinks in place, then who shrinks by
starting anew, then who stops. A victim costs the GPU time since its last acknowledged checkpoint, and its restart: at
its smaller size where it goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import inf
from operator import attrgetter, itemgetter

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster, Target
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
)
from jobsched.core.ledger import GpuClass
from jobsched.core.lines import LineKey
from jobsched.core.plan import Decision
from jobsched.core.policies.admission import least_needs, limited
from jobsched.core.policies.quota import Account
from jobsched.core.resources import JobId, NodeName
from jobsched.core.shape import sized_roles
from jobsched.spec.job import resizes_in_place


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
    """What a restart costs, where the job has not shown how long it takes (elastic ones: `pauses`)."""
    tries: int = 16
    """Most heads of a queue for which room is looked for in vain in one pass."""

    def affords(self, job: Job, lost_ms: int, now_ms: int) -> bool:
        """The job's budget: what preemption has made it lose, and would now, against what it ran."""
        ran = job.ran_ms + (now_ms - job.running_since_ms if job.running_since_ms else 0)
        return job.lost_ms + lost_ms <= max(self.lost_free_ms, ran * self.lost_pct // 100) or not job.lost_ms

    def spares(self, job: Job, now_ms: int) -> bool:
        """Whether the job has lost too much already to be stopped for another now."""
        return not self.affords(job, job.unsaved_ms(now_ms), now_ms)


@dataclass(frozen=True, slots=True)
class Victim:
    """Replicas that one job gives up: some of its surplus, or all it has."""

    job: Job
    replicas: tuple[Replica, ...]
    stops: bool
    reclaimed: bool
    cost: int
    """GPU time lost, in thousandths of a GPU times milliseconds; of jobs without GPUs, milliseconds."""
    gpu_milli: int
    """GPUs that become free, in thousandths."""
    frees: Mapping[NodeName, int]
    """The same by node; of jobs without GPUs: 0s."""
    key: tuple[bool, int, int, int, str, int]
    """Borrowers first, then lower priority, cheaper, younger."""
    anew: bool = False
    """It shrinks, by starting anew without these."""

    @classmethod
    def of(
        cls, job: Job, replicas: Sequence[Replica], stops: bool, reclaimed: bool, cost_ms: int, anew: int = 0
    ) -> Victim:
        """`cost_ms`: run time lost. `anew`: it starts anew without these, and that costs so much GPU time, however many
        they are."""
        frees: dict[NodeName, int] = {}
        for replica in replicas:
            if (binding := replica.binding) is not None:
                frees[binding.node] = frees.get(binding.node, 0) + sum([share.milli for share in binding.gpus])
        milli = sum(frees.values())
        cost, last = anew or cost_ms * (milli or 1), max([replica.index for replica in replicas])
        key = (not reclaimed, job.priority, cost, -job.attempt_started_at_ms, str(job.id), -last)
        return cls(job, tuple(replicas), stops, reclaimed, cost, milli, frees, key, anew > 0)


Lent = dict[JobId, dict[ReplicaId, None]]
"""Job -> those of its replicas that are taken to be gone."""


@dataclass(slots=True)
class Offers:
    """What jobs could give up for one claimant."""

    stops: list[Victim] = field(default_factory=list)
    """All that a job holds; one a job."""
    shrinks: list[Victim] = field(default_factory=list)
    """A replica each of elastic jobs' surplus; in place or by starting anew."""
    wait_ms: int = 0
    """When a job that is protected now will no longer be; 0: none is."""

    def __bool__(self) -> bool:
        return bool(self.stops or self.shrinks)


@dataclass(slots=True)
class Candidates:
    """Who might be made to give way in one pass, and what each would lose. Each job is looked at once, for whomever."""

    cluster: Cluster
    how: Preemption
    now_ms: int
    promised: Mapping[tuple[str, str], int]
    """(Queue or cohort, limit) -> what is booked for jobs that do not run yet, so that it makes nobody a borrower."""
    lent: Lent
    """Replicas that were made to leave in this pass already, or leave anyhow."""
    anew: dict[JobId, JobId] = field(default_factory=dict)
    """Who starts anew with fewer replicas -> for whom first; nobody else stops it in the same pass."""
    _ripe: dict[tuple[str, int], tuple[list[Job], int]] = field(default_factory=dict)
    """(Queue, priority) -> who is not protected, and when the first of those that are will no longer be."""
    _shrunk: dict[tuple[JobId, bool], list[Victim]] = field(default_factory=dict)
    """(Job, whether it is reclaimed) -> its surplus that may leave in place, while all of that is still there."""
    _stops: dict[tuple[JobId, bool], Victim | None] = field(default_factory=dict)
    """(Job, whether it is reclaimed) -> all it has; None: it cannot afford that."""

    def offers(self, job: Job) -> Offers:
        """By those from whom a job may take. O(those), O(active jobs) once a pass."""
        cluster, found, waits = self.cluster, Offers(), []
        for account in cluster.quotas.account(job.spec.queue).root.tree:
            claim = self.claim(job, account)
            if claim is None:
                continue
            for level in cluster.active.get(account.name, {}):
                if not (claim.reclaims or (claim.below and level < job.priority)):
                    continue
                ripe, ready_ms = self._ripe_at(account.name, level)
                if ready_ms:
                    waits.append(ready_ms)
                surplus = cluster.surplus.get(account.name, {})
                for other in ripe:
                    if (victim := self._stop(other, claim.reclaims)) is not None:
                        found.stops.append(victim)
                        if other.id in surplus:
                            found.shrinks += self._anew(victim)
            for job_id in cluster.surplus.get(account.name, ()):
                found.shrinks += self._shrinks(cluster.jobs[job_id], claim)
        found.wait_ms = min(waits, default=0)
        return found

    def ready_ms(self, key: LineKey) -> int:
        """When the first may be stopped of all from whom a job of this line might take; 0: somebody may already. For a
        quick answer: O(queues of its tree)."""
        cluster, waits = self.cluster, [0]
        mine = cluster.quotas.account(key.queue)
        for account in mine.root.tree:
            for level in cluster.active.get(account.name, {}):
                if level < key.priority or (account is not mine and self.how.reclaim):
                    ripe, ready_ms = self._ripe_at(account.name, level)
                    if ripe:
                        return 0
                    waits.append(ready_ms)
            if cluster.surplus.get(account.name):
                return 0
        return min([ready_ms for ready_ms in waits if ready_ms], default=0)

    def claim(self, job: Job, theirs: Account) -> Claim | None:
        return Claim.of(self.cluster, self.how, job, theirs, self.promised)

    def _ripe_at(self, queue: str, priority: int) -> tuple[list[Job], int]:
        known = self._ripe.get((queue, priority))
        if known is None:
            jobs, last_ms = self.cluster.jobs, self.now_ms - self.how.min_runtime_ms
            free = [
                job for job_id in self.cluster.active[queue][priority]
                if not (job := jobs[job_id]).cancel_by and job.stop_wish is Reason.NONE
            ]  # fmt: skip
            ripe = [job for job in free if job.attempt_started_at_ms <= last_ms]
            ready_ms = 0
            if len(ripe) < len(free):
                first_ms = min([s for job in free if (s := job.attempt_started_at_ms) > last_ms])
                ready_ms = first_ms + self.how.min_runtime_ms
            known = self._ripe[queue, priority] = (ripe, ready_ms)
        return known

    def _stop(self, job: Job, reclaimed: bool) -> Victim | None:
        lent = self.lent.get(job.id)
        if lent is not None:
            return self._all_of(job, reclaimed, [r for r in _bound(job) if r.id not in lent])
        key = (job.id, reclaimed)
        if key not in self._stops:
            self._stops[key] = self._all_of(job, reclaimed, _bound(job))
        return self._stops[key]

    def _all_of(self, job: Job, reclaimed: bool, bound: Sequence[Replica]) -> Victim | None:
        lost_ms = job.unsaved_ms(self.now_ms)
        if not bound or not (reclaimed or self._affords(job, lost_ms)):
            return None
        return Victim.of(job, bound, True, reclaimed, lost_ms + self._restart_ms(job))

    def _shrinks(self, job: Job, claim: Claim) -> Iterable[Victim]:
        if not claim.surplus_of(job):
            return ()
        lent, key = self.lent.get(job.id), (job.id, claim.reclaims)
        if lent is not None:
            return self._surplus_of(job, claim.reclaims, [r for r in _bound(job) if r.id not in lent])
        if key not in self._shrunk:
            self._shrunk[key] = self._surplus_of(job, claim.reclaims, _bound(job))
        return self._shrunk[key]

    def _surplus_of(self, job: Job, reclaimed: bool, bound: Sequence[Replica]) -> list[Victim]:
        if job.cancel_by or job.stop_wish is not Reason.NONE or job.phase is not Phase.RUNNING:
            return []
        cost_ms = self._restart_ms(job, in_place=True)
        return [Victim.of(job, (replica,), False, reclaimed, cost_ms) for replica in _surplus(job, bound)]

    def _anew(self, whole: Victim) -> Iterator[Victim]:
        """The surplus of a job that would go on without it; `whole`: all it has, which it might be made to give."""
        job = whole.job
        serving = (ReplicaState.BOUND, ReplicaState.RUNNING)
        if job.id in self.cluster.leaving or len(whole.replicas) < len(_bound(job)):
            return
        if job.suspected_since_ms or any(r.state not in serving for r in whole.replicas):
            return
        gives = list(_surplus_anew(job))
        kept_milli = sum([s.milli for r in _bound(job) if r not in gives and r.binding for s in r.binding.gpus])
        lost_ms = whole.cost // (whole.gpu_milli or 1) - self._restart_ms(job)
        cost = lost_ms * (whole.gpu_milli or 1) + self._restart_ms(job) * (kept_milli or not whole.gpu_milli)
        for replica in gives:
            yield Victim.of(job, (replica,), False, whole.reclaimed, 0, anew=max(1, cost))

    def _affords(self, job: Job, lost_ms: int) -> bool:
        return self.how.affords(job, lost_ms, self.now_ms)

    def _restart_ms(self, job: Job, in_place: bool = False) -> int:
        started = job.running_since_ms - job.attempt_started_at_ms if job.running_since_ms else 0
        known_ms = started if started > 0 else self.how.restart_ms
        if not self.cluster.shape(job).elastic:
            return known_ms
        return self.cluster.pauses.expected_ms(job, in_place, known_ms)

    def best_last(self, job: Job, offers: Offers) -> list[Victim]:
        """In the order in which they are to give way for a job, the first at the end: who shrinks in place, and who by
        starting anew, cheapest first; who stops, by the places that it makes; last whose queue would fall below its
        quota. O(offers log)."""
        bundles = _by_place(self.cluster, job, offers.stops)
        bundles.sort(key=self._straddles)
        return [*reversed(bundles), *sorted(offers.shrinks, key=_LIGHTEST, reverse=True)]

    def _straddles(self, victim: Victim) -> bool:
        """Whether its queue would fall below its quota, so that it goes last."""
        if not victim.reclaimed:
            return False
        theirs = self.cluster.quotas.account(victim.job.spec.queue)
        alone = Claim(0, True, False, False, theirs.path[:1])
        return not self.leaves_quota(alone, victim.job, victim.replicas)

    def leaves_quota(self, claim: Claim, victim: Job, replicas: Iterable[Replica]) -> bool:
        """Whether their side still has all of its quota in use without these replicas: what they hold was borrowed."""
        takes = limited(self.cluster, victim, [r.binding for r in replicas if r.binding is not None])
        pairs = ((a, key) for a in claim.chain for key in takes if a.nominal.get(key))
        return all(_spare(a, key, self.promised) + takes[key] <= 0 for a, key in pairs)


def _bound(job: Job) -> list[Replica]:
    return [r for r in job.replicas.values() if r.binding is not None]


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
        return self.all_of(victim.job) if victim.stops or victim.anew else self.surplus_of(victim.job)


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


def _surplus_anew(job: Job) -> Iterator[Replica]:
    """Replicas above the minimum that may only leave with the attempt, highest index first; never the first of a role,
    and of no role that its user has scaled."""
    for name in sized_roles(job.spec):
        role = job.spec.roles[name] if name else None
        if role is None or not role.replicas.elastic or name in job.wanted or resizes_in_place(job.spec, name):
            continue
        held = sorted((r for r in _bound(job) if r.role == name), key=lambda r: r.index)
        yield from reversed(held[max(1, role.replicas.min) :])


_CHEAPEST = attrgetter("key")
_LIGHTEST = attrgetter("anew", "key")


def _by_place(cluster: Cluster, job: Job, victims: list[Victim]) -> list[Victim]:
    """Victims in the order in which they make places for one replica of the job at the least cost: per node the
    cheapest that free enough for one more replica form a bundle, and the cheapest bundles go first."""
    widest = max(cluster.shape(job).roles, key=lambda r: (r.gpu_milli, r.cpu_milli))
    on_node: dict[NodeName, list[tuple[Victim, int]]] = {}
    pool, spaces = cluster.fleet.pool(cluster.shape(job)), cluster.ledger.spaces
    cheapest = sorted(victims, key=_CHEAPEST)
    classes = dict.fromkeys(cluster.ledger.matching(widest)) if widest.gpu_milli else {}
    for victim in cheapest:
        for node, amount in victim.frees.items():
            if node not in pool:
                continue
            if not classes or not spaces[node].whole.keys() <= classes.keys():
                amount = _frees_on(cluster, victim, node, classes)
            if amount:
                on_node.setdefault(node, []).append((victim, amount))
    each = widest.gpu_milli or widest.cpu_milli
    rows: list[tuple[tuple[bool, int, float, int, str], int, Victim]] = []
    for node, offers in on_node.items():
        space = spaces[node]
        free = sum([space.whole.get(c, 0) for c in classes]) * 1_000 if classes else max(0, space.cpu_milli)
        rows += _bundles(node, free % max(1, each), each, offers)
    rows.sort(key=itemgetter(0, 1))
    seen: dict[JobId, Victim] = {}
    for _, _, victim in rows:
        seen.setdefault(victim.job.id, victim)
    return [*seen.values(), *(v for v in cheapest if v.job.id not in seen)]


def _frees_on(cluster: Cluster, victim: Victim, node: NodeName, classes: Mapping[GpuClass, None]) -> int:
    """Thousandths of GPUs of these classes that a victim frees on a node; without any: of CPUs."""
    found, space = 0, cluster.ledger.spaces[node]
    for replica in victim.replicas:
        binding = replica.binding
        if binding is None or binding.node != node:
            continue
        if classes:
            found += sum([share.milli for share in binding.gpus if space.gpu_class.get(share.gpu) in classes])
        else:
            found += cluster.fleet.on_node[node][victim.job.id, replica.id][1].cpu_milli
    return found


def _bundles(
    node: NodeName, free: int, each: int, offers: Sequence[tuple[Victim, int]]
) -> Iterator[tuple[tuple[bool, int, float, int, str], int, Victim]]:
    """Rows (key of the bundle, place of the victim among the node's, victim) of one node; a later bundle never goes
    before an earlier one."""
    first, least = 0, (False, -(10**9), -inf)
    for place, (_, amount) in enumerate(offers):
        free += amount
        whole = free >= each
        if whole or place == len(offers) - 1:
            bundle = [victim for victim, _ in offers[first : place + 1]]
            cost = sum([victim.cost for victim in bundle]) if whole else inf
            taken = any(not victim.reclaimed for victim in bundle)
            least = max(least, (taken, max([victim.job.priority for victim in bundle]), cost))
            key = (*least, -max([victim.job.attempt_started_at_ms for victim in bundle]), node)
            for at, victim in enumerate(bundle, first):
                yield key, at, victim
            first, free = place + 1, free % each if each else 0


def evictions(cluster: Cluster, victims: Sequence[tuple[Job, Victim]], now_ms: int) -> list[Decision]:
    """The decisions that make victims leave, each for the job named beside it, in that order. A job that shrinks in
    place for one may stop for another. Sets `cluster.targets` of those that start anew."""
    found: list[Decision] = []
    stopped: set[JobId] = set()
    gives: dict[JobId, dict[ReplicaId, None]] = {}
    for _, victim in victims:
        gives.setdefault(victim.job.id, {}).update((r.id, None) for r in victim.replicas)
    ends = {victim.job.id: None for _, victim in victims if victim.stops}
    anew = {victim.job.id: list[tuple[Job, Victim]]() for _, victim in victims if victim.anew}
    for job, victim in victims:
        if victim.job.id in anew:
            anew[victim.job.id].append((job, victim))
    for job, victim in victims:
        if victim.job.id in anew and not victim.stops:
            if victim.job.id not in stopped and victim.job.id not in ends:
                stopped.add(victim.job.id)
                found.append(_smaller(cluster, anew[victim.job.id], gives[victim.job.id], now_ms))
            continue
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
            found.append(ev.ReplicasReleased(
                now_ms, victim.job.id, victim.job.attempt, ids, Reason.PREEMPTED, job.id, _claim(job, victim)
            ))  # fmt: skip
    return found


def _claim(job: Job, victim: Victim) -> str:
    """By what right the job takes the victim's place, in words."""
    what = f"job {job.name} of queue {job.spec.queue}"
    if victim.reclaimed:
        return f"{what} takes back what its queue lent"
    return f"{what} goes first: its priority is {job.priority}, this job's {victim.job.priority}"


def _stop(job: Job, victim: Victim, now_ms: int) -> ev.AttemptStopping:
    cause = Cause(Reason.PREEMPTED, FailureClass.PREEMPTED, _claim(job, victim))
    outcome = Outcome(Phase.QUEUED, Reason.PREEMPTED, cause, for_job=job.id)
    return ev.AttemptStopping(now_ms, victim.job.id, victim.job.attempt, outcome)


def _smaller(
    cluster: Cluster, claims: Sequence[tuple[Job, Victim]], gives: Mapping[ReplicaId, None], now_ms: int
) -> ev.AttemptStopping:
    """It is to start anew where it is, without these replicas, for one job or several."""
    shrinks = claims[0][1].job
    bound = _bound(shrinks)
    seats: list[Binding] = []
    had: dict[str, int] = {}
    have: dict[str, int] = {}
    for replica in sorted(bound, key=lambda r: (r.role, r.index)):
        had[replica.role] = had.get(replica.role, 0) + 1
        if replica.id not in gives and replica.binding is not None:
            seats.append(replace(replica.binding, index=have.get(replica.role, 0)))
            have[replica.role] = have.get(replica.role, 0) + 1
    changes = [
        f"from {had[name]} to {count} {name if count == 1 or name.endswith('s') else name + 's'}"
        for name, count in have.items() if count != had[name]
    ]  # fmt: skip
    rights = dict.fromkeys([_claim(job, victim) for job, victim in claims])
    why = f"shrinks {' and '.join(changes)} to make room; {'; '.join(rights)}"
    first, *others = dict.fromkeys([job.id for job, _ in claims])
    sizes = tuple([(name, have.get(name, 0)) for name in sized_roles(shrinks.spec) if name])
    stays = tuple([r.id for r in bound if r.id not in gives])
    cluster.targets[shrinks.id] = Target(sizes, why, tuple(seats), shrinks.coordinator_port, stays)
    outcome = Outcome(
        Phase.QUEUED, Reason.RESCALED, Cause(Reason.RESCALED, FailureClass.PREEMPTED, why), for_job=first,
        also_for=tuple(others),
    )  # fmt: skip
    return ev.AttemptStopping(now_ms, shrinks.id, shrinks.attempt, outcome)
