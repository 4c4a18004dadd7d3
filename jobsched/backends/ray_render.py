"""Launches as requests to a Ray cluster, what Ray tells as nodes and ends. Pure: values in, values out. Used by `ray`.

jobsched picks the nodes, Ray reserves: a gang is one placement group whose bundles are pinned to node ids. Replicas
that may leave before their gang does (of elastic roles) get a group each, because a group is only given back whole.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobsched.backends.supervisor.protocol import Key, Order
from jobsched.contract import to_environ
from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.node import Gpu, Node
from jobsched.core.resources import NOTHING, WHOLE_GPU, GpuId, GpuShare, NodeName, Resources
from jobsched.spec.backends import RayBackend

Json = dict[str, Any]

NODE_ID = "ray.io/node-id"
"""Ray's own label of every node."""
ZONES = {"ray.io/availability-zone": "zone", "ray.io/availability-region": "region"}
KINDS = {
    "A10G": ("a10g-24gb", 24), "A100": ("a100-40gb", 40), "A100-40G": ("a100-40gb", 40), "A100-80G": ("a100-80gb", 80),
    "B200": ("b200-192gb", 192), "GB200": ("gb200-192gb", 192), "H100": ("h100-80gb", 80), "H200": ("h200-141gb", 141),
    "L4": ("l4-24gb", 24), "L40S": ("l40s-48gb", 48), "P100": ("p100-16gb", 16), "P4": ("p4-8gb", 8),
    "K80": ("k80-12gb", 12), "T4": ("t4-16gb", 16), "V100": ("v100-16gb", 16),
}
"""`ray.util.accelerators` -> kind and GiB, the smaller one where Ray does not tell variants apart."""
SLIVER = 0.001
"""Of a resource that every node has: Ray reserves no empty bundles."""


@dataclass(slots=True)
class Bundle:
    """A part of a placement group: what one replica is given. `key` is empty once that was forgotten."""

    node_id: str
    resources: Resources
    key: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica is to run: its group, and which bundle of it."""

    group: str
    bundle: int


class CannotRender(Exception):
    """The launch cannot be carried out on Ray; the text is for people."""


# requests -------------------------------------------------------------------------------------------------------------


def prefix(home_id: str) -> str:
    """What the names of all actors and groups of one server begin with."""
    return f"jobsched:{home_id}:"


def needs(launch: Launch) -> Resources:
    return Resources(launch.cpu_milli, launch.memory_bytes, sum(share.milli for share in launch.gpus))


def gangs(launches: Sequence[Launch]) -> list[list[Launch]]:
    """Those who get a placement group together: all but the elastic ones."""
    fixed = [launch for launch in launches if not launch.contract.elastic]
    return ([fixed] if fixed else []) + [[launch] for launch in launches if launch.contract.elastic]


def group_request(name: str, bundles: Sequence[Bundle], addresses: Mapping[str, str]) -> Json:
    """Arguments of `ray.util.placement_group`. `addresses`: node id -> address."""
    return {
        "name": name,
        "bundles": [_bundle(bundle.resources, addresses[bundle.node_id]) for bundle in bundles],
        "selectors": [{NODE_ID: bundle.node_id} for bundle in bundles],
    }


def amounts(resources: Resources) -> dict[str, float]:
    """Ours as Ray's, without what is not needed."""
    found = {
        "CPU": resources.cpu_milli / 1_000, "GPU": resources.gpu_milli / WHOLE_GPU, "memory": resources.memory_bytes,
    }
    return {name: amount for name, amount in found.items() if amount}


def _bundle(resources: Resources, address: str) -> dict[str, float]:
    return amounts(resources) or {f"node:{address}": SLIVER}


def selector(labels: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Labels of nodes as Ray knows them."""
    rays = {ours: theirs for theirs, ours in ZONES.items()}
    return {rays.get(key, key): value for key, value in labels}


def actor_request(launch: Launch, place: Place, address: str, archive: str, config: RayBackend) -> Json:
    """What `ray_driver` makes an actor of. `archive`: file with the packed working directory; empty: it is there.
    Secrets in the environment are still references."""
    resources = needs(launch)
    bundle = _bundle(resources, address)
    demand: Json = {
        "num_cpus": resources.cpu_milli / 1_000, "num_gpus": resources.gpu_milli / WHOLE_GPU,
        "memory": resources.memory_bytes or None,
        "resources": {name: amount for name, amount in bundle.items() if name.startswith("node:")},
    }
    shares = [[share.gpu, share.milli] for share in launch.gpus]
    return {
        "key": launch.key, "group": place.group, "bundle": place.bundle, "demand": demand, "archive": archive,
        "order": order(launch, config, copied=bool(archive)).to_wire(),
        "ray_gpus": not _simulated(launch.gpus),
        "note": {"group": place.group, "bundle": place.bundle, "gpus": shares, "keep_ms": launch.keep_ms},
    }


def order(launch: Launch, config: RayBackend, copied: bool) -> Order:
    """For the node's supervisor; the actor adds what only the node knows. CannotRender when its checkpoints would be
    lost with a copied directory."""
    if copied and (launch.contract.checkpoint_dir + "/").startswith(launch.working_dir.rstrip("/") + "/"):
        raise CannotRender(
            f"checkpoint.dir {launch.contract.checkpoint_dir} would be lost with the copied directory; name one that"
            " all nodes share, or leave checkpoint.dir out")
    pinned = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ""}
    if _simulated(launch.gpus):
        pinned["JOBSCHED_SIM_GPUS"] = ",".join(share.gpu for share in launch.gpus)
    return Order(
        key=Key(launch.key), argv=launch.command, env={**to_environ(launch.contract, launch.env), **pinned},
        node=launch.node, cwd="" if copied else launch.working_dir, token=launch.contract.token, ports=launch.ports,
        cpu_milli=launch.cpu_milli, memory_bytes=launch.memory_bytes, stop_signal=launch.stop_signal,
        preload=launch.preload, keep_ms=launch.keep_ms, clean_up=launch.clean_up,
    )


def _simulated(gpus: Sequence[GpuShare]) -> bool:
    return any("/sim-" in share.gpu for share in gpus)


# answers --------------------------------------------------------------------------------------------------------------


def nodes(raws: Iterable[Json], config: RayBackend) -> dict[str, Node]:
    """Node id -> node, without what others use."""
    found: dict[str, Node] = {}
    names: set[str] = set()
    for raw in sorted(raws, key=lambda raw: str(raw["NodeID"])):
        name = _name(raw)
        if name in names:
            name = NodeName(f"{name}-{raw['NodeID'][-6:]}")
        names.add(name)
        found[raw["NodeID"]] = _node(name, raw, config)
    return found


def _name(raw: Json) -> NodeName:
    """The name that `ray start --node-name` gave, else the host's with the end of Ray's id: several nodes may
    share a host, and one that comes back is another."""
    given, host = str(raw.get("NodeName") or ""), str(raw["NodeManagerHostname"])
    named = given and given != raw["NodeManagerAddress"]
    return NodeName(_plain(given) if named else f"{_plain(host.split('.')[0])}-{raw['NodeID'][-6:]}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.") or "node"


def _node(name: NodeName, raw: Json, config: RayBackend) -> Node:
    has = raw["Resources"]
    kind, memory = _kind(raw, config)
    word = "sim" if kind.startswith("sim-") else "gpu"
    labels = {ZONES.get(key, key): value for key, value in raw["Labels"].items() if key != NODE_ID}
    first, last = config.ports.first, config.ports.last
    return Node(
        name=name, cpu_milli=round(has.get("CPU", 0) * 1_000), memory_bytes=int(has.get("memory", 0)),
        gpus=tuple(Gpu(GpuId(f"{name}/{word}-{at}"), kind, memory) for at in range(int(has.get("GPU", 0)))),
        address=raw["NodeManagerAddress"], port_lo=first, port_hi=last,
        port_from=first + zlib.crc32(raw["NodeID"].encode()) % (last - first + 1),  # several nodes may share an address
        labels=tuple(sorted(labels.items())),
    )


def _kind(raw: Json, config: RayBackend) -> tuple[str, int]:
    """Kind and memory in bytes of the node's GPUs, by its label or the resource `accelerator_type:…`."""
    given = raw["Labels"].get("ray.io/accelerator-type", "")
    for resource in sorted(raw["Resources"]):
        if not given and resource.startswith("accelerator_type:"):
            given = resource.removeprefix("accelerator_type:")
    kind, gib = KINDS.get(given, (_plain(given) if given else "gpu", 0))
    return config.gpu_kinds.get(given, kind), gib * 2**30


def resources(raw: Mapping[str, float]) -> Resources:
    """Ray's amounts as ours."""
    return Resources(
        round(raw.get("CPU", 0) * 1_000), int(raw.get("memory", 0)), round(raw.get("GPU", 0) * WHOLE_GPU))


def foreign(total: Resources, available: Resources, ours: Iterable[Bundle]) -> Resources:
    """What others hold: all that is not available, less what is reserved for replicas of ours. A bundle that is idle
    counts as held by others: Ray gives it to nobody else before its whole gang has ended."""
    held = sum((bundle.resources for bundle in ours if bundle.key), NOTHING)
    gone = total - available - held
    return Resources(max(gone.cpu_milli, 0), max(gone.memory_bytes, 0), max(gone.gpu_milli, 0))


def least(one: Resources, other: Resources) -> Resources:
    return Resources(
        min(one.cpu_milli, other.cpu_milli), min(one.memory_bytes, other.memory_bytes),
        min(one.gpu_milli, other.gpu_milli))


def with_foreign(node: Node, used: Resources, ours: Mapping[GpuId, int]) -> Node:
    """`ours`: thousandths of each GPU that replicas of ours hold. Which GPU is whose Ray decides and does not tell, so
    others' are taken to be the last ones that are not ours."""
    left, shares = used.gpu_milli, []
    for gpu in reversed(node.gpus):
        if (taken := min(left, WHOLE_GPU - ours.get(gpu.id, 0))) > 0:
            shares.append(GpuShare(gpu.id, taken))
            left -= taken
    return replace(node, foreign=replace(used, gpu_milli=0), foreign_gpus=tuple(reversed(shares)))


def death(text: str, node_lives: bool) -> tuple[Reason, str]:
    """Why an actor died, from Ray's words. NONE: it is lost, and nobody knows more."""
    if re.search(r"OutOfMemory|OUT_OF_MEMORY|running low on memory|OOM", text):
        return Reason.OOM, "Ray's memory monitor killed it: its node was running out of memory"
    if not node_lives or re.search(r"node (?:\S+ )?(?:has )?(?:died|was terminated)|NODE_DIED", text):
        return Reason.NODE_LOST, "its Ray node died"
    if "ray.kill" in text:
        return Reason.REPLICA_LOST, "its actor was killed by ray.kill"
    if "placement group" in text and "removed" in text:
        return Reason.REPLICA_LOST, "its placement group was removed"
    if missing := re.search(r"No module named '(jobsched[^']*|pydantic)'", text):
        return Reason.START_FAILED, f"{missing[1]} is not installed on its node: pip install jobsched there"
    return Reason.REPLICA_LOST, "its actor died: " + _gist(text)


def _gist(text: str) -> str:
    """The last telling line of a message of Ray's."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower() or "dead" in line or "died" in line or "Error" in line]
    return (telling or lines or ["no reason given"])[-1][:300]


def late(launches: Sequence[LaunchKey], seconds: float) -> str:
    return (f"Ray did not reserve what {len(launches)} replica{'s need' if len(launches) != 1 else ' needs'} within"
            f" {seconds:g} s; somebody else has taken it meanwhile (ray status shows who)")
