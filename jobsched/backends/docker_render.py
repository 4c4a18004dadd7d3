"""Launches as requests to a Docker engine, and what it answers as our reports. Pure: values in, values out.

Used by `docker` and `docker_engine`; the requests are those of the Engine API 1.41 (`POST /containers/create`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from jobsched.backends.bundle import Owner
from jobsched.backends.containers import exit_of, instant
from jobsched.backends.gpus import is_real, visible_devices
from jobsched.contract import ReplicaEnv, from_environ, to_environ
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey, own_key, parse_key
from jobsched.core.node import Gpu, Node
from jobsched.core.observation import Incident, ReplicaReport, Seen
from jobsched.core.resources import NOTHING, GpuId, GpuShare, NodeName, Resources
from jobsched.spec.backends import DockerBackend, DockerEngine

Json = dict[str, Any]

LABEL = "dev.jobsched."
HOME, KEY, ATTEMPT, SIGNAL = LABEL + "home", LABEL + "key", LABEL + "attempt", LABEL + "signal"
"""Labels of everything that jobsched makes: whose it is, and what."""
REPORTS = "/run/jobsched"
"""Where the directory of the report socket is mounted."""
SCRATCH = "/scratch"
NAME_TEMPLATE = "{role}-{index}"
"""Names of replicas on the network of their attempt."""
LEAST_MEMORY = 6 << 20
"""Engines refuse less."""
ROOT_SHALL_NOT = "65532:65532"
"""Who replicas are where the server is root; the number that distroless images call nonroot."""


@dataclass(frozen=True, slots=True)
class Site:
    """What the requests to one engine have in common."""

    home_id: str
    config: DockerBackend
    engine: DockerEngine
    user: str
    several: bool
    """Several engines: the hosts' network instead of one of the attempt's own."""
    cpu_count: int
    checkpoints: str
    """Directory of checkpoints on the engine's machine."""
    reports: str = ""
    """Directory of the report socket on the engine's machine; empty: reports come in the log stream."""

    @property
    def owner(self) -> Owner:
        uid, gid = self.user.split(":")
        return Owner(int(uid), int(gid))


class CannotRender(Exception):
    """The launch cannot be carried out on this engine; the text is for people."""


def container_name(home_id: str, key: LaunchKey) -> str:
    """One key, one name: the engine itself refuses a second container."""
    return f"jobsched-{home_id}-{key.replace('/', '-')}"


def network_name(home_id: str, key: LaunchKey) -> str:
    """The network of an attempt."""
    parts = parse_key(key)
    return f"jobsched-{home_id}-{parts.job_id}-{parts.attempt}"


def peer_name(key: LaunchKey) -> str:
    parts = parse_key(key)
    return NAME_TEMPLATE.format(role=parts.role, index=parts.index)


def needs_network(launch: Launch) -> bool:
    """Whether it has peers: a replica alone needs no network of its own, of which engines have few."""
    return sum(len(addresses) for addresses in launch.contract.peers.values()) > 1


def network_request(home_id: str, key: LaunchKey) -> Json:
    """`POST /networks/create`."""
    parts = parse_key(key)
    return {
        "Name": network_name(home_id, key), "Driver": "bridge", "CheckDuplicate": True,
        "Labels": {HOME: home_id, ATTEMPT: f"{parts.job_id}/{parts.attempt}"},
    }


def create_request(launch: Launch, site: Site) -> Json:
    """`POST /containers/create`. Secrets in the environment are still references. CannotRender for what no engine could
    do."""
    config, parts = site.config, parse_key(launch.key)
    image = launch.image or config.image
    if not image:
        raise CannotRender("the job names no image; write image: in the job, or backend.docker.image in the server's"
                           " configuration")
    contract = replace(
        launch.contract, scratch_dir=SCRATCH, report=f"unix:{REPORTS}/replicas.sock" if site.reports else "log:")
    real = [share.gpu for share in launch.gpus if is_real(share.gpu)]
    request: Json = {
        "Image": image,
        "Entrypoint": [],
        "Cmd": list(launch.command),
        "Env": [f"{name}={value}" for name, value in sorted(_environment(launch, contract).items())],
        "WorkingDir": launch.working_dir or SCRATCH,
        "User": site.user,
        "Labels": {
            HOME: site.home_id, KEY: launch.key, ATTEMPT: f"{parts.job_id}/{parts.attempt}",
            SIGNAL: launch.stop_signal, LABEL + "job-name": launch.job_name,
        },
        "HostConfig": {
            "Init": True,
            "NanoCpus": min(launch.cpu_milli, site.cpu_count * 1_000) * 1_000_000,
            "ShmSize": config.shm_size,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": config.read_only,
            "Mounts": _mounts(launch, site),
            "LogConfig": {"Type": "json-file", "Config": {
                "max-size": str(config.logs.size), "max-file": str(config.logs.rotations + 1)}},
            "RestartPolicy": {"Name": "no"},
        },
    }
    host = request["HostConfig"]
    if launch.memory_bytes:
        host["Memory"] = host["MemorySwap"] = max(launch.memory_bytes, LEAST_MEMORY)
    if real:
        host["DeviceRequests"] = [{"Driver": "nvidia", "DeviceIDs": real, "Capabilities": [["gpu"]]}]
    if config.read_only:
        host["Tmpfs"] = {"/tmp": "exec,mode=1777", SCRATCH: _tmpfs(site.owner)}  # noqa: S108  # inside the container
    return request | _network(launch, site, host)


def _environment(launch: Launch, contract: ReplicaEnv) -> dict[str, str]:
    """A user that no image knows has neither name nor home; and images must not bring all GPUs along."""
    pinned = {"CUDA_VISIBLE_DEVICES": visible_devices(launch.gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if simulated := [share.gpu for share in launch.gpus if not is_real(share.gpu)]:
        pinned["JOBSCHED_SIM_GPUS"] = ",".join(simulated)
    if not pinned["CUDA_VISIBLE_DEVICES"]:
        pinned["NVIDIA_VISIBLE_DEVICES"] = "void"
    return {"HOME": SCRATCH, "USER": "jobsched", **to_environ(contract, launch.env), **pinned}


def _mounts(launch: Launch, site: Site) -> list[Json]:
    mounts = [_volume(text) for text in site.config.volumes]
    if site.reports:
        mounts.append(_bind(site.reports, REPORTS, read_only=True))
    directory = directory_by(launch, site)
    if directory == "mount":
        mounts.append(_bind(launch.working_dir, launch.working_dir))
    elif directory == "copy" and site.config.read_only:
        mounts.append({"Type": "volume", "Target": launch.working_dir})
    if place := checkpoint_mount(launch, site):
        mounts.append(_bind(place, place))
    return mounts


def directory_by(launch: Launch, site: Site) -> Literal["copy", "mount", "there"]:
    """How the working directory gets into the container, or that it is there already: in the image or a volume."""
    if not launch.working_dir or site.config.working_dir == "image" or _in_volume(launch.working_dir, site):
        return "there"
    return "mount" if site.config.working_dir == "mount" and site.engine.shares_files else "copy"


def checkpoint_mount(launch: Launch, site: Site) -> str:
    """Directory of the engine's machine that must be mounted for checkpoints; empty when some other mount holds them,
    or they are no files. CannotRender when they would be lost with the container."""
    wanted = launch.contract.checkpoint_dir
    if not wanted.startswith("/") or _in_volume(wanted, site):
        return ""
    below = _within(wanted, launch.working_dir)
    if below and directory_by(launch, site) == "mount":
        return ""
    if site.engine.shares_files and (below or _within(wanted, site.checkpoints)):
        return wanted
    if _within(wanted, site.checkpoints):
        return site.checkpoints
    raise CannotRender(
        f"checkpoint.dir {wanted} would be lost with the container; list the directory under backend.docker.volumes in"
        " the server's configuration, or leave checkpoint.dir out")


def _in_volume(path: str, site: Site) -> bool:
    return any(_within(path, _volume(text)["Target"]) for text in site.config.volumes)


def _within(path: str, directory: str) -> bool:
    return bool(directory) and (path + "/").startswith(directory.rstrip("/") + "/")


def _volume(text: str) -> Json:
    """`/source[:/target][:ro]`."""
    plain = text.removesuffix(":ro")
    source, _, target = plain.partition(":")
    return _bind(source, target or source, read_only=plain != text)


def _bind(source: str, target: str, read_only: bool = False) -> Json:
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": read_only}


def _tmpfs(owner: Owner) -> str:
    return f"exec,mode=0700,uid={owner.uid},gid={owner.gid}"


def _network(launch: Launch, site: Site, host: Json) -> Json:
    if site.several:
        host["NetworkMode"] = "host"
        return {}
    name = peer_name(launch.key)
    if not needs_network(launch):
        host["NetworkMode"] = "bridge"
        return {"Hostname": name}
    network = network_name(site.home_id, launch.key)
    host["NetworkMode"] = network
    return {"Hostname": name, "NetworkingConfig": {"EndpointsConfig": {network: {"Aliases": [name]}}}}


# answers --------------------------------------------------------------------------------------------------------------


def token_of(inspected: Json) -> str:
    """The token of its reports, from its own environment."""
    environ = dict(entry.partition("=")[::2] for entry in inspected["Config"].get("Env") or ())
    contract = from_environ(environ)
    return contract.token if contract is not None else ""


def ended(report: ReplicaReport, inspected: Json, now: datetime) -> ReplicaReport:
    """The report of a container that runs no more. `now`: by the engine's own clock."""
    state = inspected["State"]
    age = max(int((now - instant(state["FinishedAt"])).total_seconds() * 1000), 0)
    text = str(state.get("Error") or "")
    if state["Status"] == "created":
        missing = "not found" in text or "no such file" in text
        return replace(
            report, state=Seen.EXITED, exit_code=127 if missing else 126, failure=Reason.START_FAILED,
            message=start_error(text),
        )
    code, number = exit_of(int(state["ExitCode"]))
    report = replace(report, state=Seen.EXITED, ended_age_ms=age, exit_code=code, signal=number)
    if state.get("OOMKilled") and code != 0:
        return replace(report, failure=Reason.OOM, message="the kernel killed it: out of memory")
    return replace(report, message=text)


def no_command(tail: Sequence[str]) -> str:
    """What the engine's init wrote when there is no such command to run; empty when it was another end."""
    said = re.match(r"\[FATAL tini \(\d+\)\] exec (.*) failed: (.*)", tail[-1]) if tail else None
    return f"{said[1]}: {said[2]}" if said else ""


def wrong_order(text: str) -> bool:
    """Whether an engine refuses an order because of what it says; else the engine itself is in trouble."""
    return bool(re.search(r"exec:|chdir|mount|executable|no such file|permission denied|invalid", text, re.IGNORECASE))


def start_error(text: str) -> str:
    """The part of an engine's message that a person can use: `exec: "trian": executable file not found in $PATH`."""
    inner = re.findall(r'(?:exec|chdir|mounting|invalid mount config)[: ].*', text)
    return (inner[-1] if inner else text).removesuffix(": unknown").strip()


def node(site_name: NodeName, info: Json, engine: DockerEngine, config: DockerBackend, several: bool,
         gpus: Sequence[Gpu], used: tuple[Resources, tuple[GpuShare, ...]] = (NOTHING, ())) -> Node:
    """The engine as a node; `used` is what others' containers reserve there."""
    foreign, foreign_gpus = used
    return Node(
        name=site_name, cpu_milli=int(info["NCPU"]) * 1_000, memory_bytes=int(info["MemTotal"]), gpus=tuple(gpus),
        address=engine.host or "127.0.0.1", port_lo=config.ports.first if several else 0,
        port_hi=config.ports.last if several else 0, labels=tuple(sorted(engine.labels.items())),
        taints=engine.taints, foreign=foreign, foreign_gpus=foreign_gpus,
    )


def listed_gpus(name: NodeName, engine: DockerEngine) -> tuple[Gpu, ...]:
    """The GPUs that the configuration names."""
    found: list[Gpu] = []
    for group in engine.gpus or ():
        ids = group.ids or tuple(f"{name}/sim-{len(found) + at}" for at in range(group.count))
        found += [Gpu(GpuId(one), group.kind, group.memory) for one in ids]
    return tuple(found)


def foreign_use(containers: Iterable[Json], gpus: Sequence[Gpu]) -> tuple[Resources, tuple[GpuShare, ...]]:
    """What containers that are not ours reserve: CPU and memory limits, and GPUs by device request or environment."""
    total, taken = NOTHING, set[str]()
    for inspected in containers:
        host = inspected["HostConfig"]
        cpu = int(host.get("NanoCpus") or 0) // 1_000_000
        if not cpu and (quota := int(host.get("CpuQuota") or 0)) > 0:
            cpu = quota * 1_000 // int(host.get("CpuPeriod") or 100_000)
        total += Resources(cpu, int(host.get("MemoryReservation") or host.get("Memory") or 0))
        taken |= set(_foreign_gpus(inspected, [gpu.id for gpu in gpus]))
    return total, tuple(GpuShare(gpu.id) for gpu in gpus if gpu.id in taken)


def _foreign_gpus(inspected: Json, gpus: Sequence[str]) -> list[str]:
    host = inspected["HostConfig"]
    found: list[str] = []
    for request in host.get("DeviceRequests") or ():
        named = request.get("DeviceIDs") or ()
        count = int(request.get("Count") or 0)
        found += [_gpu_named(text, gpus) for text in named] or list(gpus if count < 0 else gpus[:count])
    environ = dict(entry.partition("=")[::2] for entry in inspected["Config"].get("Env") or ())
    if host.get("Runtime") == "nvidia" and not found:
        visible = environ.get("NVIDIA_VISIBLE_DEVICES", "")
        found += gpus if visible == "all" else [_gpu_named(text, gpus) for text in visible.split(",")]
    return found


def _gpu_named(text: str, gpus: Sequence[str]) -> str:
    """A device is named by UUID or by index."""
    return gpus[int(text)] if text.isdigit() and int(text) < len(gpus) else text


def pull_progress(layers: Mapping[str, Json], image: str) -> str:
    """How far a pull is, from the newest line about each layer."""
    details = [layer.get("progressDetail") or {} for layer in layers.values()]
    total = sum(int(detail.get("total") or 0) for detail in details)
    done = sum(int(detail.get("current") or 0) for detail in details)
    return f"pulling {image}" + (f": {done / 2**20:.0f} of {total / 2**20:.0f} MiB" if total else "")


TOLD = {"die": "Died", "oom": "OutOfMemory", "kill": "Killed", "destroy": "Removed"}
"""Events of containers that people are told, and their names."""


def incident(event: Json, home_id: str) -> Incident | None:
    """An engine's event as people read it; None for what is not ours or of no interest."""
    actor = event.get("Actor") or {}
    labels = actor.get("Attributes") or {}
    action = str(event.get("Action", ""))
    if labels.get(HOME) != home_id or action not in TOLD:
        return None
    if (key := own_key(labels.get(KEY, ""))) is None:
        return None
    words = {
        "die": f"exit code {labels.get('exitCode', '?')}", "kill": f"signal {labels.get('signal', '?')}",
        "oom": "a process was killed for want of memory", "destroy": "its container was removed",
    }  # fmt: skip
    at_ms = int(event.get("timeNano", 0)) // 10**6
    return Incident(at_ms, TOLD[action], words[action], key, warning=action == "oom")
