"""What the person who runs a server writes: where it listens, what it keeps, how it decides.

`jobsched.load.load_server_config` builds a `ServerConfig` from YAML; `jobsched.wiring` turns it into objects. A server
without any file runs with `ServerConfig()`: SQLite in the home directory, this machine's real CPUs and GPUs. What it
says of engines is in `spec/backends.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from jobsched.spec.backends import BackendConfig, GpuStock
from jobsched.spec.fields import Bytes, CpuMilli, DurationMs, Labels, Name, SpecModel, Text
from jobsched.spec.quantity import show
from jobsched.spec.queue import QueueSpec, distinct_queues


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", value):
        raise ValueError(f"{show(value)} is not an address to bind; write for example 127.0.0.1 or ::1")
    return value


def _store(value: str) -> str:
    if not re.match(r"$|memory:$|(sqlite|postgresql)(\+[a-z0-9]+)?://", value):
        raise ValueError(f"{show(value)} is not a store; write sqlite:///FILE, postgresql://… or memory:")
    return value


class Listen(SpecModel):
    """Where the API answers; written `127.0.0.1:8080`, `:8080`, a port, or `{host, port}`."""

    host: Annotated[str, AfterValidator(_host)] = "127.0.0.1"
    """Address to bind; the default is reachable from this machine only."""
    port: Annotated[int, Field(strict=True, ge=0, le=65_535)] = 0
    """Port to bind; 0 takes any free one (clients find it through the home directory)."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        match value:
            case int() if not isinstance(value, bool):
                return {"port": value}
            case str():
                host, _, port = value.rpartition(":")
                if not re.fullmatch(r"[0-9]{1,5}", port):
                    raise ValueError(f"{show(value)} is not an address; write for example 127.0.0.1:8080")
                return {"port": int(port)} | ({"host": host.strip("[]")} if host else {})
            case _:
                return value


class HealthConfig(SpecModel):
    """When nodes and GPUs are doubted after failures of different jobs, and how trust returns."""

    threshold: Annotated[float, Field(gt=0, le=1_000)] = 3.0
    """Score at which a node or GPU goes on probation: a lost node or a GPU error counts 1, a hang or a signal 1/2, an
    exit code 1/4, each job once."""
    half_life: Annotated[DurationMs, Field(ge=1_000)] = 3_600_000
    """Time in which a score halves."""
    preflight: tuple[Text, ...] = ("python", "-m", "jobsched.train.preflight")
    """Command that must end with 0 on the node before it is trusted again; none: it is after two half-lives."""
    image: Text = ""
    """Image that the command runs in, on engines that need one."""
    recheck: Annotated[DurationMs, Field(ge=1_000)] = 600_000
    """Time between a check that failed and the next; it doubles each time."""
    timeout: Annotated[DurationMs, Field(ge=1_000)] = 300_000
    """Longest time that a check may take."""


class PreemptionConfig(SpecModel):
    """How far room is made for waiting jobs: elastic jobs shrink, then others stop, the cheapest first, after they
    saved."""

    reclaim: Annotated[bool, Field(strict=True)] = True
    """Whether a queue gets back what it lent."""
    priority: Literal["off", "queue", "cohort"] = "cohort"
    """From whom a higher priority may take: nobody, its own queue, or also what queues of its cohort borrow."""
    min_runtime: DurationMs = 60_000
    """No job is stopped for another sooner after its start."""
    lost_percent: Annotated[int, Field(strict=True, ge=0, le=100)] = 25
    """Most of a job's run time that jobs which go first may make it lose, counted from its last checkpoint; ten minutes
    may be lost at any rate."""


class ElasticConfig(SpecModel):
    """When elastic jobs change their size."""

    every: Annotated[DurationMs, Field(ge=1_000)] = 10_000
    """How often sizes are reconsidered."""
    horizon: Annotated[DurationMs, Field(ge=1_000)] = 300_000
    """A change must pay for itself within this time, or before the job's end."""
    restart: DurationMs = 30_000
    """What a change costs where the job has to start again, time without progress, until that was seen of it or its
    like."""
    in_place: DurationMs = 5_000
    """And where its replicas come and go in place."""
    growth: Annotated[int, Field(strict=True, ge=2, le=1_000)] = 4
    """Most replicas for a job, in multiples of what it was measured with."""
    gain_percent: Annotated[int, Field(strict=True, ge=0, le=90)] = 10
    """What a change must promise beside its cost, of the job's speed: measurements are only so good."""


def _on_or_off(value: object) -> object:
    """`true` and `false` for a part that is there as it is, or not at all."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class NodePool(SpecModel):
    """Like nodes that do not exist yet and can be had, by whatever the backend has for that."""

    name: Name
    """Shown in `jobsched why`; a node of the pool has the label `pool` with it, unless `labels` are given."""
    gpus: GpuStock | None = None
    """GPUs of one node: `a100-80gb:8`."""
    gpu_memory: Bytes = 16 * 2**30
    """Memory of one GPU."""
    cpu: CpuMilli = 8_000
    """CPUs of one node."""
    memory: Bytes = 32 * 2**30
    """Memory of one node."""
    labels: Labels = Field(default={})
    """Labels by which its nodes are known, for example `{cloud.google.com/gke-nodepool: a100}`."""
    taints: tuple[Text, ...] = ()
    """Taints (key or key=value) of its nodes."""
    min: Annotated[int, Field(strict=True, ge=0, le=10_000)] = 0
    """Nodes that are always kept."""
    max: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 1
    """Most nodes that may exist at once."""
    price: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    """Of a node for an hour, in any currency: the cheapest pool that holds a whole gang is asked first."""
    delay: Annotated[DurationMs, Field(ge=1_000)] = 300_000
    """How long its nodes take to come; after twice as long the next pool by price is asked."""
    idle: Annotated[DurationMs, Field(ge=1_000)] = 600_000
    """A node that nobody used for so long is let go."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"pool {self.name}: min is {self.min}, max is {self.max}")
        return self


class FactorsConfig(SpecModel):
    """Weights of `ordering: multifactor`, as in Slurm's priority/multifactor: each factor is between 0 and 1, but the
    job's own priority."""

    priority: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 1_000
    """Times the job's priority."""
    age: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 1_000
    """Waiting time, full after `age_full`."""
    size: Annotated[int, Field(strict=True, ge=-1_000_000, le=1_000_000)] = 0
    """Part of the cluster's GPUs that the job needs; below 0: small jobs first."""
    fair: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 1_000
    """How little its queue has used, for its weight."""
    age_full: Annotated[DurationMs, Field(ge=1_000)] = 7 * 86_400_000
    """Wait that counts fully."""


class PolicyConfig(SpecModel):
    """Scheduling policies by name."""

    health: HealthConfig | None = HealthConfig()
    """Probation of nodes; `null` turns it off."""

    ordering: Literal["priority", "service", "learned", "shortest", "kinds", "in-time", "attained",
                      "fairness", "multifactor"] = "priority"
    """Who goes first within a queue. priority: higher priority, then earlier submission. service: among equal
    priorities, who is expected to take least GPU time, learned from like jobs that ended. multifactor: `factors`; with
    `fair: false`, over all queues together.

    The others hold over all queues together, among equal priorities; who runs stops when another goes first, but not
    before `preemption.min_runtime` (`preemption: null`: never). Quotas hold; queues take no turns, and nothing is
    reserved. learned: whoever promises most ends for its GPUs by what is learned of its like, by its `expected`, or by
    the progress that it reports, and much more than who stops for it. shortest: least GPU time left, by the same
    (SRSF). kinds: as learned, each job on the kind of GPU where it does most good, moved there if need be; what each
    kind is worth to it is learned from the steps that it and its like report. in-time: as shortest, but first jobs
    whose `deadline` is near, and last those that cannot meet it. attained: least GPU time had, in three levels
    (Tiresias). fairness: furthest behind when it would end on its share of the cluster (Themis); who runs keeps its
    seats for 20 minutes."""
    factors: FactorsConfig = FactorsConfig()
    """Weights of `ordering: multifactor`."""
    fair: Annotated[bool, Field(strict=True)] = True
    """Whether queues take turns by fair share (dominant resource by weight); else `ordering` holds over all queues."""
    fair_half_life: DurationMs = 7 * 86_400_000
    """Time after which a queue's past use counts half in its share; 0: only what it holds now counts."""
    backfill: Literal["off", "easy", "conservative"] = "easy"
    """What later jobs may do while the first does not fit. easy: start where they do not delay it, by learned run
    times. conservative: where they delay none of those before them. off: start wherever they fit."""
    preemption: PreemptionConfig | None = PreemptionConfig()
    """Reclaim and priority; `null`: nobody is stopped for another."""
    score: Literal["auto", "pack", "spread", "fragmentation"] = "auto"
    """Which of several nodes is taken. pack: the one left fullest. spread: the emptiest. fragmentation: where the free
    GPUs stay most useful to what is usually submitted. auto: fragmentation once a job asks for part of a GPU, else
    pack."""
    elastic: Annotated[ElasticConfig | None, BeforeValidator(_on_or_off)] = ElasticConfig()
    """Elastic jobs get the numbers of workers and parameter servers that speed them up most, by what they report;
    `false`: those that their specs prefer."""
    defragmentation: bool = True
    """Jobs that lose little (elastic ones, and those that saved a moment ago) move when a waiting gang then starts."""


class Timers(SpecModel):
    """How patient the server is."""

    lease_ttl: Annotated[DurationMs, Field(ge=1_000)] = 15_000
    """Life of the leader's lease; after a crash another server leads at most so much later."""
    node_grace: DurationMs = 30_000
    """Silence after which a node, and what ran on it, is taken for lost."""
    longest_wait: Annotated[DurationMs, Field(ge=50)] = 1_000
    """Longest time between two ticks when nothing happens."""


class KubernetesObjects(SpecModel):
    """Jobs and queues as objects of a Kubernetes cluster: what `kubectl apply` brings is submitted, its status kept."""

    kubeconfig: Text = ""
    """File with access to the cluster; default: as `backend.kubernetes`."""
    context: Text = ""
    """Context of that file; default: as `backend.kubernetes`."""
    namespace: Name | Literal[""] = ""
    """Where the objects are; default: that of `backend.kubernetes`, else the context's."""
    directory: Text = ""
    """Directory that relative ones in jobs start from, where replicas run; the annotation `jobsched.dev/directory` of a
    job says otherwise for that job."""


Priority = Annotated[int, Field(strict=True, ge=-1_000_000, le=1_000_000)]


class ServerConfig(SpecModel):
    """One server."""

    home: Text = ""
    """Directory for database, token, logs and checkpoints; relative to this file; default: the user's."""
    store: Annotated[Text, AfterValidator(_store)] = ""
    """`sqlite:///FILE`, `postgresql://…` or `memory:`; default: SQLite in the home directory."""
    listen: Listen = Listen()
    """Where the API answers."""
    backend: BackendConfig = BackendConfig()
    """Where replicas run."""
    kubernetes_objects: KubernetesObjects | None = None
    """Follow `TrainingJob` and `TrainingQueue` objects; `{}` turns it on."""
    queues: tuple[QueueSpec, ...] = (QueueSpec(),)
    """Queues that jobs may name."""
    priority_classes: Annotated[Mapping[Name, Priority], Field(max_length=1_000)] = Field(
        default={"low": -100, "normal": 0, "high": 100}
    )
    """Names that jobs may give as their `priority`, and what they stand for."""
    pools: Annotated[tuple[NodePool, ...], Field(max_length=1_000)] = ()
    """Nodes on demand."""
    policy: PolicyConfig = PolicyConfig()
    """Scheduling policies."""
    timers: Timers = Timers()
    """How patient the server is."""

    @field_validator("queues")
    @classmethod
    def _queues(cls, value: tuple[QueueSpec, ...]) -> tuple[QueueSpec, ...]:
        return distinct_queues(value)

    @field_validator("pools")
    @classmethod
    def _pools(cls, value: tuple[NodePool, ...], info: ValidationInfo) -> tuple[NodePool, ...]:
        if len({pool.name for pool in value}) < len(value):
            raise ValueError("two pools have the same name")
        backend = info.data.get("backend")
        if value and backend is not None and backend.docker is not None and not backend.docker.provision:
            raise ValueError("the docker backend needs a command that makes nodes: backend.docker.provision")
        return value
