"""The scheduling pass: cluster + now + policy -> plan. Pure: the ledger is worked on inside a trial and put back.

Cost follows what may have changed: a line whose head did not fit is not looked at again until something became free
(`Ledger.freed`), so a pass over 10^5 unchanged waiting jobs costs the number of distinct lines at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster, Line, Rank, equal_rank, missing_replicas
from jobsched.core.job import Binding, Job, ReplicaState, Shape
from jobsched.core.plan import Decision, Plan
from jobsched.core.policies.ordering import Ordering, priority
from jobsched.core.policies.placement import Gang, Score, place_gang, place_more
from jobsched.core.policies.preemption import Replan, replan
from jobsched.core.resources import WHOLE_GPU
from jobsched.spec.job import RestartScope, restart_policy
from jobsched.spec.queue import QueueSpec


@dataclass(frozen=True, slots=True)
class Policy:
    """Named pure functions chosen in the server's config."""

    ordering: Ordering = priority
    rank: Rank = equal_rank
    """Order between like jobs, before their age."""
    strict: bool = False
    """When the first job of a queue does not fit, its others wait too (Kueue's StrictFIFO, Helios)."""
    replan: Replan | None = None
    """Preemption: running jobs may be stopped for better ones."""
    pass_every_ms: int = 0
    """Passes only at multiples of this; 0: whenever something happened."""
    score: Score = Score.PACK
    batch: int = 1_000
    """Most gangs placed in one pass, so that a cold start with a long queue still answers in between."""


def schedule(cluster: Cluster, now_ms: int, policy: Policy) -> Plan:
    """One pass.

    1. Jobs whose backoff is over join their lines.
    2. Running jobs below their minimum get replicas back.
    3. Waiting jobs start, best first; a line whose head does not fit is left until something becomes free.
    4. Running jobs below what they want grow into what is left.
    """
    cluster.unpark(now_ms)
    if policy.pass_every_ms and now_ms % policy.pass_every_ms:
        cluster.next_pass_ms = now_ms - now_ms % policy.pass_every_ms + policy.pass_every_ms if cluster.jobs else 0
        return Plan()
    freed = cluster.ledger.freed
    hungry = [cluster.jobs[job_id] for job_id, tried in cluster.growing.items() if tried != freed]
    with cluster.ledger.trial():
        usage = Usage(dict(cluster.queue_gpu_milli), dict(cluster.array_active))
        below = sorted((job for job in hungry if below_minimum(job)), key=_by_claim)
        decisions = [d for job in below for d in grow(cluster, job, usage, now_ms)]
        if policy.replan is not None:
            placed, examined = _replan(cluster, now_ms, policy, policy.replan)
        else:
            placed, examined = _start_waiting(cluster, usage, now_ms, policy)
        decisions += placed
        if len(placed) < policy.batch:
            above = sorted((job for job in hungry if not below_minimum(job)), key=_by_claim)
            decisions += [d for job in above for d in grow(cluster, job, usage, now_ms)]
    return Plan(tuple(decisions), examined + len(hungry))


def _replan(cluster: Cluster, now_ms: int, policy: Policy, how: Replan) -> tuple[list[Decision], int]:
    """Quotas and array limits count from nothing: whoever stands first gets them first."""
    usage = Usage({}, {})
    decisions, examined = replan(
        cluster, now_ms, how, policy.score,
        admit=lambda job: admit(cluster, job, usage),
        booked=lambda job, bindings: usage.book(job, bindings, starts=True),
    )  # fmt: skip
    if policy.pass_every_ms:
        cluster.next_pass_ms = now_ms + policy.pass_every_ms if cluster.jobs else 0
    return decisions, examined


@dataclass(slots=True)
class Usage:
    """What queues and arrays hold, counted on during a pass."""

    queue_gpu_milli: dict[str, int]
    array_active: dict[str, int]

    def gpus_left_milli(self, queue: QueueSpec) -> int | None:
        """GPUs that the queue may still take; None: no limit."""
        if queue.max_gpus is None:
            return None
        return queue.max_gpus * WHOLE_GPU - self.queue_gpu_milli.get(queue.name, 0)

    def book(self, job: Job, bindings: tuple[Binding, ...], starts: bool) -> None:
        used = sum(share.milli for binding in bindings for share in binding.gpus)
        self.queue_gpu_milli[job.spec.queue] = self.queue_gpu_milli.get(job.spec.queue, 0) + used
        if starts and job.array_id:
            self.array_active[job.array_id] = self.array_active.get(job.array_id, 0) + 1


def _by_claim(job: Job) -> tuple[int, int, str]:
    return (-job.priority, job.submitted_at_ms, str(job.id))


def below_minimum(job: Job) -> bool:
    have: dict[str, int] = {}
    for replica in job.replicas.values():
        have[replica.role] = have.get(replica.role, 0) + (replica.binding is not None)
    return any(have.get(name, 0) < role.replicas.min for name, role in job.spec.roles.items())


def _start_waiting(
    cluster: Cluster, usage: Usage, now_ms: int, policy: Policy
) -> tuple[list[Decision], int]:
    heads = [
        (policy.ordering(line.key, line.places[0]), serial, line)
        for serial, line in enumerate(_worth_a_try(cluster, policy))
    ]
    cursor = [0] * len(heads)
    heapq.heapify(heads)
    decisions: list[Decision] = []
    examined = 0
    while heads and len(decisions) < policy.batch:
        _, serial, line = heapq.heappop(heads)
        if line.key.queue in cluster.stuck:
            continue
        job = cluster.jobs[line.places[cursor[serial]].job_id]
        examined += 1
        shape = admit(cluster, job, usage)
        gang = place_gang(cluster, shape, job.avoid, policy.score) if shape is not None else None
        if not isinstance(gang, Gang):
            if shape is None:
                line.refused_at = cluster.ledger.freed
            else:
                line.blocked_at = cluster.ledger.freed_for(line.key.shape.node_labels)
            if policy.strict:
                cluster.stuck[line.key.queue] = line
            continue
        decisions.append(ev.AttemptPlaced(now_ms, job.id, job.attempt + 1, gang.bindings, gang.coordinator_port))
        usage.book(job, gang.bindings, starts=True)
        cursor[serial] += 1
        if cursor[serial] < len(line.places):
            place = line.places[cursor[serial]]
            heapq.heappush(heads, (policy.ordering(line.key, place), serial, line))
    return decisions, examined


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


def admit(cluster: Cluster, job: Job, usage: Usage) -> Shape | None:
    """The shape in which the job passes its queue's quota and its array's limit: the preferred one, else its minimum,
    else None."""
    queue = cluster.queues.get(job.spec.queue)
    if queue is None or queue.paused:
        return None
    limit = job.spec.array.max_parallel if job.spec.array else 0
    if job.array_id and limit and usage.array_active.get(job.array_id, 0) >= limit:
        return None
    shape = cluster.shape(job)
    left = usage.gpus_left_milli(queue)
    if left is None or sum(r.prefer * r.gpu_milli for r in shape.roles) <= left:
        return shape
    if sum(r.min * r.gpu_milli for r in shape.roles) > left:
        return None
    return replace(shape, roles=tuple(replace(r, prefer=r.min) for r in shape.roles))


def grow(cluster: Cluster, job: Job, usage: Usage, now_ms: int) -> list[Decision]:
    """Replicas that a running job may get now: only roles whose replicas come and go in place."""
    if job.cancel_by or job.stop_wish or job.suspected_since_ms:
        return []
    shape = cluster.shape(job)
    queue = cluster.queues.get(job.spec.queue)
    taken = [r.binding for r in job.replicas.values() if r.binding is not None]
    decisions: list[Decision] = []
    for name, count in missing_replicas(job).items():
        if restart_policy(job.spec, name).scope is not RestartScope.REPLICA:
            continue
        role = next(r for r in shape.roles if r.role == name)
        left = usage.gpus_left_milli(queue) if queue is not None else None
        if left is not None and role.gpu_milli:
            count = min(count, max(0, left) // role.gpu_milli)
        bindings = place_more(cluster, shape, role, _free_indices(job, name)[:count], taken)
        if bindings:
            decisions.append(ev.ReplicasBound(now_ms, job.id, job.attempt, bindings))
            usage.book(job, bindings, starts=False)
        else:
            cluster.growing[job.id] = cluster.ledger.freed
    return decisions


def _free_indices(job: Job, role: str) -> list[int]:
    vacant = (ReplicaState.UNBOUND, ReplicaState.GONE)
    held = {r.index for r in job.replicas.values() if r.role == role and r.state not in vacant}
    return [i for i in range(job.spec.roles[role].replicas.max) if i not in held]
