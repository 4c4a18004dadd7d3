"""Workloads: what arrives when, on which cluster, under which rules. Made by trace readers and by the generator here.

The generator is the built-in default of `jobsched simulate`: heavy-tailed run times, mostly one-GPU jobs, a daily
rhythm, as in Philly (ATC'19) and Helios (SC'21). Everything random comes from the seed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import cos, log, pi
from random import Random

from jobsched.core.cluster import Cluster
from jobsched.core.explain import could_ever_fit
from jobsched.core.node import Gpu, Node
from jobsched.core.policies.ordering import TIRESIAS_GPU_S
from jobsched.core.policies.placement import Score
from jobsched.core.pools import NodePool
from jobsched.core.resources import WHOLE_GPU, GpuId, JobId, NodeName
from jobsched.errors import Unplaceable
from jobsched.sim.throughput import Served, Steady, Work
from jobsched.spec.gpu import GPU_KIND
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec

GIB = 2**30
HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Rules:
    """How a paper's simulator counts time, where it differs from what jobsched's own engine does."""

    pause_everyone: bool = False
    """At every arrival, end and change of queue, each running job makes no progress for its start cost (Muri)."""
    restart_ms: int = 0
    """Time without progress after each start but the first: what being preempted costs a job."""
    kill_ms: int = 5
    """How long a replica takes to die once told to."""
    pass_every_ms: int = 0
    """Scheduling passes only at multiples of this; 0: whenever something happens."""
    save_every_ms: int = 0
    """How often jobs save; a failure loses what came after. 0: nothing is ever lost."""
    running_first: bool = False
    """Least attained service: within a level, jobs that run stand before those that wait."""
    strict: bool = False
    """The first job of a queue that does not fit stops the queue."""
    repack: bool = False
    """Preemptive passes place everybody from nothing and move who runs."""
    settle: bool = False
    """Preemptive passes start nobody before everything that was stopped is gone."""
    report_every_ms: int = 0
    """How often elastic jobs report their speed; only at multiples of it are their ends looked for. 0: never."""
    score: Score = Score.PACK
    thresholds_gpu_s: tuple[int, ...] = TIRESIAS_GPU_S
    """Of least attained service: GPU-seconds at which a job sinks a level."""
    whole_seconds: bool = False
    """Those times per job are rounded up to seconds."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One job: when it comes, what it asks for, what it does. `told_ms` is what policies are told of its run time where
    that is not the truth; `deadline_ms` counts from the start of the trace (0: none)."""

    at_ms: int
    job_id: JobId
    spec: JobSpec
    work: Work
    owner: str = "sim"
    told_ms: int | None = None
    deadline_ms: int = 0

    def by(self, end_s: float) -> Arrival:
        """The same with a deadline so long after the start of the trace."""
        due_ms = round(1_000 * end_s)
        spec = self.spec.model_copy(update={"deadline": max(1, due_ms - self.at_ms)})
        return replace(self, spec=spec, deadline_ms=due_ms)


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    arrivals: tuple[Arrival, ...]
    nodes: tuple[Node, ...]
    queues: tuple[QueueSpec, ...] = (QueueSpec(),)
    rules: Rules = Rules()
    pools: tuple[NodePool, ...] = ()
    """Nodes on demand; policies that know of none never ask for them."""


def elsewhere(workload: Workload, nodes: tuple[Node, ...]) -> Workload:
    """The same jobs on other nodes: gangs that were cut to wider nodes are cut to these, and labels of the trace's own
    nodes are not asked for. What asks for memory is a pod and stays whole."""
    widest = max(len(node.gpus) for node in nodes)
    cut: dict[int, JobSpec] = {}
    for arrival in workload.arrivals:
        if id(arrival.spec) not in cut:
            cut[id(arrival.spec)] = _cut(arrival.spec, widest)
    arrivals = tuple(replace(arrival, spec=cut[id(arrival.spec)]) for arrival in workload.arrivals)
    return replace(workload, arrivals=arrivals, nodes=nodes)


def _cut(spec: JobSpec, widest: int) -> JobSpec:
    roles = spec.roles.values()
    sizes = [(role.gpu.milli // WHOLE_GPU, role.replicas.prefer) for role in roles if role.gpu is not None]
    if all(size <= widest for size, _ in sizes) or any(role.memory for role in roles):
        placement = spec.placement.model_copy(update={"nodes": {}})
        return spec.model_copy(update={"placement": placement}) if spec.placement.nodes else spec
    first = next(iter(roles))
    assert first.gpu is not None
    assert isinstance(first.command, str)
    total, kinds = sum(size * count for size, count in sizes), "|".join(first.gpu.kinds)
    gang = gang_spec(total, widest, spec.queue, kinds=kinds, program=first.command)
    return gang.model_copy(update={"deadline": spec.deadline, "expected": spec.expected})


def placeable(workload: Workload) -> tuple[Workload, str]:
    """The workload without the jobs that its cluster could never hold, as a server refuses such; and in words how many
    those are, and why the first is one ("": there are none). Raises Unplaceable when no job is left."""
    cluster, jobs = Cluster.of((), workload.nodes, workload.queues), workload.arrivals
    specs = {id(job.spec): job.spec for job in jobs}
    never = {key: why for key, spec in specs.items() if (why := could_ever_fit(cluster, spec))}
    refused = [job for job in jobs if id(job.spec) in never]
    if not refused:
        return workload, ""
    first = f"{refused[0].job_id}: {never[id(refused[0].spec)]}"
    text = f"{len(refused):,} of {len(jobs):,} jobs can never run on these nodes, first {first}"
    if len(refused) == len(jobs):
        raise Unplaceable(text, hint="give other --nodes, or none for the workload's own")
    return replace(workload, arrivals=tuple(job for job in jobs if id(job.spec) not in never)), text


def make_node(
    name: str, gpus: int, kind: str = "gpu", cpu_milli: int = 1_000_000, memory_bytes: int = 4_096 * GIB,
    labels: tuple[tuple[str, str], ...] = (),
) -> Node:  # fmt: skip
    devices = tuple(Gpu(GpuId(f"{name}-g{i}"), kind, 16 * GIB) for i in range(gpus))
    return Node(NodeName(name), cpu_milli, memory_bytes, devices, labels=labels)


MOST_NODES, MOST_GPUS = 100_000, 1_024
"""Of a made cluster, and of one of its nodes."""


def make_nodes(text: str, kind: str = "gpu") -> tuple[Node, ...]:
    """`16x4` is 16 nodes of 4 GPUs; `8x8:v100+4x8:k80` mixes kinds. ValueError when it is neither, when there would be
    none, or more than `MOST_NODES` of `MOST_GPUS`."""
    nodes: list[Node] = []
    for part in text.split("+"):
        size, colon, named = part.partition(":")
        if not (found := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", size)) or (colon and not GPU_KIND.fullmatch(named)):
            raise ValueError(f"{part!r} is not a set of nodes; write for example 16x4 or 8x8:v100+4x8:k80")
        count, gpus = int(found[1]), int(found[2])
        if not (1 <= count <= MOST_NODES - len(nodes) and 1 <= gpus <= MOST_GPUS):
            raise ValueError(f"{part!r}: a cluster has 1 to {MOST_NODES:,} nodes of 1 to {MOST_GPUS:,} GPUs")
        nodes += [make_node(f"n{len(nodes) + i:04}", gpus, named or kind) for i in range(count)]
    return tuple(nodes)


@cache
def gang_spec(
    gpus: int, per_node: int, queue: str = "default", node_label: tuple[str, str] | None = None, kinds: str = "",
    single: bool = False, program: str = "train",
) -> JobSpec:  # fmt: skip
    """A job of so many GPUs: replicas of one whole node each and one for the rest; `single`: one replica per GPU. Specs
    are shared between like jobs. `program`: what it pretends to run, by which like jobs are known."""
    role: dict[str, object] = {"command": program, "cpu": "1m"}
    kind = kinds or "any"
    if single or gpus <= per_node:
        count, size = (gpus, 1) if single else (1, gpus)
        roles: dict[str, object] = {"worker": {**role, "replicas": count, "gpu": f"{kind}:{size}"}}
    else:
        whole, rest = divmod(gpus, per_node)
        roles = {"worker": {**role, "replicas": whole, "gpu": f"{kind}:{per_node}"}}
        if rest:
            roles["rest"] = {**role, "gpu": f"{kind}:{rest}"}
    placement = {"nodes": dict([node_label])} if node_label else {}
    return JobSpec.model_validate(
        {"roles": roles, "queue": queue, "placement": placement, "start_timeout": 0, "heartbeat_timeout": 0,
         "checkpoint": {"grace": 0}}
    )  # fmt: skip


@cache
def elastic_spec(most: int) -> JobSpec:
    """1 to `most` replicas of one GPU; a change of size is a new start. One to begin with: nothing is known yet."""
    role = {"command": "train", "cpu": "1m", "replicas": {"min": 1, "max": most, "prefer": 1}, "gpu": "any:1"}
    never = {"start_timeout": 0, "heartbeat_timeout": 0, "checkpoint": {"grace": 0}}
    return JobSpec.model_validate({"roles": {"worker": {**role, "restart": {"scope": "job"}}}, **never})


@cache
def served_spec(workers: str, servers: str) -> JobSpec:
    """So many workers of one GPU and parameter servers (`4`, or `1..16`, of which one to begin with: nothing is known
    yet); both need four CPUs. A change of either is a new start, as nothing tells how long one in place would take."""

    def replicas(bounds: str) -> dict[str, int]:
        low, _, high = bounds.partition("..")
        return {"min": int(low), "max": int(high or low), "prefer": int(low)}

    worker = {"command": "train", "cpu": 4, "gpu": "any:1", "replicas": replicas(workers), "restart": {"scope": "job"}}
    roles = {"ps": {"command": "serve", "cpu": 4, "replicas": replicas(servers)}, "worker": worker}
    never = {"start_timeout": 0, "heartbeat_timeout": 0, "checkpoint": {"grace": 0}}
    return JobSpec.model_validate({"roles": roles, **never})


RATIOS = ("free", "workers", "1:4", "1:1")
"""How `served` numbers workers and servers. free: both elastic. workers: only they are, with four servers, one for each
four that there may be. 1:4, 1:1: as many workers as the user asks for, and so many servers a worker."""


def served(
    jobs: int = 300, seed: int = 0, ratio: str = "free", nodes: int = 8, load: float = 0.7, median_s: float = 5_400.0
) -> Workload:
    """`jobs` with parameter servers whose true speeds follow Optimus' formula, on `nodes` of 8 GPUs and 64 CPUs. Jobs
    differ in how much of a step their servers take: from next to nothing to more than the workers. `load`: of all GPUs,
    if they spent their time computing."""
    random = Random(seed)
    cluster = tuple(make_node(f"n{i:04}", 8, cpu_milli=64_000) for i in range(nodes))
    at_s, arrivals = 0.0, []
    drawn = [min(random.lognormvariate(log(median_s), 1.2), 30 * median_s) for _ in range(jobs)]
    between_s = sum(drawn) / (8 * nodes * load * jobs)
    for place, gpu_s in enumerate(drawn):
        at_s += random.expovariate(1 / between_s)
        compute_s = random.lognormvariate(log(0.2), 0.5)
        parts = (1.0, 10 ** random.uniform(-1.7, 0.1), *(random.uniform(0.0, most) for most in (0.1, 0.01, 0.01)))
        thetas = tuple(compute_s * part for part in parts)
        asked = random.choices((1, 2, 4, 8), (0.25, 0.25, 0.3, 0.2))[0]
        numbers = {"free": ("1..16", "1..16"), "workers": ("1..16", "4"), "1:4": (str(asked), str(-(-asked // 4))),
                   "1:1": (str(asked), str(asked))}[ratio]  # fmt: skip
        work = Served(max(1, round(gpu_s / compute_s)), thetas, seed=random.randrange(1 << 30))
        arrivals.append(Arrival(round(1_000 * at_s), JobId(f"{place:06}"), served_spec(*numbers), work))
    rules = Rules(pass_every_ms=60_000, report_every_ms=60_000)
    return Workload(f"served-{ratio}-{jobs}-{seed}", tuple(arrivals), cluster, rules=rules)


SIZES: Sequence[tuple[int, float]] = ((1, 0.70), (2, 0.10), (4, 0.10), (8, 0.08), (16, 0.015), (32, 0.005))


def synthetic(
    jobs: int = 2_000, seed: int = 0, nodes: str = "16x8", load: float = 0.9, longest_s: float = 7 * 86_400.0,
    median_s: float = 1_100.0,
) -> Workload:  # fmt: skip
    """`jobs` arrivals that ask for `load` of the cluster on average."""
    random = Random(seed)
    cluster = make_nodes(nodes)
    most = sum(len(node.gpus) for node in cluster)
    per_node = max(len(node.gpus) for node in cluster)
    sizes = [size for size, _ in SIZES if size <= most]
    weights = [weight for size, weight in SIZES if size <= most]
    drawn = [
        (random.choices(sizes, weights)[0], min(max(10.0, random.lognormvariate(log(median_s), 1.9)), longest_s))
        for _ in range(jobs)
    ]
    span_s = sum(size * run_s for size, run_s in drawn) / (most * load)
    at_s, arrivals = 0.0, []
    for place, (size, run_s) in enumerate(drawn):
        rhythm = 1.0 - 0.6 * cos(2 * pi * at_s / 86_400)
        at_s += random.expovariate(jobs / span_s * rhythm)
        user = f"user{min(int(random.paretovariate(1.2)), 20)}"
        arrivals.append(
            Arrival(
                at_ms=round(at_s * 1_000),
                job_id=JobId(f"{place:06}"),
                spec=gang_spec(size, per_node),
                work=Steady(round(run_s) * 1_000, steps=round(run_s)),
                owner=user,
            )
        )
    return Workload(f"synthetic-{jobs}-{seed}", tuple(arrivals), cluster)
