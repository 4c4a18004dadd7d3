"""Kubernetes' node objects as our nodes: capacity, GPU kinds, domains, taints, and what others' pods ask for. Pure.

Used by `kubernetes`. Which GPU a node has is told by labels of NVIDIA's GPU feature discovery (EKS, on-premises), of
Karpenter, of GKE, of AMD's node labeller, or only by the instance type (AKS, EKS without discovery). GPUs have no
names before a device plugin hands them out: jobsched counts them as `NODE/gpu-0`, `NODE/gpu-1`, …
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobsched.backends.gpus import gpu_kind
from jobsched.core.node import Gpu, Node
from jobsched.core.resources import NOTHING, WHOLE_GPU, GpuId, GpuShare, NodeName, Resources
from jobsched.spec.backends import KubernetesBackend, KubernetesGpus

Json = dict[str, Any]

GIB = 2**30
MIG = re.compile(r"nvidia\.com/mig-([0-9]+g\.[0-9]+gb(?:\.me)?(?:\+me)?)")
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30,
          "Ti": 2**40, "Pi": 2**50}
_QUANTITY = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]{0,2})")
_OF_MODEL = {"t4": 16, "v100": 16, "p4": 8, "p100": 16, "k80": 12, "a10g": 24, "a10": 24, "l4": 24, "l40s": 48,
             "a100": 40, "h100": 80, "h200": 141, "b200": 180, "gh200": 96, "mi300x": 192, "mi250x": 128}
"""GiB of one GPU, where a label names the model only; the smaller where there are several."""
_EC2 = {"p3": "v100-16gb", "p3dn": "v100-32gb", "p4d": "a100-40gb", "p4de": "a100-80gb", "p5": "h100-80gb",
        "p5e": "h200-141gb", "p5en": "h200-141gb", "g4dn": "t4-16gb", "g5": "a10g-24gb", "g6": "l4-24gb",
        "g6e": "l40s-48gb"}
"""GPU of an EC2 instance family; its device plugin alone sets no labels."""
_AZURE = {"Standard_ND96asr_v4": "a100-40gb", "Standard_ND40rs_v2": "v100-32gb"}
"""Azure's sizes whose names do not say."""
OWN_TAINTS = ("node.kubernetes.io/", "node.cloudprovider.kubernetes.io/uninitialized")
"""Taints that say what `ready` says already."""


@dataclass(frozen=True, slots=True)
class Stock:
    """GPUs of one kind that a node offers through one resource."""

    resource: str
    kind: str
    memory_bytes: int
    count: int
    per_gpu: int = 1


@dataclass(frozen=True, slots=True)
class Use:
    """What a pod that is not ours asks for on its node."""

    node: str
    cpu_milli: int
    memory_bytes: int
    devices: tuple[tuple[str, int], ...] = ()
    """(extended resource, units), sorted."""


def amount(text: object) -> float:
    """A Kubernetes quantity (`500m`, `16Gi`, `1e3`) as a number; 0 for nonsense."""
    found = _QUANTITY.fullmatch(str(text))
    return float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0


def milli(text: object) -> int:
    return -(-round(amount(text) * 1_000_000) // 1_000)


def essence(found: Json) -> Json:
    """The parts of a node object that matter here; a kubelet's heartbeats change others."""
    metadata, status = found["metadata"], found.get("status", {})
    ready = next(({k: c.get(k, "") for k in ("type", "status", "reason", "message")}
                  for c in status.get("conditions") or () if c["type"] == "Ready"), None)
    return {
        "metadata": {"name": metadata["name"], "labels": metadata.get("labels") or {}},
        "spec": {k: v for k, v in found.get("spec", {}).items() if k in ("taints", "unschedulable")},
        "status": {"allocatable": status.get("allocatable") or status.get("capacity") or {},
                   "addresses": status.get("addresses") or [], "conditions": [ready] if ready else []},
    }


def node_of(found: Json, config: KubernetesBackend, uses: Iterable[Use], held: frozenset[str] = frozenset(),
            silent: str = "") -> Node:
    """A node object as our node. `uses`: what others ask for on it; `held`: GPUs that our own replicas hold, which
    others therefore do not; `silent`: why it takes nothing new, beyond what it says itself."""
    name = NodeName(found["metadata"]["name"])
    free = found.get("status", {}).get("allocatable") or {}
    total, units = NOTHING, dict[str, int]()
    for use in uses:
        total += Resources(use.cpu_milli, use.memory_bytes)
        for resource, count in use.devices:
            units[resource] = units.get(resource, 0) + count
    stocks = list(stocks_of(found, config))
    gpus = tuple(Gpu(gpu, stock.kind, stock.memory_bytes) for stock in stocks for gpu in names(name, stock))
    foreign = tuple(GpuShare(gpu) for stock in stocks for gpu in _taken(name, stock, units, held))
    problem = silent or _not_ready(found)
    return Node(
        name=name, cpu_milli=milli(free.get("cpu", 0)), memory_bytes=int(amount(free.get("memory", 0))), gpus=gpus,
        address=_address(found), labels=labels_of(found, config), taints=taints_of(found, config), foreign=total,
        foreign_gpus=foreign, ready=not problem, message=problem,
    )


def names(node: NodeName, stock: Stock) -> list[GpuId]:
    """What jobsched calls the GPUs of a stock."""
    short = stock.resource.rpartition("/")[2]
    return [GpuId(f"{node}/{short}-{index}") for index in range(stock.count)]


def resource_of(gpu: str, found: Json, config: KubernetesBackend) -> Stock | None:
    """The stock that a GPU of ours belongs to; None when the node has no such GPU any more."""
    name = NodeName(found["metadata"]["name"])
    return next((stock for stock in stocks_of(found, config) if gpu in names(name, stock)), None)


def _taken(name: NodeName, stock: Stock, units: Mapping[str, int], held: frozenset[str]) -> list[GpuId]:
    """Which GPUs others have is not known, only how many: the last ones that are not ours."""
    count = -(-units.get(stock.resource, 0) // stock.per_gpu)
    others = [gpu for gpu in names(name, stock) if gpu not in held]
    return others[len(others) - count:] if count < len(others) else others


def labels_of(found: Json, config: KubernetesBackend) -> tuple[tuple[str, str], ...]:
    """Its own, and the domains of every level of the topology."""
    own: dict[str, str] = found["metadata"].get("labels") or {}
    domains = {level: next((own[label] for label in known if label in own), "")
               for level, known in config.topology.items()}
    return tuple(sorted((own | {level: domain for level, domain in domains.items() if domain}).items()))


def taints_of(found: Json, config: KubernetesBackend) -> tuple[str, ...]:
    """Taints that keep pods away, but for those that no job minds."""
    taints = []
    for taint in found.get("spec", {}).get("taints") or ():
        key, text = taint["key"], f"{taint['key']}={taint['value']}" if taint.get("value") else taint["key"]
        known = key in config.tolerations or text in config.tolerations
        if taint["effect"] != "PreferNoSchedule" and not known and not key.startswith(OWN_TAINTS):
            taints.append(text)
    return tuple(sorted(set(taints)))


def _not_ready(found: Json) -> str:
    """Why nothing new should be bound there; empty when it may."""
    if found.get("spec", {}).get("unschedulable"):
        return "cordoned in Kubernetes"
    condition = next((c for c in found.get("status", {}).get("conditions") or () if c["type"] == "Ready"), None)
    if condition is None or condition["status"] != "True":
        said = (condition or {}).get("message") or (condition or {}).get("reason") or "it has not reported yet"
        return f"not ready: {said}"
    return ""


def _address(found: Json) -> str:
    by_type = {a["type"]: a["address"] for a in found.get("status", {}).get("addresses") or ()}
    return str(by_type.get("InternalIP") or by_type.get("Hostname") or "127.0.0.1")


# GPUs -----------------------------------------------------------------------------------------------------------------


def stocks_of(found: Json, config: KubernetesBackend) -> Iterator[Stock]:
    """The GPUs of a node, by resource: what the configuration lists, and MIG slices."""
    offered: Json = found.get("status", {}).get("allocatable") or {}
    labels: dict[str, str] = found["metadata"].get("labels") or {}
    for listed in config.gpus:
        if count := int(amount(offered.get(listed.resource, 0))) // listed.per_gpu:
            kind, memory = _listed_kind(listed, labels)
            yield Stock(listed.resource, kind, memory, count, listed.per_gpu)
    listed_names = {listed.resource for listed in config.gpus}
    for resource in sorted(offered):
        slice_ = MIG.fullmatch(resource)
        if slice_ and resource not in listed_names and (count := int(amount(offered[resource]))):
            whole, memory = kind_of(labels)
            told = amount(labels.get(f"{resource}.memory", 0)) * 2**20
            yield Stock(resource, f"{whole.partition(':')[0]}:{slice_[1]}", int(told) or _slice_memory(slice_[1]),
                        count)


def _listed_kind(listed: KubernetesGpus, labels: Mapping[str, str]) -> tuple[str, int]:
    kind, memory = kind_of(labels)
    if listed.per_gpu > 1 and not kind.endswith(":shared"):
        kind += ":shared"
    return listed.kind or kind, listed.memory or memory


def kind_of(labels: Mapping[str, str]) -> tuple[str, int]:
    """Kind and memory (bytes) of a node's GPUs, from whoever labelled it; `gpu` when nobody did."""
    if product := labels.get("nvidia.com/gpu.product", ""):
        return _discovered(product, labels)
    if product := labels.get("amd.com/gpu.product-name", "") or labels.get("beta.amd.com/gpu.product-name", ""):
        memory = int(amount(re.sub(r"([GMT])B?$", r"\1i", labels.get("amd.com/gpu.vram", "0"))))
        return _named(re.sub(r"(?i)^amd[ -]|instinct[ -]|radeon[ -]|[ -]oam$", "", product.replace("_", " ")), memory)
    if accelerator := labels.get("cloud.google.com/gke-accelerator", ""):
        kind, memory = _named(accelerator, 0)
        if part := labels.get("cloud.google.com/gke-gpu-partition-size", ""):
            return f"{kind}:{part}", _slice_memory(part)
        shared = labels.get("cloud.google.com/gke-gpu-sharing-strategy", "")
        return (f"{kind}:shared" if shared else kind), memory
    if name := labels.get("karpenter.k8s.aws/instance-gpu-name", ""):
        return _named(name, int(amount(labels.get("karpenter.k8s.aws/instance-gpu-memory", 0)) * 2**20))
    if accelerator := labels.get("k8s.amazonaws.com/accelerator", ""):
        return _named(accelerator, 0)
    return _of_instance(labels.get("node.kubernetes.io/instance-type", ""))


def _discovered(product: str, labels: Mapping[str, str]) -> tuple[str, int]:
    """`NVIDIA-A100-SXM4-40GB-MIG-1g.5gb`, `Tesla-T4-SHARED`."""
    memory = int(amount(labels.get("nvidia.com/gpu.memory", 0)) * 2**20)
    plain = product.removesuffix("-SHARED")
    model, mig, part = plain.partition("-MIG-")
    if mig:
        return f"{_named(model, 0)[0]}:{part.lower()}", memory or _slice_memory(part)
    kind, memory = _named(model, memory)
    return (f"{kind}:shared" if plain != product else kind), memory


def _named(model: str, memory: int) -> tuple[str, int]:
    """From a name as people print it."""
    words = re.sub(r"[-_ ]+", " ", model)
    printed = re.search(r"([0-9]+) ?gb\b", words, re.IGNORECASE)
    if not memory:
        short = gpu_kind(words, 0)
        memory = int(printed[1]) * GIB if printed else _OF_MODEL.get(short, 0) * GIB
    return gpu_kind(words, memory), memory


def _of_instance(kind: str) -> tuple[str, int]:
    """`p4d.24xlarge` (EC2), `Standard_NC24ads_A100_v4` (Azure)."""
    if named := _EC2.get(kind.partition(".")[0]) or _AZURE.get(kind):
        return named, int(re.findall(r"([0-9]+)gb", named)[0]) * GIB
    if model := re.fullmatch(r"Standard_[A-Z]+[0-9]+[a-z-]*(?:[0-9]+[a-z]*)?_(?:x?1_)?([A-Z]+[0-9]+[A-Za-z]*)_v[0-9]+",
                             kind):
        memory = 80 if model[1] == "A100" and "NC" in kind else _OF_MODEL.get(model[1].lower(), 0)
        return _named(f"{model[1]}", memory * GIB)
    return "gpu", 0


def _slice_memory(part: str) -> int:
    found = re.search(r"([0-9]+)gb", part)
    return int(found[1]) * GIB if found else 0


# what others use ------------------------------------------------------------------------------------------------------


def use_of(pod: Json) -> Use | None:
    """What a pod asks for on its node, as kube-scheduler counts it; None when it holds nothing (any more)."""
    spec, status = pod.get("spec", {}), pod.get("status", {})
    if not spec.get("nodeName") or status.get("phase") in ("Succeeded", "Failed"):
        return None
    total = _sum(container for container in spec.get("containers") or ())
    beside = dict[str, int]()
    for container in spec.get("initContainers") or ():
        asked = _asked(container)
        if container.get("restartPolicy") == "Always":  # a sidecar goes on beside the containers
            beside = _plus(beside, asked)
            total = _plus(total, asked)
        else:
            total = _most(total, _plus(beside, asked))
    if whole := (spec.get("resources") or {}).get("requests"):  # resources of the pod as a whole
        total |= _units(whole)
    total = _plus(total, _units(spec.get("overhead") or {}))
    devices = tuple(sorted((n, count) for n, count in total.items() if "/" in n and count))
    return Use(spec["nodeName"], total.get("cpu", 0), total.get("memory", 0), devices)


def _asked(container: Json) -> dict[str, int]:
    """Requests; what has a limit only is requested as much."""
    resources = container.get("resources") or {}
    return _units((resources.get("limits") or {}) | (resources.get("requests") or {}))


def _units(amounts: Mapping[str, object]) -> dict[str, int]:
    return {name: milli(text) if name == "cpu" else int(amount(text)) for name, text in amounts.items()}


def _sum(containers: Iterable[Json]) -> dict[str, int]:
    total = dict[str, int]()
    for container in containers:
        total = _plus(total, _asked(container))
    return total


def _plus(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in [*a, *(n for n in b if n not in a)]}


def _most(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: max(a.get(name, 0), b.get(name, 0)) for name in [*a, *(n for n in b if n not in a)]}


def units_for(shares: Iterable[GpuShare], stock: Stock) -> int | None:
    """Units of the stock's resource for these shares; None when no whole number of units on one GPU is right."""
    total = 0
    for share in shares:
        units = share.milli * stock.per_gpu
        if units % WHOLE_GPU or (units != WHOLE_GPU and stock.per_gpu > 1):
            return None
        total += units // WHOLE_GPU
    return total
