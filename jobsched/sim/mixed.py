"""A workload of every sort at once: what a busy shared cluster sees in a day, for runs in which things break.

Rigid gangs and shares of GPUs; elastic jobs whose replicas come and go in place, or only by a new attempt, with and
without parameter servers, which all report their speed; urgent jobs, several at a time, that make others leave; a queue
that lends its quota and takes it back in bursts; nodes on demand. Everything random comes from the seed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import log
from random import Random
from typing import NamedTuple

from jobsched.core.pools import NodePool
from jobsched.core.resources import WHOLE_GPU, JobId
from jobsched.sim.throughput import Served, Steady, Work
from jobsched.sim.workload import GIB, Arrival, Rules, Workload, gang_spec, make_nodes
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec

RACK = 8
"""Nodes of a rack."""
REPORT_EVERY_MS, SAVE_EVERY_MS, SAVING_MS, START_MS = 30_000, 600_000, 12_000, 30_000
"""How often jobs report and save, how long they need to save when asked to leave, and to start."""
LULLS, LULL = 0.05, 8.0
"""How often nothing comes for a while, and how many times as long: nodes on demand become idle."""
URGENT = 100
LENDER, BORROWERS = "nightly", ("research", "product")
SORTS = {"gang": 26, "share": 10, "in place": 7, "anew": 22, "served": 17, "shares": 4, "urgent": 10, "burst": 4}
"""Sort of job -> how often it comes, of about a hundred; urgent ones come one to three at once, bursts as several."""
NEVER = {"start_timeout": 0, "heartbeat_timeout": 0}


class Coming(NamedTuple):
    """A job before it has an instant and an id."""

    spec: JobSpec
    work: Work
    gpu_s: float


def mixed(
    jobs: int = 300, seed: int = 0, nodes: str = "8x8", load: float = 1.1, longest_s: float = 14_400.0,
    median_s: float = 1_800.0,
) -> Workload:  # fmt: skip
    """At least `jobs` arrivals that ask for `load` of the cluster on average. Quotas count an eighth more nodes, which
    come on demand."""
    random = Random(f"mixed {seed}")
    cluster = tuple(replace(n, labels=(("rack", f"r{i // RACK}"),)) for i, n in enumerate(make_nodes(nodes)))
    widest = max(len(node.gpus) for node in cluster)
    pool = NodePool(
        "burst", cluster[0].cpu_milli, cluster[0].memory_bytes, cluster[0].gpus[0].kind, widest, 16 * GIB,
        (("pool", "burst"),), max=-(-len(cluster) // 8), price=1, delay_ms=120_000, idle_ms=60_000,
    )  # fmt: skip
    gpus = sum(len(node.gpus) for node in cluster)
    groups: list[list[Coming]] = []
    while sum(map(len, groups)) < jobs:
        sort = random.choices(list(SORTS), list(SORTS.values()))[0]
        gpu_s = min(max(60.0, random.lognormvariate(log(median_s), 1.2)), longest_s)
        groups.append(_group(sort, gpu_s, widest, gpus, random))
    between_s = sum(job.gpu_s for group in groups for job in group) / (gpus * load * len(groups))
    at_s = 0.0
    arrivals: list[Arrival] = []
    for group in groups:
        at_s += random.expovariate(1 / between_s) * (LULL if random.random() < LULLS else 1.0)
        for job in group:
            job_id, owner = JobId(f"{len(arrivals):06}"), f"user{random.randrange(8)}"
            arrivals.append(Arrival(round(1_000 * at_s), job_id, job.spec, job.work, owner))
    rules = Rules(kill_ms=SAVING_MS, save_every_ms=SAVE_EVERY_MS, report_every_ms=REPORT_EVERY_MS)
    return Workload(f"mixed-{jobs}-{seed}", tuple(arrivals), cluster, _queues(gpus + pool.max * widest), rules, (pool,))


def _queues(gpus: int) -> tuple[QueueSpec, ...]:
    """Three that lend to each other; one of them may borrow no more than it has."""
    lent = gpus // 4
    product = (gpus - lent) // 2
    return (
        QueueSpec.model_validate({"name": BORROWERS[0], "cohort": "lab", "quota": {"gpus": gpus - lent - product}}),
        QueueSpec.model_validate({"name": BORROWERS[1], "cohort": "lab", "quota": {"gpus": product}, "weight": 2,
                                  "borrowing_limit": {"gpus": product}}),
        QueueSpec.model_validate({"name": LENDER, "cohort": "lab", "quota": {"gpus": lent}}),
        QueueSpec(),
    )  # fmt: skip


def _group(sort: str, gpu_s: float, widest: int, gpus: int, random: Random) -> list[Coming]:
    """One job of a sort, or several that come together."""
    queue = random.choice(BORROWERS)
    most = max(2, min(2 * widest, gpus // 4))
    if sort == "gang":
        size = random.choices((1, 2, 4, widest, 2 * widest), (40, 20, 20, 15, 5))[0]
        return [_steady(gang_spec(min(size, most), widest, queue, single=random.random() < 0.3), gpu_s, size)]
    if sort == "share":
        part = random.choice((0.25, 0.5))
        return [_steady(_role(1, 1, "job", part, queue), gpu_s * part, part)]
    if sort == "urgent":
        size = random.choice((2, 4, widest))
        spec = _urgent(min(size, most), widest, queue)
        return [_steady(spec, min(gpu_s, 300.0 * size), size) for _ in range(random.randint(1, 3))]
    if sort == "burst":
        size = random.choice((1, 2, 4))
        count = max(2, gpus // 4 // size)
        return [_steady(gang_spec(size, widest, LENDER), min(gpu_s, 600.0 * size), size) for _ in range(count)]
    low = random.choice((1, 1, 2))
    compute_s = random.lognormvariate(log(0.2), 0.5)
    parts = (1.0, 10 ** random.uniform(-1.7, -0.3), random.uniform(0.0, 0.1), 0.005, 0.005)
    thetas = tuple(compute_s * part for part in parts)
    milli = WHOLE_GPU // 2 if sort == "shares" else WHOLE_GPU
    work = Served(
        max(1, round(gpu_s / compute_s)), thetas, seed=random.randrange(1 << 30), start_ms=START_MS, worker_milli=milli
    )
    if sort == "served":
        spec = _served(low, most // 2, random.choice((1, 4)), random.choice(("replica", "job", "job")), queue)
    elif sort == "shares":
        spec = _role(low, 6, random.choice(("replica", "job")), 0.5, queue)
    else:
        spec = _role(low, most, "replica" if sort == "in place" else "job", 1, queue)
    return [Coming(spec, work, gpu_s)]


def _steady(spec: JobSpec, gpu_s: float, gpus: float) -> Coming:
    run_ms = round(1_000 * gpu_s / gpus)
    return Coming(spec, Steady(run_ms, START_MS, steps=max(1, run_ms // 1_000)), gpu_s)


@cache
def _urgent(gpus: int, per_node: int, queue: str) -> JobSpec:
    return gang_spec(gpus, per_node, queue).model_copy(update={"priority": URGENT})


@cache
def _role(low: int, most: int, scope: str, gpus: float, queue: str) -> JobSpec:
    """Workers alone, elastic unless both numbers are the same: they come and go in place, or by a new attempt."""
    replicas = {"min": low, "max": most, "prefer": (low + most) // 2} if low < most else low
    role = {"command": "train", "cpu": 1, "gpu": f"any:{gpus:g}", "replicas": replicas, "restart": {"scope": scope}}
    return JobSpec.model_validate({"roles": {"worker": role}, "queue": queue, **NEVER})


@cache
def _served(low: int, most: int, servers: int, scope: str, queue: str) -> JobSpec:
    """With one to so many parameter servers."""
    workers = {"min": low, "max": most, "prefer": (low + most) // 2}
    ps = {"command": "serve", "cpu": 4, "replicas": {"min": 1, "max": servers, "prefer": 1} if servers > 1 else 1}
    worker = {"command": "train", "cpu": 4, "gpu": "any:1", "replicas": workers, "restart": {"scope": scope}}
    return JobSpec.model_validate({"roles": {"ps": ps, "worker": worker}, "queue": queue, **NEVER})
