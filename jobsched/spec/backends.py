"""The part of a server's configuration about its engines: where replicas run, and what each node offers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from jobsched.spec.fields import Bytes, CpuMilli, DurationMs, Labels, ModuleName, Name, SpecModel, Text
from jobsched.spec.gpu import GPU_KIND
from jobsched.spec.quantity import show

EPHEMERAL_PORT = 32_768
"""First port that Linux gives to outgoing connections by default; ports that jobsched hands out stay below it."""


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
