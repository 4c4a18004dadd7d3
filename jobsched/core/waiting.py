"""Waiting jobs start, best first; who does not fit gets room made for it, or a reservation. A step of `schedule`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from jobsched.core.clearing import make_room
from jobsched.core.cluster import Cluster
from jobsched.core.heads import Heads
from jobsched.core.job import Job, Reason, Shape
from jobsched.core.lines import Line
from jobsched.core.passes import VAIN, Pass
from jobsched.core.plan import Reservation
from jobsched.core.policies.admission import admit
from jobsched.core.policies.backfill import Backfill, in_the_way, meets, reserve, reserve_limit, seats_free
from jobsched.core.policies.ordering import OrderKey
from jobsched.core.policies.placement import Gang
from jobsched.core.policies.quota import Refused

BEHIND = 50
"""Jobs looked at in a pass behind those that only a reservation keeps from starting."""


def start_waiting(run: Pass, lines: Sequence[Line]) -> None:
    """Start the jobs of these lines, best first."""
    cluster, policy = run.cluster, run.policy
    heads, claims, looks = Heads(run, lines), run.claims, BEHIND
    going = {line.key.queue for line in lines} if policy.strict else set()
    """Where the first who does not fit stops his queue: those that are not stopped yet."""
    while not run.full and (head := heads.pop()) is not None:
        key, line, at = head
        place = line.places[at]
        if line.key.queue in cluster.lines.stuck:
            continue
        if not policy.strict and run.pass_over(line, place.job_id):
            heads.drop(run.pass_over)
            continue
        job = cluster.jobs[place.job_id]
        run.examined += 1
        shape = admit(cluster, job, run.now_ms)
        near = isinstance(shape, Shape) and _might_fit(run, line, shape)
        felt = claims if near or not claims else [claim for claim in claims if claim.queue]
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
            going.discard(line.key.queue)
            if not going:
                break
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
    guard, mine = run.guard, run.cluster.reservations.get(job.id)
    kept = [claim for claim in others if claim.seats] if others else []
    if mine is None and run.room.too_full(shape, kept):
        return False
    run.room.leave()
    if mine is None and (not kept or all(claim in guard.claims for claim in kept)):
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
    if mine is None and run.sated(run.cluster.shape(job)):
        return
    others = [claim for claim in run.claims if claim.seats and claim is not mine]
    if run.held(how, shape, others):
        return
    if run.sought >= how.depth + VAIN or run.cluster.far_off.get(job.id, 0) > run.now_ms:
        return
    run.room.leave()
    run.guard.let_go()
    beside = [claim for claim in others if meets(run.cluster, shape, claim)]
    found = reserve(run.cluster, job, shape, key, beside, run.ends(), run.now_ms, run.policy.score)
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


def overdue(cluster: Cluster, how: Backfill, now_ms: int) -> None:
    """Who should have started a while ago is promised another instant: what runs takes longer than was expected, and
    until it is over others may have the seats that are kept."""
    if now_ms < cluster.overdue_ms:
        return
    for job_id, claim in cluster.reservations.items():
        line = cluster.line_of(job_id)
        if line is not None and now_ms >= claim.at_ms + how.patience_ms:
            line.blocked_at = line.refused_at = -1
            cluster.lines.again()
            cluster.overdue_ms = now_ms + how.patience_ms
