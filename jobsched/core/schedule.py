"""The scheduling pass: cluster + now + policy -> plan. Pure: it works on ledger and quotas inside a trial.

Cost follows what may have changed: a line whose head did not fit is not looked at again until something became free
(`Ledger.freed`), so a pass over 10^5 unchanged waiting jobs costs the number of distinct lines at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster, Line, Rank, equal_rank, missing_replicas
from jobsched.core.job import Job, Reason, ReplicaState, Shape
from jobsched.core.plan import Decision, Plan
from jobsched.core.policies.admission import admit, more
from jobsched.core.policies.fairness import FairShare, Turn, turn
from jobsched.core.policies.health import Health
from jobsched.core.policies.ordering import Ordering, OrderKey, priority
from jobsched.core.policies.placement import Gang, Score, place_gang, place_more
from jobsched.core.policies.preemption import Replan, replan
from jobsched.core.policies.quota import Refused
from jobsched.spec.job import RestartScope, restart_policy


@dataclass(frozen=True, slots=True)
class Policy:
    """Named pure functions chosen in the server's config."""

    ordering: Ordering = priority
    rank: Rank = equal_rank
    """Order between like jobs, before their age."""
    fair: FairShare | None = None
    """Queues take turns by fair share, `ordering` holds within each; None: `ordering` over all queues together."""
    strict: bool = False
    """When the first job of a queue does not fit, its others wait too (Kueue's StrictFIFO, Helios)."""
    replan: Replan | None = None
    """Preemption: running jobs may be stopped for better ones."""
    pass_every_ms: int = 0
    """Passes only at multiples of this; 0: whenever something happened."""
    score: Score = Score.AUTO
    health: Health | None = None
    """When nodes are doubted; None: never."""
    batch: int = 1_000
    """Most gangs placed in one pass, so that a cold start with a long queue still answers in between."""


@dataclass(slots=True)
class Pass:
    """One pass under way, inside `cluster.trial()`; each step adds its decisions and books them at once, so that the
    next step sees what is left."""

    cluster: Cluster
    now_ms: int
    policy: Policy
    decisions: list[Decision] = field(default_factory=list)
    examined: int = 0
    blocked: list[tuple[Line, Job]] = field(default_factory=list)
    """Heads of lines that did not start in this pass, best first."""

    def start(self, job: Job, shape: Shape) -> bool:
        """Place a waiting job's gang, if it fits."""
        gang = place_gang(self.cluster, shape, job.avoid, self.policy.score)
        if not isinstance(gang, Gang):
            return False
        attempt = job.attempt + 1
        self.decisions.append(ev.AttemptPlaced(self.now_ms, job.id, attempt, gang.bindings, gang.coordinator_port))
        self.cluster.charge(job, gang.bindings, starts=True)
        return True


def schedule(cluster: Cluster, now_ms: int, policy: Policy) -> Plan:
    """One pass.

    1. Jobs whose backoff is over join their lines; lines that wait for a budget's window are worth a try in the next.
    2. Running jobs below their minimum get replicas back.
    3. Waiting jobs start, best first; a line whose head does not fit is left until something becomes free.
    4. Running jobs below what they want grow into what is left.

    With a `replan`, all runnable jobs are placed anew in its order instead of 3.
    """
    cluster.unpark(now_ms)
    if policy.pass_every_ms and now_ms % policy.pass_every_ms:
        cluster.next_pass_ms = now_ms - now_ms % policy.pass_every_ms + policy.pass_every_ms if cluster.jobs else 0
        return Plan()
    _turn_windows(cluster, now_ms)
    with cluster.trial():
        run = Pass(cluster, now_ms, policy)
        freed = cluster.ledger.freed
        hungry = [cluster.jobs[job_id] for job_id, tried in cluster.growing.items() if tried != freed]
        hungry.sort(key=_by_claim)
        run.examined = len(hungry)
        for job in hungry:
            if below_minimum(job):
                grow(run, job)
        if policy.replan is not None:
            _replan(run, policy.replan)
        else:
            start_waiting(run)
        if len(run.decisions) < policy.batch:
            for job in hungry:
                if not below_minimum(job):
                    grow(run, job)
    return Plan(tuple(run.decisions), run.examined)


def _turn_windows(cluster: Cluster, now_ms: int) -> None:
    """A budget's window that begins gives its queues another try."""
    if cluster.window_ms and now_ms >= cluster.window_ms:
        cluster.ledger.unblock()
    cluster.window_ms = cluster.quotas.next_window_ms(now_ms)


def _replan(run: Pass, how: Replan) -> None:
    """Quotas and array limits count from nothing: whoever stands first gets them first."""
    cluster, now_ms, policy = run.cluster, run.now_ms, run.policy
    with cluster.quotas.blank():
        decisions, examined = replan(
            cluster, now_ms, how, policy.score,
            admit=lambda job: admit(cluster, job, now_ms),
            booked=lambda job, bindings: cluster.charge(job, bindings, starts=True),
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


def start_waiting(run: Pass) -> None:
    """Start waiting jobs, best first. A head that does not fit is noted in `run.blocked`, and its line left alone."""
    cluster, policy = run.cluster, run.policy
    heads = Heads(run)
    while len(run.decisions) < policy.batch and (line := heads.pop()) is not None:
        if line.key.queue in cluster.stuck:
            continue
        job = heads.job(line)
        run.examined += 1
        shape = admit(cluster, job, run.now_ms)
        if isinstance(shape, Shape) and run.start(job, shape):
            heads.push(line)
            continue
        run.blocked.append((line, job))
        if isinstance(shape, Refused):
            line.refused_at = cluster.ledger.freed
        else:
            line.blocked_at = cluster.ledger.freed_for(line.key.shape.node_labels)
        if policy.strict:
            cluster.stuck[line.key.queue] = line


class Heads:
    """Lines worth a try, by their heads: queues take turns by fair share (`Policy.fair`), lines by `Policy.ordering`.

    During a pass a queue's share only grows by what starts, so it is looked at anew when it comes up: O(log queues).
    """

    def __init__(self, run: Pass) -> None:
        self._cluster, self._policy = run.cluster, run.policy
        self._capacity = run.cluster.capacity()
        self._next: dict[int, int] = {}
        """Serial of a line -> place in it of the first job not started in this pass."""
        self._serial: dict[int, int] = {}
        self._lines: dict[str, list[tuple[OrderKey, int, Line]]] = {}
        """Queue (or "": all queues) -> heap of its lines."""
        for serial, line in enumerate(_worth_a_try(run.cluster, run.policy)):
            self._serial[id(line)], self._next[id(line)] = serial, 0
            group = self._lines.setdefault(line.key.queue if run.policy.fair else "", [])
            group.append((run.policy.ordering(line.key, line.places[0]), serial, line))
        for group in self._lines.values():
            heapq.heapify(group)
        self._queues = [(self._turn(queue), queue) for queue in self._lines]
        heapq.heapify(self._queues)

    def _turn(self, queue: str) -> Turn:
        return turn(self._cluster.quotas.account(queue), self._capacity) if self._policy.fair else ()

    def pop(self) -> Line | None:
        """The line whose head goes next, taken out; None at the end."""
        while self._queues:
            known, queue = self._queues[0]
            lines = self._lines[queue]
            if not lines:
                heapq.heappop(self._queues)
                continue
            now = self._turn(queue)
            if now != known:
                heapq.heapreplace(self._queues, (now, queue))
                continue
            return heapq.heappop(lines)[2]
        return None

    def job(self, line: Line) -> Job:
        return self._cluster.jobs[line.places[self._next[id(line)]].job_id]

    def push(self, line: Line) -> None:
        """The head started: the next job of the line becomes its head."""
        self._next[id(line)] += 1
        at = self._next[id(line)]
        if at < len(line.places):
            entry = (self._policy.ordering(line.key, line.places[at]), self._serial[id(line)], line)
            heapq.heappush(self._lines[line.key.queue if self._policy.fair else ""], entry)


def _worth_a_try(cluster: Cluster, policy: Policy) -> Iterator[Line]:
    """Lines whose head may fit now. O(lines); with `strict`, O(queues) while nothing changes."""
    for queue, lines in cluster.lines_of.items():
        first = cluster.stuck.get(queue)
        if first is not None:
            if not _may_fit(cluster, first):
                continue
            del cluster.stuck[queue]
        if policy.strict:
            first = min(lines.values(), key=lambda line: policy.ordering(line.key, line.places[0]))
            if not _may_fit(cluster, first):
                cluster.stuck[queue] = first
                continue
        for line in lines.values():
            if policy.strict or _may_fit(cluster, line):
                yield line


def _may_fit(cluster: Cluster, line: Line) -> bool:
    ledger = cluster.ledger
    return line.refused_at != ledger.freed and line.blocked_at != ledger.freed_for(line.key.shape.node_labels)


# ---- running jobs ----


def grow(run: Pass, job: Job) -> None:
    """Bind replicas that a running job may get now: only of roles whose replicas come and go in place."""
    if job.cancel_by or job.stop_wish is not Reason.NONE or job.suspected_since_ms:
        return
    cluster = run.cluster
    shape = cluster.shape(job)
    taken = [r.binding for r in job.replicas.values() if r.binding is not None]
    for name, lacking in missing_replicas(job).items():
        if restart_policy(job.spec, name).scope is not RestartScope.REPLICA:
            continue
        role = next(r for r in shape.roles if r.role == name)
        kind = next((cluster.kind_of(b) for b in taken if b.role == name and b.gpus), "")
        count = more(cluster, job, role, lacking, kind, run.now_ms)
        bindings = place_more(cluster, shape, role, _free_indices(job, name)[:count], taken, run.policy.score)
        if bindings:
            run.decisions.append(ev.ReplicasBound(run.now_ms, job.id, job.attempt, bindings))
            cluster.charge(job, bindings, starts=False)
        else:
            cluster.growing[job.id] = cluster.ledger.freed


def _free_indices(job: Job, role: str) -> list[int]:
    vacant = (ReplicaState.UNBOUND, ReplicaState.GONE)
    held = {r.index for r in job.replicas.values() if r.role == role and r.state not in vacant}
    return [i for i in range(job.spec.roles[role].replicas.max) if i not in held]
