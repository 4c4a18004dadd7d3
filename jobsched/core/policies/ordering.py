"""Who goes first: each policy is one plain function, its source named.

Without preemption an `Ordering` gives the sort key of a line's head, and a `Rank` (see `cluster.Rank`) the order within
a line; smaller goes first. Preemptive policies give an `Order` over all runnable jobs for `policies.preemption`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, exp2
from operator import itemgetter

from jobsched.core.cluster import Cluster
from jobsched.core.job import Job, Phase
from jobsched.core.lines import Line, LineKey, Place
from jobsched.core.policies.estimate import PROBE_MS, Estimates, ran_ms
from jobsched.core.policies.fairness import SCALE, dominant
from jobsched.core.policies.families import gpus_milli
from jobsched.core.policies.preemption import Order, Turn
from jobsched.core.policies.survival import EDGES_MS
from jobsched.core.resources import WHOLE_GPU, JobId
from jobsched.spec.queue import GPUS

OrderKey = tuple[int, int, int, str]
Ordering = Callable[[LineKey, Place], OrderKey]
Told = Callable[[Job], int]
"""What is known or guessed of a job's time to its end, in milliseconds."""


def priority(key: LineKey, place: Place) -> OrderKey:
    """Higher priority first, then rank, earlier submission, id: `sbatch --priority`, Kueue's default."""
    return (-key.priority, place.rank, place.submitted_at_ms, place.job_id)


def fifo(key: LineKey, place: Place) -> OrderKey:
    """Rank, then earlier submission, whatever the priority. With no rank: first in, first out; with a run time as rank:
    shortest job first; with GPU time: smallest first, which is quasi-shortest service (QSSF, Helios SC'21) when the
    time is an estimate."""
    return (0, place.rank, place.submitted_at_ms, place.job_id)


@dataclass(frozen=True, slots=True)
class Factors:
    """Weights of Slurm's multifactor priority (priority/multifactor); each factor is between 0 and 1, but `priority`,
    which is the job's own number."""

    priority: int = 1_000
    age: int = 1_000
    """Waiting time, full after `age_full_ms`."""
    size: int = 0
    """Part of the cluster's GPUs that the job needs at least; below 0: small ones go first."""
    fair: int = 1_000
    """2 to the power of minus its queue's use (now and in the past) over its queue's part by weight."""
    age_full_ms: int = 7 * 86_400_000
    half_life_ms: int = 0
    """After which past use counts half, where queues do not take turns; 0: only what is held now counts."""


def multifactor(cluster: Cluster, now_ms: int, how: Factors) -> Ordering:
    """The highest sum of weighted factors first, then rank, earlier submission, id. Holds for one pass; queues' factors
    follow what it starts."""
    capacity, half_life_ms = cluster.fleet.capacity(), cluster.quotas.half_life_ms
    gpus = max(1, capacity.get(GPUS, 0))
    weights = sum(a.weight for a in cluster.quotas.accounts.values() if not a.members) or 1

    def order(key: LineKey, place: Place) -> OrderKey:
        account = cluster.quotas.account(key.queue)
        used = dominant(account, capacity) / SCALE
        if half_life_ms:
            used += max((account.average(r, now_ms, half_life_ms) / n for r, n in capacity.items() if n), default=0.0)
        fair = exp2(-used * weights / account.weight) if account.weight else 0.0
        age = min(1.0, max(0, now_ms - place.submitted_at_ms) / how.age_full_ms)
        size = min(1.0, sum(role.min * role.gpu_milli for role in key.shape.roles) / gpus)
        score = how.priority * key.priority + how.age * age + how.size * size + how.fair * fair
        return (-round(1_000 * score), place.rank, place.submitted_at_ms, place.job_id)

    return order


def gpu_time(told: Told) -> Told:
    """Rank by GPU-seconds instead of seconds: a job that holds eight GPUs delays eight others."""
    return lambda job: told(job) * max(1, gpus_milli(job)) // WHOLE_GPU


def expected_service(job: Job, estimates: Estimates) -> int:
    """Rank by the GPU time that jobs of the family take on average, without preemption: quasi-shortest service first
    (QSSF, Helios SC'21), learned from the past."""
    return estimates.mean_left_ms(job) * max(1, gpus_milli(job)) // WHOLE_GPU


Firm = Callable[[Job], float]
"""How many times better a waiting job has to be to take this one's place; 1 of jobs that wait."""


def loose(job: Job) -> float:
    """Nobody is firm: where run times are known exactly, an order by what is left never turns round."""
    return 1.0


def shortest(told: Told, firm: Firm = loose) -> Order:
    """Shortest remaining time first (SRTF); with `gpu_time(told)` shortest remaining service (SRSF)."""

    def order(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        rows = [(told(job) / firm(job), job.submitted_at_ms, job.id, job) for job in runnable]
        rows.sort(key=itemgetter(0, 1, 2))
        return [Turn(row[3], 0) for row in rows]

    return order


LAST = 1 << 60


TIRESIAS_GPU_S = (3_250, 7_200)
"""GPU-seconds at which a job sinks a level, as Muri and Tiresias' own authors run it."""


def least_attained(thresholds_gpu_s: Sequence[int], whole_seconds: bool = True) -> Order:
    """Discretised two-dimensional least attained service: Tiresias-L (NSDI'19). A job sinks one level each time its
    GPU-seconds pass a threshold; within a level first come first served, newly sunk ones last. `whole_seconds` rounds
    the run time at which it sinks up."""

    def order(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        rows: list[tuple[int, int, int, Turn]] = []
        for age, job in enumerate(sorted(runnable, key=lambda job: (job.submitted_at_ms, job.id))):
            standing = cluster.standing.get(job.id)
            level = standing.level if standing else 0
            until_ms = 0
            if job.first_placed_at_ms:
                gpus = max(1, gpus_milli(job)) / WHOLE_GPU
                ran_ms = job.gpu_time(now_ms) / WHOLE_GPU / gpus
                limits = [1_000 * (ceil(t / gpus) if whole_seconds else t / gpus) for t in thresholds_gpu_s]
                while level < len(limits) and ran_ms >= limits[level]:
                    level += 1
                if level < len(limits) and job.phase is not Phase.QUEUED:
                    until_ms = now_ms + max(1, ceil(limits[level] - ran_ms))
            kept = standing is not None and standing.level == level
            place = standing.place if standing is not None and kept else LAST
            rows.append((level, place, age, Turn(job, level, until_ms)))
        rows.sort(key=lambda row: row[:3])
        return [row[3] for row in rows]

    return order


def in_time(told: Told, firm: Firm = loose) -> Order:
    """Deadlines where they can still be met, smallest remaining service otherwise. First come jobs whose slack is
    shorter than their own time to the end, which would miss if they waited much longer; last those that cannot make it
    any more. Earliest deadline first spends whole GPUs on jobs that are late already (Chronus, SoCC'21, refuses them
    leases); shortest first meets most deadlines by itself."""

    def order(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        rows = []
        for job in runnable:
            left, due = max(1, told(job)), _due_ms(job)
            waits = job.phase is Phase.QUEUED
            level = _urgency(left, due, now_ms, 0 if waits else now_ms - job.attempt_started_at_ms)
            turn = Turn(job, 0, due - 2 * left if waits and due and level == 1 else 0)
            rows.append((level, left * max(1, gpus_milli(job)) / firm(job), job.submitted_at_ms, job.id, turn))
        rows.sort(key=itemgetter(0, 1, 2, 3))
        return [row[4] for row in rows]

    return order


def in_time_heads(cluster: Cluster, lines: Sequence[Line], most: int, now_ms: int) -> Iterable[JobId]:
    """Whom of such lines `in_time` needs to see, where `Policy.rank` is what is left, or the same for a whole line
    (0): as many of each urgency as could run, and who is next to become urgent. O(jobs)."""
    found: tuple[list[JobId], ...] = ([], [], [])
    soon: tuple[int, JobId] | None = None
    for line in lines:
        alike = 0
        for rank, _, job_id in line.places:
            job = cluster.jobs[job_id]
            left = rank or alike or max(1, cluster.estimates.left_ms(job, now_ms))
            alike = alike or (0 if rank else left)
            due = _due_ms(job)
            level = _urgency(left, due, now_ms)
            if len(found[level]) < most:
                found[level].append(job_id)
            if level == 1 and due and (soon is None or due - 2 * left < soon[0]):
                soon = (due - 2 * left, job_id)
    return dict.fromkeys([*(job_id for same in found for job_id in same), *([soon[1]] if soon else [])])


def _due_ms(job: Job) -> int:
    """When the job should be over; 0: whenever."""
    return job.submitted_at_ms + job.spec.deadline if job.spec.deadline else 0


def _urgency(left: int, due: int, now_ms: int, ran: int = 0) -> int:
    """0: now or never, 1: there is time, 2: too late. What was let in as urgent stays so until its end: its slack does
    not shrink any more, what is left does."""
    slack = due - now_ms - left
    return 1 if not due or slack > left + ran else 0 if slack >= 0 else 2


LEASE_MS = 1_200_000
"""How long a running job keeps its place before the order is looked at again, where it follows the clock."""


def finish_time_fairness(told: Told) -> Order:
    """Furthest behind its fair finish first: rho = (waited + ran + left) over what the job would take on its share of
    the cluster (Themis, NSDI'20)."""

    def order(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        capacity = max(1, cluster.fleet.capacity()[GPUS])
        asked = sum(gpus_milli(job) for job in runnable)
        crowding = max(1.0, asked / capacity)
        rows = []
        for job in runnable:
            left = max(1, told(job))
            alone = crowding * (ran_ms(job, now_ms) + left)
            rows.append((-(now_ms - job.submitted_at_ms + left) / alone, job.submitted_at_ms, job.id, job))
        rows.sort(key=itemgetter(0, 1, 2))
        return [Turn(row[3], 0, now_ms + LEASE_MS if row[3].phase is not Phase.QUEUED else 0) for row in rows]

    return order


FIRM = 1.5
"""A waiting job takes a running one's place only if it is so many times better: what preemption costs is not known
exactly, and two jobs whose estimates cross must not chase each other."""
FIRM_TOLD = 1.1
"""The same between jobs that tell how far they are: their order crosses once at most."""
SURE_PER_MS = 1e-15


def learned(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
    """Highest Gittins index per GPU first, with run times learned per family (`estimate`), or reported progress where
    there is some: what SRSF does when run times are known, and least attained service when nothing is."""
    estimates = cluster.estimates
    rows: list[tuple[int, float, bool, int, str, Turn]] = []
    for job in runnable:
        running, until_ms, ran = job.phase is not Phase.QUEUED, 0, ran_ms(job, now_ms)
        cost, until_ran = cost_of(estimates, job, ran, now_ms)
        if running:
            cost /= FIRM if until_ran else FIRM_TOLD
            until_ms = now_ms + max(1, until_ran - ran) if until_ran else 0
        rows.append((-job.priority, cost, not running, job.submitted_at_ms, job.id, Turn(job, 0, until_ms)))
    rows.sort()  # ids differ, so turns are never compared
    return [row[5] for row in rows]


def learned_heads(cluster: Cluster, lines: Sequence[Line], most: int, now_ms: int) -> Iterable[JobId]:
    """Whom of like lines `learned` needs to see, where `Policy.alike` is `outlook`: those of the best lines, as many as
    could run; and as many of those that told something of their own. O(lines)."""
    estimates, rows = cluster.estimates, []
    for line in lines:
        if line.key.outlook:
            job = cluster.jobs[line.places[0].job_id]
            rows.append((cost_of(estimates, job, job.ran_ms, now_ms)[0], *line.places[0], line))
        else:
            yield from [place.job_id for place in line.places[:most]]
    rows.sort(key=itemgetter(0, 1, 2, 3))
    for row in rows:
        for place in row[-1].places[:most]:
            yield place.job_id
        most -= len(row[-1].places)
        if most <= 0:
            break


def cost_of(estimates: Estimates, job: Job, ran: int, now_ms: int) -> tuple[float, int]:
    """GPUs (in thousandths) over ends per millisecond that the job promises, and the run time at which that changes (0:
    never). A job of a kind that reports its progress is as good as one that ends when that is known."""
    gpus = max(1, gpus_milli(job))
    left = estimates.reported_left_ms(job, now_ms)
    if left is not None:
        return gpus * left, 0
    if ran < PROBE_MS and estimates.will_report(job):
        return gpus * (PROBE_MS - ran), PROBE_MS
    rate, until_ran = estimates.promise(job, ran)
    return gpus / max(SURE_PER_MS, rate), until_ran


def estimated(order_of: Callable[[Told, Firm], Order]) -> Order:
    """The order of a policy that has to be told run times, by learned ones (`Estimates.left_ms`), in which whoever runs
    stands firm. Looked at again when a running job has outrun one more bucket of those."""

    def order(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        estimates = cluster.estimates

        def firm(job: Job) -> float:
            if job.phase is Phase.QUEUED:
                return 1.0
            return FIRM if estimates.reported_left_ms(job, now_ms) is None else FIRM_TOLD

        turns = order_of(lambda job: estimates.left_ms(job, now_ms), firm)(cluster, runnable, now_ms)
        return [turn if turn.job.phase is Phase.QUEUED else _until_next_bucket(turn, now_ms) for turn in turns]

    return order


def _until_next_bucket(turn: Turn, now_ms: int) -> Turn:
    ran = ran_ms(turn.job, now_ms)
    edge = bisect_right(EDGES_MS, ran)
    instants = [turn.until_ms] if turn.until_ms else []
    if edge < len(EDGES_MS):
        instants.append(now_ms + EDGES_MS[edge] - ran)
    return turn._replace(until_ms=min(instants, default=0))


def urgent(order: Order) -> Order:
    """The same among equal priorities; higher ones go first."""

    def by_priority(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        return sorted(order(cluster, runnable, now_ms), key=lambda turn: -turn.job.priority)

    return by_priority


Spares = Callable[[Job, int], bool]
"""(job that runs, now) -> whether it must not be stopped."""


def nobody(job: Job, now_ms: int) -> bool:
    """Spares nobody."""
    return False


def may_stop_ms(job: Job, now_ms: int, min_run_ms: int, spares: Spares, times: int = 1) -> int:
    """When a job that runs may be stopped for another: so many times that long after its start; while it is spared, not
    before it is looked at again."""
    until_ms = job.attempt_started_at_ms + times * min_run_ms
    if until_ms <= now_ms and job.phase.runs and spares(job, now_ms):
        return now_ms + max(1_000, min_run_ms)
    return until_ms


def patient(order: Order, min_run_ms: int | None, spares: Spares = nobody) -> Order:
    """The same, but nobody is stopped sooner than that after its start (None: never), nor while it is spared."""

    def patiently(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        stay: list[Turn] = []
        rest: list[Turn] = []
        for turn in order(cluster, runnable, now_ms):
            until_ms = may_stop_ms(turn.job, now_ms, min_run_ms, spares) if min_run_ms is not None else 0
            if turn.job.phase is Phase.QUEUED or (min_run_ms is not None and until_ms <= now_ms):
                rest.append(turn)
            else:
                instants = [instant for instant in (turn.until_ms, until_ms) if instant]
                stay.append(turn._replace(until_ms=min(instants, default=0)))
        return stay + rest

    return patiently


def left_told(job: Job, estimates: Estimates) -> int:
    """Rank of waiting jobs of one outlook: by what is left by their own report, or by their guess, or by age."""
    return estimates.reported_left_ms(job, 0) or job.spec.expected


def outlook(job: Job, estimates: Estimates) -> tuple[int, ...]:
    """Which waiting jobs are alike for `learned`."""
    return estimates.outlook(job)


def knapsack(told: Told) -> Order:
    """Of all sets of jobs that hold no more GPUs than there are for them, first the one that ends most jobs per second:
    the knapsack of which SRSF is the greedy answer. Then the rest, smallest remaining service first.

    O(distinct sizes * GPUs * log GPUs) a pass."""

    def order(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        if not runnable:
            return []
        sizes: dict[int, list[tuple[int, int, str, Job]]] = {}
        for job in runnable:
            left = max(1, told(job))
            sizes.setdefault(max(1, ceil(gpus_milli(job) / WHOLE_GPU)), []).append(
                (left, job.submitted_at_ms, job.id, job)
            )
        room = cluster.parts.gpu_milli(cluster.shape(runnable[0])) // WHOLE_GPU
        room = min(room, sum(size * len(rows) for size, rows in sizes.items()))
        value = [0.0] * (room + 1)
        counts: dict[int, list[int]] = {}
        for size in sorted(sizes, reverse=True):
            sizes[size].sort()
            gains = [0.0]
            for left, *_ in sizes[size][: room // size]:
                gains.append(gains[-1] + 1 / left)
            value, counts[size] = _add_alike(value, gains, size)
        chosen: list[list[Job]] = []
        for size in reversed(counts):
            count = counts[size][room]
            room -= size * count
            chosen.append([row[3] for row in sizes[size][:count]])
        first = [job for jobs in reversed(chosen) for job in jobs]
        taken = {job.id for job in first}
        rest = [(row[0] * size, *row[1:]) for size, rows in sizes.items() for row in rows if row[2] not in taken]
        return [Turn(job, 0) for job in first] + [Turn(row[3], 0) for row in sorted(rest)]

    return order


def _add_alike(value: Sequence[float], gains: Sequence[float], size: int) -> tuple[list[float], list[int]]:
    """Room -> the best value when jobs of one size may be added, and the fewest of them with which it is reached.
    `value`: room -> the best without them; `gains`: number of them -> what they add, each less than the one before. So
    of more room, what is left to the others is never less: each half is searched within the bounds of its middle."""
    values, counts, most = list(value), [0] * len(value), len(gains) - 1
    for start in range(min(size, len(value))):
        column = value[start::size]
        halves = [(0, len(column) - 1, 0, len(column) - 1)]
        while halves:
            low, high, fewest, widest = halves.pop()
            middle = (low + high) // 2
            best, others = -1.0, 0
            for left in range(min(middle, widest), max(fewest, middle - most) - 1, -1):
                found = column[left] + gains[middle - left]
                if found > best:
                    best, others = found, left
            values[start + middle * size], counts[start + middle * size] = best, middle - others
            if low < middle:
                halves.append((low, middle - 1, fewest, others))
            if middle < high:
                halves.append((middle + 1, high, others, widest))
    return values, counts
