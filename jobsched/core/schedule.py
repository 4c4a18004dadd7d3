"""The scheduling pass: cluster + now + policy -> plan. Pure: it works on ledger and quotas inside a trial.

Cost follows what may have changed: a line whose head did not fit is not looked at again until something became free
(`Ledger.freed`), so a pass over 10^5 unchanged waiting jobs costs the number of distinct lines at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from operator import itemgetter

from jobsched.core import events as ev
from jobsched.core.clearing import ripe, start_nominated
from jobsched.core.cluster import Cluster
from jobsched.core.heads import worth_a_try
from jobsched.core.job import Binding, Job, Reason, ReplicaState
from jobsched.core.lines import Line
from jobsched.core.passes import Pass, Policy
from jobsched.core.plan import Decision, Plan
from jobsched.core.policies.admission import admit, more
from jobsched.core.policies.backfill import drop_stale
from jobsched.core.policies.defragmentation import Defragmentation, decisions_of, find_way
from jobsched.core.policies.elasticity import WAITING, Elasticity, in_motion, rebalance
from jobsched.core.policies.ordering import OrderKey, multifactor
from jobsched.core.policies.placement import place_more
from jobsched.core.policies.preemption import Replan, replan
from jobsched.core.policies.quota import Books
from jobsched.core.policies.victims import evictions
from jobsched.core.resources import JobId
from jobsched.core.waiting import overdue, start_waiting
from jobsched.spec.job import resizes_in_place

NOTHING_TO_DO = Plan()


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
    if cluster.parked:
        cluster.unpark(now_ms)
    if policy.pass_every_ms and now_ms % policy.pass_every_ms:
        cluster.next_pass_ms = now_ms - now_ms % policy.pass_every_ms + policy.pass_every_ms if cluster.jobs else 0
        return NOTHING_TO_DO
    if cluster.quotas.windows or cluster.window_ms:
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
        if cluster.ripening:
            ripe(cluster, now_ms)
        if policy.backfill is not None:
            overdue(cluster, policy.backfill, now_ms)
    seen = (freed, cluster.lines.news, cluster.lines.started, cluster.claims_made)
    lines = worth_a_try(cluster, policy) if policy.replan is None and cluster.looked != seen else []
    plan = NOTHING_TO_DO
    if lines or hungry or policy.replan is not None or cluster.nominated or _turns_to(cluster, now_ms, policy):
        run = Pass(cluster, now_ms, policy, examined=len(hungry))
        with cluster.trial():
            _steps(run, hungry, run.hopeful(lines))
        plan = Plan(tuple(run.decisions), run.examined, run.full or run.eased)
    cluster.looked = None if plan.more or cluster.nominated else _once_folded(seen, plan) if plan.decisions else seen
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
        if run.cluster.nominated:
            start_nominated(run)
        start_waiting(run, lines)
        if run.room.evicted:
            run.decisions += evictions(run.cluster, run.room.evicted, run.now_ms)
        elif policy.defragmentation is not None:
            moving = defragment(run, policy.defragmentation)
    run.decisions += moving
    if policy.elastic is not None and not (run.room.evicted or moving or _leaving(run)):
        run.decisions += resize(run, policy.elastic)
    if hungry and len(run.decisions) < policy.batch:
        leaving = _leaving(run)
        for job in hungry:
            if not below_minimum(job) and job.id not in leaving:
                grow(run, job)


def _leaving(run: Pass) -> set[JobId]:
    """Who is to stop by what the pass has decided."""
    return {d.job_id for d in run.decisions if isinstance(d, ev.AttemptStopping)}


def _once_folded(seen: tuple[int, int, int, int], plan: Plan) -> tuple[int, int, int, int] | None:
    """What the next pass sees if nothing but this plan is folded, and it only starts jobs; else None."""
    starts = sum([isinstance(decision, ev.AttemptPlaced) for decision in plan.decisions])
    freed, news, started, claims = seen
    return (freed, news, started + starts, claims) if starts == len(plan.decisions) else None


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


def resize(run: Pass, how: Elasticity) -> list[Decision]:
    """Changes of size; the best of the jobs that wait are thought of too. O(lines), when it is time."""
    cluster, ordering = run.cluster, run.policy.ordering
    if run.now_ms < cluster.resize_ms or not cluster.elastic or in_motion(cluster):
        return []

    def heads(line: Line) -> Iterator[tuple[OrderKey, JobId]]:
        return ((ordering(line.key, place), place.job_id) for place in line.places if place.job_id not in run.settled)

    best = islice(heapq.merge(*map(heads, cluster.lines.values()), key=itemgetter(0)), WAITING)
    return rebalance(cluster, run.now_ms, how, [cluster.jobs[job_id] for _, job_id in best])


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
        role = shape.by_name[name]
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
