"""On which kind of GPU each job should run, where kinds differ in speed and jobs in how much that means to them.

An `Order` for `policies.preemption`: who goes first, and where. On unlike machines the sum of all times to completion
is the sum over jobs of how long each takes where it is, times how many end no sooner on that machine, itself included
(Horn 1973; Bruno, Coffman & Sethi 1974). So jobs are given kinds from the last to the first: each goes where its own
time, times those who already stand behind it there, is least. What is short goes to the fast GPUs while they are free;
what gains little from them makes way once many wait; under load each kind does what it is best at, as the throughputs
of Gavel (OSDI'20) and Sia (SOSP'23) have it, without a linear program in between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

from jobsched.core.cluster import Cluster
from jobsched.core.job import Job, Phase, Shape
from jobsched.core.lines import Line
from jobsched.core.policies.estimate import ran_ms
from jobsched.core.policies.families import gpus_milli
from jobsched.core.policies.ordering import Spares, cost_of, may_stop_ms, nobody
from jobsched.core.policies.preemption import Heads, Order, Turn
from jobsched.core.resources import JobId
from jobsched.spec.queue import CPU, GPUS, MEMORY

Speed = Callable[[Cluster, Job, str], float]
"""(cluster, job, GPU kind) -> how fast it goes there, relative to other kinds; 0: not at all."""
Left = Callable[[Cluster, Job, int], tuple[float, int]]
"""(cluster, job, now) -> (time to its end at speed 1, or what stands for it, in ms; when that changes by itself)."""

STAY = 1.1
"""Another must promise to be so many times sooner over to take a running job's place, and so must another kind for it
to move there: nothing is known exactly, and like jobs must not chase each other."""
NEVER_MS = 1 << 60
MOVE_MS = 60_000
"""What a move costs besides, unless the job has shown that it takes longer to start."""

Row = tuple[bool, int, float, int, str]
CALMEST = 10
"""Attempts after which a job is not left in peace for any longer."""
PAYS = 10
"""Being on fewer nodes is worth a move while so many times as long is left."""


class Choice(NamedTuple):
    """One job, and what it would take on each kind."""

    key: tuple[int, int, str]
    """(minus its priority, its submission, its id)"""
    gpu_milli: int
    times: Mapping[str, float]
    """Kind -> milliseconds to its end there."""
    here: str = ""
    """The kind that it runs on; "": it waits."""
    move_ms: float = 0.0
    """What leaving `here` costs."""
    stays: bool = False
    """It has not run for long enough to be stopped or moved."""

    def on(self, kind: str) -> float:
        """Milliseconds to its end there; less where it runs, more where it would have to start again."""
        if not self.here:
            return self.times[kind]
        return self.times[kind] / STAY if kind == self.here else self.times[kind] + self.move_ms

    def least(self) -> tuple[int, float, int, str]:
        """Where it stands among all: priority, then the service that it still needs at best, wherever it is now."""
        return (self.key[0], min(self.times.values()) * self.gpu_milli, *self.key[1:])

    def row(self, kind: str) -> Row:
        """Where it stands among the jobs of that kind: priority, then smallest remaining service."""
        return (not self.stays, self.key[0], self.on(kind) * self.gpu_milli, *self.key[1:])


def choose_kinds(choices: Sequence[Choice], capacity: Mapping[str, int]) -> dict[str, str]:
    """Job id -> kind. `capacity`: thousandths of GPUs of each kind. O(jobs * (kinds + log jobs))."""
    ends: dict[tuple[int, str], list[int]] = {}
    """Priority and kind -> GPUs of the jobs chosen so far, added up: the last job of the line first. Nobody makes way
    for lower priorities."""
    found: dict[str, str] = {}
    for choice in sorted(choices, key=Choice.least, reverse=True):
        costs = []
        for kind in (choice.here,) if choice.stays else choice.times:
            line = ends.setdefault((choice.key[0], kind), [0])
            room = capacity[kind] - choice.gpu_milli  # for those that run beside it
            waiting = max(0, bisect_right(line, line[-1] - room) - 1)
            cost = choice.on(kind) * (1.0 + waiting * choice.gpu_milli / capacity[kind])
            costs.append((cost, line[-1] / capacity[kind], kind))  # among equals, where most is left of it
        kind = min(costs)[-1]
        line = ends[choice.key[0], kind]
        line.append(line[-1] + choice.gpu_milli)
        found[choice.key[2]] = kind
    return found


def fill(choices: Sequence[Choice], chosen: dict[str, str], capacity: Mapping[str, int]) -> None:
    """Who finds no room among its betters of the chosen kind stands up for its place where it runs, or else goes to
    another kind that would be idle; changes `chosen`."""
    rest, room = _seated(choices, chosen, capacity)
    back = {choice.key[2]: choice.here for choice in rest if choice.here in choice.times}
    if any(chosen[name] != here for name, here in back.items()):
        chosen |= back
        rest, room = _seated(choices, chosen, capacity)
    found: dict[str, None] = {}
    tries = [(choice.row(kind), kind, choice) for choice in rest for kind in choice.times if room[kind]]
    for _, kind, choice in sorted(tries, key=itemgetter(0, 1)):
        name = choice.key[2]
        if name not in found and room[kind] >= choice.gpu_milli:
            found[name], chosen[name] = None, kind
            room[kind] -= choice.gpu_milli


def _seated(
    choices: Sequence[Choice], chosen: Mapping[str, str], capacity: Mapping[str, int]
) -> tuple[list[Choice], dict[str, int]]:
    """Who finds no room where it should go when the best go first, and what is left of each kind."""
    rest, room = [], dict(capacity)
    for choice in sorted(choices, key=lambda c: c.row(chosen[c.key[2]])):
        kind = chosen[choice.key[2]]
        if room[kind] >= choice.gpu_milli:
            room[kind] -= choice.gpu_milli
        else:
            rest.append(choice)
    return rest, room


def by_kind(left: Left, speed: Speed, min_run_ms: int | None = 0, spares: Spares = nobody) -> Order:
    """Smallest remaining service first, on the kind where it does most good. Nobody is stopped sooner than
    `min_run_ms` after its start, times its attempts, as plans may swing (None: never), nor while it is spared.
    O(jobs * (kinds + log jobs))."""

    def order(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        capacity = cluster.fleet.gpus({id(shape): shape for shape in map(cluster.shape, runnable)}.values())
        kinds: dict[int, tuple[str, ...]] = {}
        choices: list[Choice] = []
        rows: list[tuple[Row, Turn]] = []
        turns: dict[str, Turn] = {}
        leaving = [cluster.jobs[job_id] for job_id in cluster.leaving]
        back = [job for job in leaving if job.outcome is not None and job.outcome.phase is Phase.QUEUED]
        for job in (*runnable, *back):  # who was stopped a moment ago comes back, and is reckoned with meanwhile
            key = (-job.priority, job.submitted_at_ms, str(job.id))
            work_ms, until_ms = left(cluster, job, now_ms)
            shape, here = cluster.shape(job), cluster.gpu_kind(job) if job.phase.runs else ""
            if id(shape) not in kinds:
                kinds[id(shape)] = _kinds(cluster, shape)
            gpu_milli = sum([role.prefer * role.gpu_milli for role in shape.roles])
            until_stopped_ms = NEVER_MS
            if min_run_ms is not None:
                until_stopped_ms = may_stop_ms(job, now_ms, min_run_ms, spares, min(job.attempt, CALMEST))
            stays = job.phase.runs and now_ms < until_stopped_ms
            times = {
                kind: work_ms / pace
                for kind in kinds[id(shape)]
                if gpu_milli <= capacity.get(kind, 0) and (pace := speed(cluster, job, kind)) > 0.0
            }
            if stays and min_run_ms is not None:
                until_ms = min(until_ms or NEVER_MS, until_stopped_ms)
            turn = Turn(job, 0, until_ms)
            if gpu_milli and times and (here in times or not stays):
                shown = job.running_since_ms - job.attempt_started_at_ms if job.running_since_ms else 0
                choices.append(Choice(key, gpu_milli, times, here, max(MOVE_MS, shown), stays))
                if job.phase is not Phase.STOPPING:
                    turns[key[2]] = turn
            elif job.phase is not Phase.STOPPING:  # needs no GPU, or more than there are of any kind: wherever it fits
                rows.append(((not stays, key[0], work_ms * gpu_milli, *key[1:]), turn))
        chosen = choose_kinds(choices, capacity)
        fill(choices, chosen, capacity)
        for choice in choices:
            name = choice.key[2]
            if name not in turns:
                continue
            kind = chosen[name]
            gather = not choice.stays and choice.times[kind] > PAYS * choice.move_ms
            rows.append((choice.row(kind), turns[name]._replace(kind=kind, gather=gather)))
        rows.sort(key=itemgetter(0))
        return [turn for _, turn in rows]

    return order


def where_alike(heads: Heads) -> Heads:
    """Whom of like lines `by_kind` needs to see: where all GPUs are of one kind, those of `heads`; else all, as each
    that waits behind another makes a kind dearer."""

    def find(cluster: Cluster, lines: Sequence[Line], most: int, now_ms: int) -> Iterable[JobId]:
        if sum(name not in (GPUS, CPU, MEMORY) for name in cluster.fleet.capacity()) <= 1:
            return heads(cluster, lines, most, now_ms)
        return [place.job_id for line in lines for place in line.places]

    return find


def learned_left(cluster: Cluster, job: Job, now_ms: int) -> tuple[float, int]:
    """What stands for a job's time to its end where nobody tells it: the Gittins index of `ordering.learned`, or what
    it reports, at its speed on the average kind."""
    estimates, ran = cluster.estimates, ran_ms(job, now_ms)
    cost, until_ran = cost_of(estimates, job, ran, now_ms)
    left = cost / max(1, gpus_milli(job))
    if estimates.reported_left_ms(job, now_ms) is not None and (kind := cluster.paces.last(job.id)):
        left *= cluster.paces.speed(job, kind)
    return left, now_ms + max(1, until_ran - ran) if until_ran and job.phase is not Phase.QUEUED else 0


def learned_speed(cluster: Cluster, job: Job, kind: str) -> float:
    """By what jobs report (`Paces`)."""
    return cluster.paces.speed(job, kind)


def _kinds(cluster: Cluster, shape: Shape) -> tuple[str, ...]:
    """The kinds that will do for all roles of a shape, best first."""
    roles = [[kind for kind, _ in cluster.ledger.matching(role)] for role in shape.roles if role.gpu_milli]
    return tuple(dict.fromkeys([kind for kind in roles[0] if all(kind in each for each in roles)])) if roles else ()
