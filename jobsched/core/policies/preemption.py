"""Preemptive re-planning: at each pass all runnable jobs are placed anew in the policy's order, as if the cluster were
empty; those that find no place are stopped, and what runs stays where it is whenever that is possible.

Used by `schedule` when the policy names a `Replan` (SRTF, SRSF, Tiresias). Stopping and starting are two passes apart:
what a victim holds is free only once its replicas are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster, Standing
from jobsched.core.job import Binding, Cause, FailureClass, Job, Outcome, Phase, Reason, RoleShape, Shape
from jobsched.core.plan import Decision
from jobsched.core.policies.placement import Gang, Score, place_gang
from jobsched.core.policies.quota import Refused
from jobsched.core.resources import JobId


@dataclass(frozen=True, slots=True)
class Turn:
    """One runnable job in its place: lower level first. `until_ms`: when it changes by itself (0: never)."""

    job: Job
    level: int
    until_ms: int = 0


Order = Callable[[Cluster, Sequence[Job], int], list[Turn]]
"""(cluster, runnable jobs by age, now) -> the same jobs, best first."""


@dataclass(frozen=True, slots=True)
class Replan:
    """How a preemptive policy re-plans."""

    order: Order
    repack: bool = False
    """Move running jobs too when a better one finds no place between them."""
    running_first: bool = False
    """Within a level, jobs that run stand before those that wait (Tiresias in Muri's simulator)."""
    settle: bool = False
    """Start nobody before everything that was stopped is gone."""


Admit = Callable[[Job], Shape | Refused]
"""The shape in which a job passes its queue's quota, counting what was admitted before."""
Booked = Callable[[Job, tuple[Binding, ...]], None]


def replan(
    cluster: Cluster, now_ms: int, how: Replan, score: Score, admit: Admit, booked: Booked
) -> tuple[list[Decision], int]:
    """Decisions that bring the cluster nearer to the wanted set of running jobs, and how many jobs were looked at. Must
    run inside `ledger.trial()`. O(runnable jobs log)."""
    jobs = cluster.jobs
    runnable = [
        job
        for job in jobs.values()
        if (job.phase is Phase.QUEUED and cluster.line_of(job.id) is not None)
        or (job.phase in (Phase.STARTING, Phase.RUNNING) and not job.cancel_by and not job.stop_wish)
    ]
    turns = how.order(cluster, runnable, now_ms)
    held = {job.id: _held(cluster, job) for job in jobs.values() if job.replicas}
    wanted = _choose(cluster, turns, held, score, admit, booked)
    stays = {job_id for job_id in wanted if job_id in held}
    moves: set[JobId] = set()
    fresh = [turn.job for turn in turns if turn.job.id in wanted and turn.job.id not in held]
    if how.repack and not _fits_beside(cluster, fresh, held, stays, wanted, score):
        moves = {job_id for job_id in stays if set(wanted[job_id].bindings) != {b for b, _ in held[job_id]}}
        stays -= moves
    decisions: list[Decision] = []
    for turn in turns:
        job = turn.job
        if job.id in held and job.id not in stays:
            reason = Reason.MOVED if job.id in moves else Reason.PREEMPTED
            cause = Cause(reason, FailureClass.PREEMPTED, "a job that goes first needs the place")
            outcome = Outcome(Phase.QUEUED, reason, cause)
            decisions.append(ev.AttemptStopping(now_ms, job.id, job.attempt, outcome))
    leaving = bool(decisions) or any(job.phase is Phase.STOPPING for job in jobs.values())
    running = set(stays)
    if not (how.settle and leaving):
        for job in fresh:
            gang = place_gang(cluster, wanted[job.id].shape, job.avoid, score)
            if not isinstance(gang, Gang):
                break
            running.add(job.id)
            decisions.append(ev.AttemptPlaced(now_ms, job.id, job.attempt + 1, gang.bindings, gang.coordinator_port))
    _remember(cluster, turns, running if not leaving else set(wanted), how.running_first)
    cluster.next_pass_ms = min((t.until_ms for t in turns if t.until_ms and t.job.id in running), default=0)
    return decisions, len(turns)


@dataclass(frozen=True, slots=True)
class _Wanted:
    shape: Shape
    bindings: tuple[Binding, ...]


_Held = dict[JobId, list[tuple[Binding, RoleShape]]]


def _held(cluster: Cluster, job: Job) -> list[tuple[Binding, RoleShape]]:
    roles = {role.role: role for role in cluster.shape(job).roles}
    return [(r.binding, roles[r.role]) for r in job.replicas.values() if r.binding is not None]


def _choose(
    cluster: Cluster, turns: Sequence[Turn], held: _Held, score: Score, admit: Admit, booked: Booked
) -> dict[JobId, _Wanted]:
    """Who would run on the empty cluster, best first, and where. Leaves the ledger as it was."""
    ledger = cluster.ledger
    mark = ledger.mark()
    for bookings in held.values():
        for binding, role in bookings:
            ledger.lend(binding, role)
    wanted: dict[JobId, _Wanted] = {}
    too_big: set[Shape] = set()
    for turn in turns:
        asked = cluster.shape(turn.job)
        if asked in too_big:  # less and less is free
            continue
        shape = admit(turn.job)
        if isinstance(shape, Refused):
            continue
        gang = place_gang(cluster, shape, (), score)
        if isinstance(gang, Gang):
            wanted[turn.job.id] = _Wanted(shape, gang.bindings)
            booked(turn.job, gang.bindings)
        else:
            too_big.add(asked)
    ledger.rollback(mark)
    return wanted


def _fits_beside(
    cluster: Cluster, fresh: Sequence[Job], held: _Held, stays: set[JobId], wanted: dict[JobId, _Wanted], score: Score
) -> bool:
    """Whether the newcomers fit while everything that stays keeps its place. Leaves the ledger as it was."""
    ledger = cluster.ledger
    mark = ledger.mark()
    for job_id, bookings in held.items():
        if job_id not in stays:
            for binding, role in bookings:
                ledger.lend(binding, role)
    fits = all(isinstance(place_gang(cluster, wanted[job.id].shape, (), score), Gang) for job in fresh)
    ledger.rollback(mark)
    return fits


def _remember(cluster: Cluster, turns: Sequence[Turn], running: set[JobId], running_first: bool) -> None:
    ordered = sorted(turns, key=lambda t: (t.level, running_first and t.job.id not in running))
    cluster.standing = {turn.job.id: Standing(turn.level, place) for place, turn in enumerate(ordered)}
