"""Trust in nodes and GPUs: failures of different jobs raise a suspicion score, which decays; a doubted node (or GPU) is
put on probation, which is a cordon by jobsched itself, and gets a pre-flight check; trust returns when that passes.

One job that fails again and again says nothing about its node, so each job counts once per node. The weights follow
what operators of large clusters report (Acme, NSDI'24; Philly, ATC'19): losses of nodes and GPU errors point at
hardware, exits with an error code hardly do. Used by the controller before each pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding
from jobsched.core.ledger import Space
from jobsched.core.node import Cordon
from jobsched.core.resources import GpuId, GpuShare, JobId, NodeName
from jobsched.core.suspicion import BY, PREFLIGHT_LABEL
from jobsched.spec.job import JobSpec

CHECK_CPU_MILLI = 100
RECHECK_MAX = 6
"""The pause before the next check doubles so many times at most."""
ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, slots=True)
class Health:
    """How quickly jobsched loses trust, and how it is won back."""

    threshold: float = 3.0
    """Score at which a node or GPU is doubted; a lost node or a GPU error of one job counts 1."""
    half_life_ms: int = 3_600_000
    """Time in which a score halves."""
    recheck_ms: int = 600_000
    """Between a pre-flight check that failed and the next one; doubles each time."""
    preflight: tuple[str, ...] = ("python", "-m", "jobsched.train.preflight")
    """Command that must end with 0 before trust returns; empty: trust returns when the score has decayed."""
    image: str = ""
    """Image that the check runs in, where the backend needs one."""
    timeout_ms: int = 300_000
    """Longest time that a check may take."""


Decision = ev.NodeCordoned | ev.NodeUncordoned | ev.JobSubmitted | ev.AttemptPlaced


def doubts(cluster: Cluster, now_ms: int, health: Health) -> list[Decision]:
    """What follows from the suspicions: probation, checks, trust. Cost: nodes that were accused since the last look and
    nodes on probation."""
    decisions: list[Decision] = []
    accused, cluster.fleet.accused = cluster.fleet.accused, {}
    for name in accused:
        if name in cluster.fleet.nodes and name not in cluster.fleet.cordoned:
            decisions += _accused(cluster, name, now_ms, health)
    for name, cordon in cluster.fleet.cordoned.items():
        if cordon.by == BY and cluster.fleet.is_up(name):
            decisions += _on_probation(cluster, name, cordon, now_ms, health)
    return decisions


def next_look_ms(cluster: Cluster, health: Health) -> int:
    """When a node on probation needs a look by itself; 0: none does."""
    found = [
        _due_ms(cluster, name, cordon, health) for name, cordon in cluster.fleet.cordoned.items()
        if cordon.by == BY and cluster.fleet.is_up(name) and name not in cluster.fleet.checking
    ]  # fmt: skip
    return min(found, default=0)


def _accused(cluster: Cluster, name: NodeName, now_ms: int, health: Health) -> Iterable[Decision]:
    suspicion = cluster.fleet.suspicions[name]
    if suspicion.score(now_ms, health.half_life_ms) < health.threshold:
        return ()
    gpu = suspicion.the_gpu()
    whole = gpu is None or len(cluster.fleet.nodes[name].gpus) == 1
    what = f"node {name}" if whole else f"{gpu} of node {name}"
    why = f"{suspicion.said()}; {what} is on probation"
    return (ev.NodeCordoned(now_ms, name, BY, why=why, gpus=() if whole or gpu is None else (gpu,)),)


def _due_ms(cluster: Cluster, name: NodeName, cordon: Cordon, health: Health) -> int:
    """When the node is looked at next: its next check, or when its score will have halved twice."""
    if not health.preflight:
        return cordon.since_ms + 2 * health.half_life_ms
    failed = cluster.fleet.checks.get(name)
    if failed is None:
        return cordon.since_ms
    return failed.at_ms + (health.recheck_ms << min(failed.in_a_row - 1, RECHECK_MAX))


def _on_probation(
    cluster: Cluster, name: NodeName, cordon: Cordon, now_ms: int, health: Health
) -> Iterable[Decision]:
    failed = cluster.fleet.checks.get(name)
    if failed is not None and not failed.in_a_row:
        return (ev.NodeUncordoned(now_ms, name, BY),)
    if name in cluster.fleet.checking or now_ms < _due_ms(cluster, name, cordon, health):
        return ()
    if not health.preflight:
        return (ev.NodeUncordoned(now_ms, name, BY),)
    space = cluster.ledger.spaces.get(name)
    return () if space is None else _check(cluster, name, cordon, space, now_ms, health)


def _check(
    cluster: Cluster, name: NodeName, cordon: Cordon, space: Space, now_ms: int, health: Health
) -> Iterable[Decision]:
    """A job of one replica on that very node, with every GPU of it that nobody holds (or the doubted ones)."""
    gpus = tuple(
        gpu.id for gpu in cluster.fleet.nodes[name].gpus
        if gpu.healthy and (not cordon.gpus or gpu.id in cordon.gpus) and not _held(cluster, name, gpu.id)
    )  # fmt: skip
    if (space.node.gpus and not gpus) or space.cpu_milli < CHECK_CPU_MILLI:
        return ()
    ports = cluster.ledger.ports(name, 2)
    if ports is None:
        return ()
    serial = cluster.fleet.checks[name].in_a_row if name in cluster.fleet.checks else 0
    job_id = _job_id(now_ms, f"{name}/{serial}")
    job_name = f"preflight-{job_id[-8:]}"
    spec = JobSpec.model_validate({
        "name": job_name,
        "labels": {PREFLIGHT_LABEL: str(name)},
        "roles": {"check": {
            "command": list(health.preflight), "cpu": f"{CHECK_CPU_MILLI}m", "image": health.image,
            "gpu": f"any:{len(gpus)}" if gpus else None, "restart": {"max": 0},
        }},
        "time_limit": f"{health.timeout_ms}ms", "start_timeout": f"{health.timeout_ms}ms",
        "queue_deadline": f"{health.timeout_ms}ms",
    })  # fmt: skip
    binding = Binding("check", 0, name, tuple(GpuShare(gpu) for gpu in gpus), ports)
    return (
        ev.JobSubmitted(now_ms, job_id, job_name, BY, spec, request_id=job_id, held=True),
        ev.AttemptPlaced(now_ms, job_id, 1, (binding,), ports[-1] if ports else 0),
    )


def _held(cluster: Cluster, name: NodeName, gpu: GpuId) -> bool:
    bound = cluster.fleet.on_node.get(name, {}).values()
    return any(share.gpu == gpu for binding, _ in bound for share in binding.gpus)


def _job_id(now_ms: int, salt: str) -> JobId:
    """An id in the form of every other (a ULID: 48 bits of time, 80 more), the same for the same check."""
    value = (now_ms << 80) | (_hash(salt) & ((1 << 80) - 1))
    return JobId("".join(ALPHABET[value >> shift & 31] for shift in range(125, -1, -5)))


def _hash(text: str) -> int:
    """FNV-1a over 128 bits: the same in every process, unlike `hash`."""
    found = 0x6C62272E07BB014262B821756295C58D
    for byte in text.encode():
        found = (found ^ byte) * 0x0000000001000000000000000000013B & ((1 << 128) - 1)
    return found
