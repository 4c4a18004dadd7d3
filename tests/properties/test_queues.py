"""Properties of quotas, fair turns and making room, over random trees of cohorts and random jobs.

The core alone: plans are folded and carried out by hand, so that it is this test which decides when victims have saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, combinations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobsched.core import events as ev
from jobsched.core import invariants
from jobsched.core.cluster import Cluster
from jobsched.core.job import Job, Phase, Reason, ReplicaId, ReplicaState
from jobsched.core.passes import Policy
from jobsched.core.plan import Decision
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.quota import Account
from jobsched.core.policies.victims import Preemption
from jobsched.core.resources import JobId
from jobsched.core.schedule import schedule
from jobsched.spec.queue import CPU, GPUS, QueueSpec
from tests.world import a_gpu_node, a_spec

EXAMPLES = int(os.environ.get("EXAMPLES", 10_000 if os.environ.get("BENCH") == "full" else 60))
QUIET = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
POLICY = Policy(fair=FairShare(), preemption=Preemption(min_runtime_ms=0, lost_free_ms=0, lost_pct=0))
STEP_MS = 10_000

FLAT = (
    ({"gpus": 2}, {}, {}), ({"gpus": 4}, {"gpus": 1}, {}), ({"gpus": 3}, {}, {"gpus": 1}), ({"gpus": 0}, {}, {}),
    ({"gpus": 3, "cpu": 2}, {}, {}),
)  # fmt: skip


def trees() -> st.SearchStrategy[tuple[QueueSpec, ...]]:
    """Two to four queues in one cohort, or in two cohorts inside one, or without any quota at all."""
    quota = st.sampled_from(FLAT)

    def build(shape: str, quotas: list[tuple[dict[str, int], dict[str, int], dict[str, int]]]) -> tuple[QueueSpec, ...]:
        queues = []
        for index, (own, borrow, lend) in enumerate(quotas):
            given = {"quota": own, "borrowing_limit": borrow, "lending_limit": lend} if shape != "free" else {}
            cohort = f"c{index % 2}" if shape == "deep" else "top"
            queues.append(QueueSpec.model_validate({"name": f"q{index}", "cohort": cohort, **given}))
        if shape == "deep":
            queues += [QueueSpec(name="c0", cohort="top"), QueueSpec(name="c1", cohort="top")]
        return tuple(queues)

    return st.builds(build, st.sampled_from(["flat", "flat", "deep", "free"]), st.lists(quota, min_size=2, max_size=4))


Wish = tuple[int, int, int, int, str]
"""(queue, priority, replicas, GPUs of each, elastic: in place ("replica"), by a new attempt ("job"), or "" not)"""
WISHES = st.tuples(
    st.integers(0, 3), st.integers(0, 2), st.integers(1, 3), st.sampled_from([1, 1, 1, 2, 3]),
    st.sampled_from(["", "replica", "job"]),
)  # fmt: skip


class Room:
    """A cluster whose jobs never end, told what happens by hand."""

    def __init__(self, queues: Iterable[QueueSpec], nodes: int, gpus: int) -> None:
        self.cluster = Cluster()
        self.now = 1_000_000
        self.due: dict[JobId, int] = {}
        """Who has just left to start anew with fewer replicas, with how many: it does so in the next pass."""
        self.queues = [q for q in queues if q.name.startswith("q")]
        for queue in queues:
            self.fold(ev.QueueDefined(self.now, queue))
        for index in range(nodes):
            self.fold(ev.NodeSeen(self.now, a_gpu_node(f"n{index}", gpus, cpus=4)))

    def fold(self, event: ev.Event) -> None:
        self.cluster.evolve(event, self.cluster.seq + 1)

    def submit(self, wish: Wish) -> JobId:
        queue, priority, replicas, gpus, elastic = wish
        job_id = JobId(f"j{self.cluster.seq:05}")
        count = {"min": 1, "max": replicas, "prefer": replicas} if elastic and replicas > 1 else replicas
        worker = {"command": "w", "gpu": f"any:{gpus}", "replicas": count, "cpu": "250m",
                  "restart": {"scope": elastic or "job"}}  # fmt: skip
        name = self.queues[queue % len(self.queues)].name
        spec = a_spec(queue=name, priority=priority, roles={"worker": worker})
        self.fold(ev.JobSubmitted(self.now, job_id, job_id, "me", spec))
        return job_id

    def plan(self) -> tuple[Decision, ...]:
        """One pass, checked: the same twice, empty once it is committed, and nothing is left taken."""
        before, remembered = _state(self.cluster), _memory(self.cluster)
        plan = schedule(self.cluster, self.now, POLICY)
        assert _state(self.cluster) == before
        remembered()
        assert schedule(self.cluster, self.now, POLICY).decisions == plan.decisions
        return plan.decisions

    def commit(self, decisions: Iterable[Decision]) -> None:
        """Planning again is empty; where room was just made, at most a job starts in what others were promised, as
        they will have other places."""
        for decision in decisions:
            self.fold(decision)
        assert not invariants.check(self.cluster)
        again = schedule(self.cluster, self.now, POLICY).decisions
        leave = (ev.AttemptStopping, ev.ReplicasReleased)
        assert not again or any(isinstance(d, leave) for d in decisions)
        assert not any(isinstance(d, leave) for d in again)
        self.check_limits()

    def happen(self, saved: Callable[[Job], bool]) -> None:
        """Starts succeed at once; who was made to leave has left if `saved`."""
        self.now += STEP_MS
        for job in list(self.cluster.jobs.values()):
            at = (self.now, job.id, job.attempt)
            if job.phase in (Phase.STARTING, Phase.RUNNING):
                fresh = tuple(r.id for r in job.replicas.values() if r.state is ReplicaState.BOUND)
                if fresh:
                    self.fold(ev.ReplicasStarted(*at, fresh))
                if job.phase is Phase.STARTING:
                    self.fold(ev.AttemptStarted(*at))
                left = tuple(r.id for r in job.replicas.values() if r.state is ReplicaState.STOPPING)
                if left and saved(job):
                    self.fold(ev.ReplicasGone(*at, left))
            elif job.phase is Phase.STOPPING and saved(job):
                self.fold(ev.AttemptEnded(*at, Phase.QUEUED))

    def check_limits(self) -> None:
        for account in self.cluster.quotas.accounts.values():
            for key in account.root.nominal:
                assert account.root.used.get(key, 0) <= account.root.nominal[key], f"{account.root.name} lends too much"
                if account.spec is not None and key in account.spec.borrowing_limit and account.parent is not None:
                    assert account.borrowed(key) <= account.spec.borrowing_limit[key]
                lends = account.spec.lending_limit if account.spec is not None else {}
                assert key not in lends or account.lent(key) <= lends[key]


def _memory(cluster: Cluster) -> Callable[[], None]:
    """What a pass remembers of vain tries; the result brings it back."""
    lines = [(line, line.blocked_at, line.refused_at) for line in cluster.lines.values()]
    growing, ripening, looked = dict(cluster.growing), dict(cluster.ripening), cluster.looked
    nominated = {job_id: dict(victims) for job_id, victims in cluster.nominated.items()}

    def again() -> None:
        for line, blocked_at, refused_at in lines:
            line.blocked_at, line.refused_at = blocked_at, refused_at
        cluster.growing, cluster.ripening, cluster.nominated, cluster.looked = growing, ripening, nominated, looked

    return again


def _state(cluster: Cluster) -> object:
    accounts = {n: (dict(a.held), dict(a.used), dict(a.users)) for n, a in cluster.quotas.accounts.items()}
    free = {n: (s.cpu_milli, dict(s.gpu_free), set(s.ports_used)) for n, s in cluster.ledger.spaces.items()}
    return {n: tuple({k: v for k, v in part.items() if v} for part in a) for n, a in accounts.items()}, free


def victims(decisions: Iterable[Decision]) -> list[ev.AttemptStopping]:
    return [d for d in decisions if isinstance(d, ev.AttemptStopping)]


@QUIET
@given(trees(), st.integers(1, 3), st.integers(2, 4), st.lists(st.lists(WISHES, max_size=8), max_size=4), st.data())
def test_room_is_made_by_claim_alone_and_comes_to_rest(
    tree: tuple[QueueSpec, ...], nodes: int, gpus: int, waves: list[list[Wish]], data: st.DataObject
) -> None:
    """Victims are always of lower claim, limits and cohort sums always hold, and nobody takes in turn: jobs that never
    end come to rest, whatever time victims take to save."""
    room = Room(tree, nodes, gpus)
    taken: list[tuple[JobId, JobId]] = []
    for wave in waves:
        for wish in wave:
            room.submit(wish)
        for _ in range(3):
            step(room, taken, data.draw(st.booleans()))
    rest = 0
    taken.clear()
    for _ in range(60):
        rest = rest + 1 if not step(room, taken, True) else 0
        if rest == 4:
            break
    assert rest == 4, "it never comes to rest"
    assert not set(taken) & {(winner, victim) for victim, winner in taken}, "two jobs took from each other in turn"


def step(room: Room, taken: list[tuple[JobId, JobId]], saved: bool) -> bool:
    decisions, cluster = room.plan(), room.cluster
    starts = {placed.job_id: len(placed.bindings) for placed in decisions if isinstance(placed, ev.AttemptPlaced)}
    assert all(starts.get(job_id) == n for job_id, n in room.due.items()), "the places that it kept were taken"
    with cluster.trial():
        for placed in decisions:
            if isinstance(placed, ev.AttemptPlaced | ev.ReplicasBound):
                cluster.charge(cluster.jobs[placed.job_id], placed.bindings, starts=False)
        last: Job | None = None
        for leaves in decisions:
            if isinstance(leaves, ev.ReplicasReleased):
                victim, winner = cluster.jobs[leaves.job_id], cluster.jobs[leaves.for_job]
            elif isinstance(leaves, ev.AttemptStopping):
                victim, winner = cluster.jobs[leaves.job_id], cluster.jobs[leaves.outcome.for_job]
            else:
                continue
            if last is not None and last is not winner:
                cluster.quotas.book(last.spec.queue, last.owner, tuple(needs_of(last).items()), 1)
            last = winner
            assert winner.phase is Phase.QUEUED
            if isinstance(leaves, ev.ReplicasReleased):
                cluster.lend(victim, [victim.replicas[rid] for rid in leaves.replicas])
                continue
            assert of_lower_claim(cluster, victim, winner)
            assert all(cluster.jobs[job_id].phase is Phase.QUEUED for job_id in leaves.outcome.also_for)
            stays = cluster.stays(victim) if leaves.outcome.reason is Reason.RESCALED else ()
            assert shrinks_by(victim, stays)
            cluster.lend(victim, [r for r in victim.replicas.values() if r.binding is not None and r.id not in stays])
            taken += [(victim.id, job_id) for job_id in (winner.id, *leaves.outcome.also_for)]
    room.commit(decisions)
    smaller = {j.id: n for j in cluster.jobs.values() if j.phase is Phase.STOPPING and (n := len(cluster.stays(j)))}
    room.happen(lambda job: saved)
    room.due = {job_id: n for job_id, n in smaller.items() if cluster.jobs[job_id].phase is Phase.QUEUED}
    return bool(decisions)


def shrinks_by(victim: Job, stays: Sequence[ReplicaId]) -> bool:
    """Whether it stops as a whole, or may go on with these alone."""
    return not stays or len(stays) >= victim.spec.roles["worker"].replicas.min


def of_lower_claim(cluster: Cluster, victim: Job, winner: Job) -> bool:
    """In the words of the rules, told anew: priority within a queue; between queues what is borrowed, for a side that
    stays within its quota or for a higher priority that leaves the victim's side its quota."""
    if victim.spec.queue == winner.spec.queue:
        return victim.priority < winner.priority
    mine, theirs = (cluster.quotas.account(j.spec.queue) for j in (winner, victim))
    met = next(a for a in mine.path if a in theirs.path)
    below = theirs.path[: theirs.path.index(met)]
    if not mine.root.nominal:
        return victim.priority < winner.priority
    borrows = any(all(a.used.get(k, 0) > a.nominal.get(k, 0) for a in below) for k in mine.root.nominal)
    ours = mine.path[mine.path.index(met) - 1]
    own = all(ours.own_room(k) >= needs_of(winner)[k] for k in mine.root.nominal)
    return borrows and (own or victim.priority < winner.priority)


def needs_of(job: Job) -> dict[str, int]:
    roles = job.spec.roles.values()
    return {GPUS: sum(r.replicas.min * (r.gpu.milli if r.gpu else 0) for r in roles),
            CPU: sum(r.replicas.min * r.cpu for r in roles)}  # fmt: skip


@QUIET
@example(2, 3, [(0, 0, 2, 1, ""), (0, 2, 2, 2, ""), (0, 0, 1, 1, "")], (0, 0, 1, 1, ""))
@given(st.integers(1, 3), st.integers(2, 4), st.lists(WISHES, min_size=1, max_size=7), WISHES)
def test_victims_are_enough_and_none_too_many(nodes: int, gpus: int, wishes: list[Wish], wish: Wish) -> None:
    """Against every subset of the jobs that may be made to leave: room is found when there is any, and no victim could
    have stayed."""
    room = Room([QueueSpec(name="q0")], nodes, gpus)
    for each in wishes:
        room.submit((0, each[1], each[2], each[3], ""))
        room.commit(room.plan())
        room.happen(lambda job: True)
    running = [j for j in room.cluster.jobs.values() if j.phase is Phase.RUNNING]
    lower = [j for j in running if j.priority < 2 and not j.lost_ms]  # who lost work to priority once is left alone
    others = [j for j in room.cluster.jobs.values() if j.phase is Phase.QUEUED]
    for job in others:
        room.fold(ev.JobEnded(room.now, job.id, Phase.CANCELLED, _cause()))
    job_id = room.submit((0, 2, wish[2], wish[3], ""))
    decisions = room.plan()
    chosen = {stop.job_id for stop in victims(decisions)}
    if any(isinstance(d, ev.AttemptPlaced) and d.job_id == job_id for d in decisions):
        assert not chosen
        return
    ways = [set(ids) for ids in _subsets([j.id for j in lower]) if fits_without(room.cluster, job_id, ids)]
    assert bool(ways) == bool(chosen)
    assert not chosen or chosen in ways
    assert not any(way < chosen for way in ways), "a victim could have stayed"


def _cause() -> ev.Cause:
    from jobsched.core.job import Cause, Reason

    return Cause(Reason.CANCELLED)


def _subsets(ids: list[JobId]) -> Iterable[tuple[JobId, ...]]:
    return chain.from_iterable(combinations(ids, n) for n in range(len(ids) + 1))


def fits_without(cluster: Cluster, job_id: JobId, gone: Iterable[JobId]) -> bool:
    from jobsched.core.policies.placement import Gang, place_gang

    job = cluster.jobs[job_id]
    with cluster.trial():
        for each in gone:
            other = cluster.jobs[each]
            cluster.lend(other, other.replicas.values())
        return isinstance(place_gang(cluster, cluster.shape(job)), Gang)


@QUIET
@given(trees(), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.booleans()), max_size=40))
def test_what_a_cohort_uses_is_a_function_of_what_its_queues_hold(
    tree: tuple[QueueSpec, ...], moves: list[tuple[int, int, bool]]
) -> None:
    """Whatever the order of bookings, and whether the tree was defined before or after them."""
    early, late = Cluster(), Cluster()
    for queue in tree:
        early.evolve(ev.QueueDefined(1, queue))
    names = [q.name for q in tree if q.name.startswith("q")]
    for at, amount, gives in moves:
        name = names[at % len(names)]
        sign = -1 if gives and early.quotas.account(name).held.get(GPUS, 0) >= amount else 1
        for cluster in (early, late):
            cluster.quotas.book(name, "me", ((GPUS, amount), (CPU, amount)), sign, 1)
    for queue in reversed(tree):
        late.evolve(ev.QueueDefined(1, queue))

    def used(account: Account) -> dict[str, int]:
        return {k: n for k, n in account.used.items() if n}

    for name, account in early.quotas.accounts.items():
        assert used(account) == used(late.quotas.accounts[name])
        assert account.room(GPUS) == late.quotas.accounts[name].room(GPUS)
