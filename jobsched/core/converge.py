"""Converge: desired minus seen, as actions. Pure; reaps orphans and stale attempts by the same rule as everything else.

A replica is desired when the log says BOUND or RUNNING in an attempt that starts or runs. Whatever else is alive is
stopped, whoever started it: that is why a crash anywhere needs no recovery path.
"""

from __future__ import annotations

from collections.abc import Iterable

from jobsched.contract import ReplicaEnv
from jobsched.core.cluster import Cluster
from jobsched.core.job import FailureClass, Job, Phase, Reason, Replica, ReplicaId, ReplicaState, replica_id
from jobsched.core.judge import ranks
from jobsched.core.launch import Action, AskStacks, Forget, Launch, LaunchKey, Start, Stop, launch_key
from jobsched.core.observation import Sight
from jobsched.core.resources import WHOLE_GPU, JobId, NodeName
from jobsched.core.timers import START_AGAIN_MS
from jobsched.spec.job import RestartScope, restart_scope, training_roles
from jobsched.spec.pod import both

STALE_GRACE_MS = 0
"""A stale replica may not save anything: its attempt is over."""
HANG_GRACE_MS = 0
"""Nor can a hung one."""
CANCEL_GRACE_MS = 10_000


class Addresses:
    """How peers are named: by node address and port, or by a stable name per replica."""

    def __init__(self, name_template: str = "", checkpoint_root: str = "") -> None:
        self.name_template = name_template
        self.checkpoint_root = checkpoint_root

    def host(self, cluster: Cluster, job: Job, replica: Replica) -> str:
        if self.name_template:
            return self.name_template.format(job=job.id, attempt=job.attempt, role=replica.role, index=replica.index)
        assert replica.binding is not None
        node = cluster.nodes.get(replica.binding.node)
        return node.address if node is not None else ""


def converge(
    cluster: Cluster, sight: Sight, job_ids: Iterable[JobId], now_ms: int, addresses: Addresses
) -> list[Action]:
    """Actions for these jobs. Cost: their replicas and what the backend shows of them."""
    actions: list[Action] = []
    for job_id in job_ids:
        job = cluster.jobs.get(job_id)
        if job is None or not job.phase.active:
            actions += _clear(sight, job_id)
        else:
            actions += _job(cluster, sight, job, now_ms, addresses)
    return actions


def _clear(sight: Sight, job_id: JobId) -> list[Action]:
    """Nothing of this job should exist."""
    keys = sorted(sight.by_job.get(job_id, ()))
    alive = tuple(k for k in keys if sight.alive(k))
    ended = tuple(k for k in keys if k in sight.replicas and k not in alive)
    actions: list[Action] = []
    if alive:
        actions.append(Stop(alive, STALE_GRACE_MS))
    if ended:
        actions.append(Forget(ended))
    return actions


def _job(cluster: Cluster, sight: Sight, job: Job, now_ms: int, addresses: Addresses) -> list[Action]:
    desired: dict[LaunchKey, Replica] = {}
    leaving: list[LaunchKey] = []
    for replica in job.replicas.values():
        key = launch_key(job.id, job.attempt, replica.role, replica.index, replica.restart)
        if replica.state in (ReplicaState.BOUND, ReplicaState.RUNNING):
            desired[key] = replica
        elif replica.state is ReplicaState.STOPPING:
            leaving.append(key)
    seen = sorted(sight.by_job.get(job.id, ()))
    stale = tuple(k for k in seen if k not in desired and k not in leaving and sight.alive(k))
    ended = tuple(k for k in seen if k not in desired and k in sight.replicas and not sight.alive(k))
    actions: list[Action] = []
    if stale:
        actions.append(Stop(stale, STALE_GRACE_MS))
    if ended:
        actions.append(Forget(ended))
    if released := tuple(k for k in leaving if sight.alive(k)):
        actions.append(Stop(released, job.spec.checkpoint.grace))
    if job.phase is Phase.STOPPING:
        if alive := tuple(k for k in desired if sight.alive(k)):
            actions.append(Stop(alive, stop_grace_ms(job)))
        return actions
    occupied = {_place_of(k) for k in stale}
    starts = tuple(
        make_launch(cluster, job, replica, addresses)
        for key, replica in desired.items()
        if replica.state is ReplicaState.BOUND
        and key not in sight.replicas
        and replica.not_before_ms <= now_ms
        and _place_of(key) not in occupied
        and now_ms - sight.ordered_at_ms.get(key, -START_AGAIN_MS) >= START_AGAIN_MS
    )
    if starts:
        actions.append(Start(starts))
    if job.suspected_since_ms:
        keys = tuple(k for k in desired if sight.alive(k) and not sight.replicas[k].stacks)
        if keys:
            actions.append(AskStacks(keys))
    return actions


def _place_of(key: LaunchKey) -> str:
    """`role/index` of a launch key: the place in the gang that it occupies."""
    _, _, role, index, _ = key.split("/")
    return f"{role}/{index}"


def stop_grace_ms(job: Job) -> int:
    """How long an attempt's replicas may take to save before they are ended."""
    outcome = job.outcome
    assert outcome is not None
    if outcome.cause is not None and outcome.cause.failure_class is FailureClass.HANG:
        return HANG_GRACE_MS
    if outcome.reason is Reason.CANCELLED:
        return min(job.spec.checkpoint.grace, CANCEL_GRACE_MS)
    return job.spec.checkpoint.grace


def make_launch(cluster: Cluster, job: Job, replica: Replica, addresses: Addresses) -> Launch:
    """The complete order to start one replica."""
    spec, role = job.spec, job.spec.roles[replica.role]
    binding = replica.binding
    assert binding is not None
    command = ("/bin/sh", "-c", role.command) if isinstance(role.command, str) else role.command
    environment = {k: v for k, v in {**spec.env, **role.env}.items() if v is not None}
    named = dict(zip(role.ports, binding.ports[1:], strict=False)) if binding.ports else dict(role.ports)
    return Launch(
        key=launch_key(job.id, job.attempt, replica.role, replica.index, replica.restart),
        job_name=job.name,
        node=binding.node,
        command=command,
        contract=_contract(cluster, job, replica, addresses, named),
        env=environment,
        working_dir=role.working_dir or spec.working_dir,
        image=role.image or spec.image,
        cpu_milli=role.cpu,
        memory_bytes=role.memory,
        gpus=binding.gpus,
        ports=binding.ports,
        stop_signal=spec.checkpoint.signal,
        preload=role.preload,
        keep_ms=spec.keep_after_finish,
        clean_up=spec.clean_up,
        pod=both(spec.kubernetes.pod, role.kubernetes.pod),
    )


PEER_PORT = 2222
"""Port of a replica with an address of its own (TFJob's default); its coordinator uses the next."""


def _contract(
    cluster: Cluster, job: Job, replica: Replica, addresses: Addresses, named: dict[str, int]
) -> ReplicaEnv:
    spec = job.spec
    rank = ranks(job)
    placed = {rid: r for rid, r in job.replicas.items() if r.binding is not None}
    peers: dict[str, tuple[str, ...]] = {}
    for name, role in spec.roles.items():
        top = max([role.replicas.max, *(r.index + 1 for r in placed.values() if r.role == name)])
        peers[name] = tuple(_address(cluster, job, placed.get(replica_id(name, i)), addresses) for i in range(top))
    node_of: dict[ReplicaId, NodeName] = {rid: r.binding.node for rid, r in placed.items() if r.binding}
    nodes = list(dict.fromkeys(node_of[rid] for rid in rank))
    here = node_of[replica.id]
    mates = [rid for rid in rank if node_of[rid] == here]
    own = spec.roles[replica.role]
    first = next(iter(rank), None)
    coordinator = ""
    if first is not None:
        host = addresses.host(cluster, job, placed[first])
        coordinator = f"{host}:{job.coordinator_port or PEER_PORT + 1}"
    return ReplicaEnv(
        job_id=job.id,
        job_name=job.name,
        attempt=job.attempt,
        role=replica.role,
        index=replica.index,
        restart=replica.restart,
        rank=rank.get(replica.id, -1),
        local_rank=mates.index(replica.id) if replica.id in mates else 0,
        role_rank=sum(r.role == replica.role and r.index < replica.index for r in placed.values()),
        world_size=len(rank),
        local_world_size=max(1, len(mates)),
        role_world_size=sum(r.role == replica.role for r in placed.values()),
        node=here,
        node_rank=nodes.index(here) if here in nodes else 0,
        procs=own.procs,
        coordinator=coordinator,
        peers=peers,
        ports=named,
        min_replicas=own.replicas.min,
        max_replicas=own.replicas.max,
        elastic=own.replicas.elastic,
        sparse=any(r.replicas.elastic for n, r in spec.roles.items() if n in training_roles(spec)),
        in_place=restart_scope(spec, replica.role) is RestartScope.REPLICA,
        checkpoint_dir=_checkpoint_dir(job, addresses),
        checkpoint_signal=spec.checkpoint.signal,
        threads=max(1, own.cpu // 1_000),
        grace_ms=spec.checkpoint.grace,
        checkpoint_interval_ms=spec.checkpoint.interval,
        array_index=job.array_index,
        gpu_count=len(binding.gpus) if (binding := replica.binding) else 0,
        gpu_shared=own.gpu is not None and own.gpu.milli < WHOLE_GPU,
    )


def _address(cluster: Cluster, job: Job, replica: Replica | None, addresses: Addresses) -> str:
    """ "host:port" of a peer; empty while it has no place."""
    if replica is None or replica.binding is None:
        return ""
    ports = replica.binding.ports
    return f"{addresses.host(cluster, job, replica)}:{ports[0] if ports else PEER_PORT}"


def _checkpoint_dir(job: Job, addresses: Addresses) -> str:
    wanted = job.spec.checkpoint.dir
    if wanted and (wanted.startswith("/") or "://" in wanted):
        return wanted
    if wanted:
        return f"{job.spec.working_dir}/{wanted}" if job.spec.working_dir else wanted
    return f"{addresses.checkpoint_root}/{job.id}" if addresses.checkpoint_root else ""


