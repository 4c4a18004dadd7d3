"""What the person who runs a server writes: where it listens, what it keeps, which machines it offers.

`jobsched.load.load_server_config` builds a `ServerConfig` from YAML; `jobsched.wiring` turns it into objects. A server
without any file runs with `ServerConfig()`: SQLite in the home directory, this machine's real CPUs and GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from jobsched.spec.job import GPU_KIND, Bytes, CpuMilli, DurationMs, Labels, ModuleName, Name, SpecModel, Text
from jobsched.spec.quantity import show
from jobsched.spec.queue import QueueSpec, distinct_queues

EPHEMERAL_PORT = 32_768
"""First port that Linux gives to outgoing connections by default; ports that jobsched hands out stay below it."""


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


class GpuStock(SpecModel):
    """GPUs of one kind that a virtual node has; written `sim-gpu:8`."""

    kind: str
    """Kind, lower case, for example `sim-gpu` or `h100-80gb`."""
    count: Annotated[int, Field(strict=True, ge=1, le=1_024)] = 1
    """How many."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        kind, _, count = value.rpartition(":")
        if not re.fullmatch(r"[0-9]{1,4}", count):
            kind, count = value, "1"
        return {"kind": kind, "count": int(count)}

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        if not GPU_KIND.fullmatch(value):
            raise ValueError(f"{show(value)} is not a GPU kind; write for example sim-gpu:8, in lower case")
        return value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class VirtualNodes(SpecModel):
    """Like nodes that exist in name only: their replicas are processes of this machine, their GPUs are numbers."""

    count: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 1
    """How many such nodes."""
    name_prefix: Annotated[Name, Field(max_length=40)] = "node"
    """Nodes are called PREFIX-0, PREFIX-1, …"""
    cpu: CpuMilli = 8_000
    """CPUs of one node, for placement."""
    memory: Bytes = 32 * 2**30
    """Memory of one node, for placement."""
    gpus: Annotated[tuple[GpuStock, ...], BeforeValidator(_listed), Field(max_length=64)] = ()
    """GPUs of one node: `sim-gpu:8`, or a list of such."""
    gpu_memory: Bytes = 16 * 2**30
    """Memory of one GPU."""
    labels: Labels = Field(default={})
    """Labels of the nodes, for example `{rack: a}`."""
    taints: tuple[Text, ...] = ()
    """Taints (key or key=value) that keep jobs away which do not tolerate them."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.name_prefix}-{index}" for index in range(self.count))


class PortRange(SpecModel):
    """Ports (both ends included) that replicas may be given; written `20000-32000`."""

    first: Annotated[int, Field(strict=True, ge=1_024, le=65_535)] = 20_000
    """Lowest."""
    last: Annotated[int, Field(strict=True, ge=1_024, le=65_535)] = 32_000
    """Highest."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        span = re.fullmatch(r"\s{0,9}([0-9]{1,5})\s{0,9}-\s{0,9}([0-9]{1,5})\s{0,9}", value)
        if span is None:
            raise ValueError(f"{show(value)} is not a range of ports; write for example 20000-32000")
        return {"first": int(span[1]), "last": int(span[2])}

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last - self.first < 99:
            raise ValueError("a range of ports holds at least 100")
        return self


class LogLimits(SpecModel):
    """How much of a replica's output is kept, per attempt."""

    size: Annotated[Bytes, Field(ge=4_096)] = 16 * 2**20
    """Size at which a log file is rotated."""
    rotations: Annotated[int, Field(strict=True, ge=0, le=1_000)] = 4
    """Older files kept beside the current one; what is older is dropped."""


class LocalBackend(SpecModel):
    """Replicas are processes of this machine."""

    virtual_nodes: tuple[VirtualNodes, ...] = ()
    """Pretended nodes, to see gangs and queues on a laptop; none: one node with the machine's real CPUs and GPUs."""
    limits: Literal["auto", "cgroup", "rlimit", "none"] = "auto"
    """How CPU and memory limits are enforced; auto: cgroup when writable, else rlimit."""
    logs: LogLimits = LogLimits()
    """Size of the logs."""
    ports: PortRange = PortRange()
    """Ports for replicas."""
    preload: tuple[ModuleName, ...] = ()
    """Python modules kept imported in a warm interpreter, for `python …` commands that ask for them."""

    @field_validator("virtual_nodes")
    @classmethod
    def _distinct(cls, value: tuple[VirtualNodes, ...]) -> tuple[VirtualNodes, ...]:
        names = [name for nodes in value for name in nodes.names]
        if len(set(names)) < len(names):
            raise ValueError("two groups of virtual nodes share names; give each its own name_prefix")
        return value

    @field_validator("ports")
    @classmethod
    def _below_ephemeral(cls, value: PortRange) -> PortRange:
        if value.last >= EPHEMERAL_PORT:
            raise ValueError(f"ports from {EPHEMERAL_PORT} on are given to outgoing connections; stay below")
        return value


class DockerGpus(SpecModel):
    """Like GPUs of one Docker engine: real ones by their UUIDs, or pretended ones, written `sim-gpu:8`."""

    kind: str
    """Kind, lower case, for example `h100-80gb`."""
    ids: tuple[Text, ...] = ()
    """UUIDs as `nvidia-smi -L` prints them (GPU-… or MIG-…)."""
    count: Annotated[int, Field(strict=True, ge=0, le=1_024)] = 0
    """How many pretended ones, for kinds that begin with `sim-`."""
    memory: Bytes = 16 * 2**30
    """Memory of one."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        return GpuStock.model_validate(value).model_dump() if isinstance(value, str) else value

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        return GpuStock(kind=value).kind

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.count and not self.kind.startswith("sim-"):
            raise ValueError(f"{self.kind}: real GPUs are named by their ids, for example ids: [GPU-…]")
        return self


class DockerTls(SpecModel):
    """Files for a `tcp://` engine that asks for certificates; relative to the server's directory."""

    ca: Text
    """Certificate of the authority that signed the engine's."""
    cert: Text
    """This client's certificate."""
    key: Text
    """Its private key."""


class DockerEngine(SpecModel):
    """One Docker engine: a node."""

    url: Annotated[Text, Field(pattern=r"^(unix:///|ssh://[^/]+|tcp://[^/]+)")] = "unix:///var/run/docker.sock"
    """`unix:///var/run/docker.sock`, `ssh://user@host` or `tcp://host:2376`."""
    name: Name | Literal[""] = ""
    """Name of the node; default: what the engine calls its machine."""
    address: Annotated[Text, Field(pattern=r"^[A-Za-z0-9.:_-]{0,253}$")] = ""
    """Where replicas on other engines reach this one; default: the host of the url."""
    tls: DockerTls | None = None
    """Certificates for `tcp://`."""
    same_files: bool | None = None
    """Whether the engine sees this server's files under the same paths; default: yes for `unix://`, else no."""
    gpus: Annotated[tuple[DockerGpus, ...], BeforeValidator(_listed), Field(max_length=64)] | None = None
    """Its GPUs; default: asked from NVML where the engine is on this machine, none elsewhere."""
    labels: Labels = Field(default={})
    """Labels of the node, for example `{rack: a}`."""
    taints: tuple[Text, ...] = ()
    """Taints (key or key=value) that keep jobs away which do not tolerate them."""

    @property
    def shares_files(self) -> bool:
        return self.url.startswith("unix:") if self.same_files is None else self.same_files

    @property
    def host(self) -> str:
        """Where peers reach it."""
        named = re.match(r"(?:ssh|tcp)://(?:[^@/]*@)?(\[[^\]]+\]|[^:/]+)", self.url)
        return self.address or (named[1].strip("[]") if named else "")

    @model_validator(mode="after")
    def _certified(self) -> Self:
        if self.tls is not None and not self.url.startswith("tcp:"):
            raise ValueError("tls is for tcp:// engines; ssh:// brings its own encryption")
        return self


_MOUNT = re.compile(r"(/[^:\x00]{0,4000}):?(/[^:\x00]{1,4000})?(:ro)?")


def _mount(value: str) -> str:
    if not _MOUNT.fullmatch(value):
        raise ValueError(f"{show(value)} is not a mount; write /path, /path:/inside or /path:/inside:ro")
    return value


class DockerBackend(SpecModel):
    """Replicas are containers on one or several Docker engines."""

    engines: Annotated[tuple[DockerEngine, ...], Field(min_length=1, max_length=1_000)] = (DockerEngine(),)
    """The engines, each a node. One: replicas find each other by name on a network of their own. Several: they use
    the hosts' network, with ports handed out by jobsched."""
    image: Text = ""
    """Image of jobs that name none."""
    pull: Literal["missing", "always", "never"] = "missing"
    """When images are pulled; credentials are those of `docker login` of the user who runs the server."""
    working_dir: Literal["copy", "mount", "image"] = "copy"
    """How a job's directory comes into its containers: packed and copied; mounted, where the engine shares files; or
    it is in the image already."""
    copy_limit: Annotated[Bytes, Field(ge=1_024)] = 256 * 2**20
    """Largest directory that is copied; `.jobschedignore` (else `.gitignore`) says what to leave out."""
    user: Annotated[Text, Field(pattern=r"^([0-9]{1,10}:[0-9]{1,10})?$")] = ""
    """`UID:GID` of every replica; default: the server's own, or 65532:65532 where the server is root."""
    read_only: bool = False
    """Whether the root file system is read-only; /tmp and the scratch directory then are memory."""
    shm_size: Bytes = 2 * 2**30
    """Size of /dev/shm, which data loaders and NCCL use."""
    volumes: tuple[Annotated[Text, AfterValidator(_mount)], ...] = ()
    """Directories of the engine's machine that every replica sees: `/data:/data:ro`."""
    checkpoints: Annotated[Text, Field(validate_default=True)] = ""
    """Directory of the engines' machines for checkpoints, the same files on all of them; default: in the home."""
    logs: LogLimits = LogLimits()
    """Size of the logs."""
    ports: PortRange = PortRange()
    """Ports for replicas, where several engines share the hosts' network."""
    provision: tuple[Text, ...] = ()
    """Command that makes and removes the engines of `pools`; gets what is wanted as JSON on stdin and prints the
    engines that there are."""

    @field_validator("engines")
    @classmethod
    def _engines(cls, value: tuple[DockerEngine, ...]) -> tuple[DockerEngine, ...]:
        if len({engine.url for engine in value}) < len(value):
            raise ValueError("an engine is listed twice")
        if len(named := [engine.name for engine in value if engine.name]) > len(set(named)):
            raise ValueError("two engines have the same name")
        if len(value) > 1 and (lost := [engine.url for engine in value if not engine.host]):
            raise ValueError(f"{lost[0]} needs an address at which the other engines' replicas reach it")
        return value

    @field_validator("checkpoints")
    @classmethod
    def _shared(cls, value: str, info: ValidationInfo) -> str:
        engines = info.data.get("engines", ())
        if not value and not all(engine.shares_files for engine in engines):
            raise ValueError("engines on other machines need a directory for checkpoints that all of them share")
        if value and not value.startswith("/"):
            raise ValueError(f"{show(value)} is not an absolute directory")
        return value


class KubernetesVolume(SpecModel):
    """A volume that every replica sees, from exactly one source."""

    mount: Annotated[Text, Field(pattern=r"^/[^:]+$")]
    """Where it appears: `/data`."""
    claim: Text = ""
    """Name of a PersistentVolumeClaim in the namespace."""
    config_map: Text = ""
    """Name of a ConfigMap."""
    secret: Text = ""
    """Name of a Secret."""
    host_path: Annotated[Text, Field(pattern=r"^(/.*)?$")] = ""
    """Directory of the node; the namespace's Pod Security must allow it."""
    read_only: bool = False
    """Whether replicas may only read it."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(map(bool, (self.claim, self.config_map, self.secret, self.host_path))) != 1:
            raise ValueError("a volume has exactly one of claim, config_map, secret and host_path")
        return self


class KubernetesGpus(SpecModel):
    """An extended resource that stands for GPUs; written `nvidia.com/gpu`."""

    resource: Annotated[Text, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")]
    """Its name, as pods ask for it."""
    kind: str = ""
    """GPU kind; default: from the node's labels."""
    memory: Bytes = 0
    """Memory of one GPU; default: from the node's labels."""
    per_gpu: Annotated[int, Field(strict=True, ge=1, le=1_000)] = 1
    """Units of the resource that make up one GPU, where the device plugin shares them (time slicing, MPS)."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        return {"resource": value} if isinstance(value, str) else value

    @field_validator("kind")
    @classmethod
    def _kind(cls, value: str) -> str:
        return GpuStock(kind=value).kind if value else value


class KubernetesBackend(SpecModel):
    """Replicas are pods of a Kubernetes cluster."""

    kubeconfig: Text = ""
    """File with access to the cluster; default: `KUBECONFIG`, the user's own, or inside a pod its service account."""
    context: Text = ""
    """Context of that file; default: its current one."""
    namespace: Name | Literal[""] = ""
    """Where pods are made; default: the context's (inside a pod: its own)."""
    instance: Name | Literal[""] = ""
    """Tells the pods of several servers apart; default: made up once and kept in the home."""
    image: Text = ""
    """Image of jobs that name none."""
    pull: Literal["missing", "always", "never"] = "missing"
    """When images are pulled."""
    pull_secrets: tuple[Text, ...] = ()
    """Names of Secrets with credentials of registries."""
    service_account: Text = ""
    """Service account of replicas; its token is not mounted."""
    user: Annotated[Text, Field(pattern=r"^[1-9][0-9]{0,9}:[0-9]{1,10}$")] = "65532:65532"
    """`UID:GID` of every replica, never root."""
    read_only: bool = False
    """Whether the root file system is read-only; /tmp is a volume then."""
    working_dir: Literal["copy", "image"] = "copy"
    """How a job's directory comes into its pods: packed into ConfigMaps and unpacked there, or it is in the image."""
    copy_limit: Annotated[Bytes, Field(ge=1_024, le=64 * 2**20)] = 16 * 2**20
    """Largest directory that is copied; `.jobschedignore` (else `.gitignore`) says what to leave out."""
    shm_size: Bytes = 2 * 2**30
    """Size of /dev/shm, a memory volume; what is in it counts as the replica's memory."""
    volumes: tuple[KubernetesVolume, ...] = ()
    """Volumes of every replica."""
    checkpoints: KubernetesVolume | None = None
    """Volume for checkpoints, writable from every node (ReadWriteMany); without it jobs name a place of their own."""
    secrets: Text = "jobsched-secrets"
    """Secret whose keys `secret://KEY` refers to; `secret://OBJECT/KEY` names another one."""
    nodes: Labels = Field(default={})
    """Only nodes with these labels are offered."""
    gpus: Annotated[tuple[KubernetesGpus, ...], BeforeValidator(_listed)] = (
        KubernetesGpus(resource="nvidia.com/gpu"), KubernetesGpus(resource="amd.com/gpu"))
    """Resources that stand for GPUs; MIG slices (`nvidia.com/mig-…`) need not be listed."""
    topology: Mapping[Literal["zone", "rack", "nvlink"], tuple[Text, ...]] = Field(default={
        "zone": ("topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"),
        "rack": ("topology.kubernetes.io/rack", "cloud.google.com/gce-topology-block",
                 "topology.k8s.aws/network-node-layer-3"),
        "nvlink": ("nvidia.com/gpu.clique", "cloud.google.com/gce-topology-host"),
    }, validate_default=True)
    """Node labels that name the domains of each level; of several the first that a node has."""
    tolerations: tuple[Text, ...] = ("nvidia.com/gpu", "amd.com/gpu")
    """Taints (key or key=value) that keep no job away."""
    annotations: Labels = Field(default={})
    """Annotations of every pod, for example those that tell autoscalers to leave its node alone."""
    scheduler: Text = ""
    """Name of the scheduler that binds the pods; default: the cluster's own."""
    priority_class: Text = ""
    """Priority class of the pods."""
    overlay: Literal["restricted", "any", "none"] = "restricted"
    """What jobs may write under `kubernetes.pod`: nothing that gives more rights; anything; nothing."""
    bind_timeout: Annotated[DurationMs, Field(ge=1_000)] = 30_000
    """Time within which the cluster's scheduler must bind a gang; then it is taken back whole and tried again."""
    node_lost_after: Annotated[DurationMs, Field(ge=12_000)] = 16_000
    """Age of a node's Lease (renewed every 10 s) at which the node is lost, if its replicas are silent as well."""
    logs: LogLimits = LogLimits()
    """Size of the logs."""


class RayBackend(SpecModel):
    """Replicas are actors on a Ray cluster, each of which runs its command beside it."""

    address: Annotated[Text, Field(pattern=r"^(auto|([A-Za-z0-9._-]{1,253}|\[[0-9a-fA-F:]+\]):[0-9]{1,5})$")] = "auto"
    """`HOST:PORT` of the cluster's head, or `auto`: `RAY_ADDRESS`, else the one that runs on this machine. The server
    itself must be on a node of it."""
    start: bool = False
    """Whether one is started on this machine when `auto` finds none; it outlives the server, `ray stop` ends it."""
    namespace: Name = "jobsched"
    """Ray namespace of the actors; `ray list actors` shows them as jobsched:SERVER:JOB/ATTEMPT/ROLE/INDEX/RESTART."""
    gpu_kinds: Mapping[Text, Text] = Field(default={})
    """What Ray's accelerator types are called here, for example `{A100: a100-80gb}`; default: by Ray's own list."""
    working_dir: Literal["copy", "shared"] = "copy"
    """How a job's directory comes to the nodes: packed and copied, or they see it under the same path."""
    copy_limit: Annotated[Bytes, Field(ge=1_024)] = 256 * 2**20
    """Largest directory that is copied; `.jobschedignore` (else `.gitignore`) says what to leave out."""
    scratch: Annotated[Text, Field(pattern=r"^(/.*)?$")] = ""
    """Directory on the nodes for scratch files and copied directories; default: the system's temporary one."""
    checkpoints: Annotated[Text, Field(pattern=r"^(/.*)?$")] = ""
    """Directory for checkpoints that all nodes see under the same path; default: in the home, for a single machine."""
    bind_timeout: Annotated[DurationMs, Field(ge=1_000)] = 20_000
    """How long Ray may take to reserve what a gang needs, before the gang is taken back."""
    limits: Literal["auto", "cgroup", "rlimit", "none"] = "auto"
    """How CPU and memory limits are enforced on the nodes; auto: cgroup when writable, else rlimit."""
    logs: LogLimits = LogLimits()
    """Size of the logs."""
    ports: PortRange = PortRange()
    """Ports for replicas; the same range on every node."""

    @field_validator("gpu_kinds")
    @classmethod
    def _kinds(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        return {name: GpuStock(kind=kind).kind for name, kind in value.items()}


class BackendConfig(SpecModel):
    """Where replicas run: one field per kind of engine."""

    local: LocalBackend = LocalBackend()
    """Processes of this machine."""
    docker: DockerBackend | None = None
    """Containers on Docker engines."""
    kubernetes: KubernetesBackend | None = None
    """Pods of a Kubernetes cluster."""
    ray: RayBackend | None = None
    """Actors on a Ray cluster."""


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
    """Most of a job's run time that higher priorities may make it lose, counted from its last checkpoint."""


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
    (Tiresias). fairness: furthest behind when it would end on its share of the cluster (Themis)."""
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
