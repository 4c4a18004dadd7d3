"""Who goes first: each policy is one plain function, its source named.

Without preemption an `Ordering` gives the sort key of a line's head, and a `Rank` (see `cluster.Rank`) the order within
a line; smaller goes first. Preemptive policies give an `Order` over all runnable jobs for `policies.preemption`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

from jobsched.core.cluster import Cluster, LineKey, Place
from jobsched.core.job import Job, Phase
from jobsched.core.policies.preemption import Order, Turn
from jobsched.core.resources import WHOLE_GPU

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


ORDERINGS: dict[str, Ordering] = {"priority": priority, "fifo": fifo}
"""Policies by the name that a server config chooses."""


def gpus_asked(job: Job) -> int:
    """GPUs that the job wants, in thousandths."""
    return sum(role.gpu.milli * job.wanted_count(name) for name, role in job.spec.roles.items() if role.gpu)


def gpu_time(told: Told) -> Told:
    """Rank by GPU-seconds instead of seconds: a job that holds eight GPUs delays eight others."""
    return lambda job: told(job) * max(1, gpus_asked(job)) // WHOLE_GPU


def shortest(told: Told) -> Order:
    """Shortest remaining time first (SRTF); with `gpu_time(told)` shortest remaining service (SRSF)."""

    def order(cluster: Cluster, runnable: Sequence[Job], now_ms: int) -> list[Turn]:
        return [Turn(job, 0) for job in sorted(runnable, key=lambda job: (told(job), job.submitted_at_ms, job.id))]

    return order


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
            service = cluster.service.get(job.id)
            if service is not None:
                gpus = max(1, gpus_asked(job)) / WHOLE_GPU
                ran_ms = service.at(now_ms) / WHOLE_GPU / gpus
                limits = [1_000 * (ceil(t / gpus) if whole_seconds else t / gpus) for t in thresholds_gpu_s]
                while level < len(limits) and ran_ms >= limits[level]:
                    level += 1
                if level < len(limits) and job.phase is not Phase.QUEUED:
                    until_ms = now_ms + max(1, ceil(limits[level] - ran_ms))
            kept = standing is not None and standing.level == level
            place = standing.place if standing is not None and kept else len(cluster.standing)
            rows.append((level, place, age, Turn(job, level, until_ms)))
        rows.sort(key=lambda row: row[:3])
        return [row[3] for row in rows]

    return order
