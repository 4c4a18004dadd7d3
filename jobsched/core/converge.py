"""Converge: desired minus seen, as actions. Pure; reaps orphans and stale attempts by the same rule as everything else.

A replica is desired when the log says BOUND or RUNNING in an attempt that starts or runs. Whatever else is alive is
stopped, whoever started it: that is why a crash anywhere needs no recovery path.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from jobsched.contract import ReplicaEnv
from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding, FailureClass, Job, Reason, Replica, ReplicaId, ReplicaState
from jobsched.core.judge import ranks
from jobsched.core.launch import Action, AskStacks, Forget, Launch, LaunchKey, Start, Stop, launch_key
from jobsched.core.observation import Sight
from jobsched.core.resources import WHOLE_GPU, JobId, NodeName
from jobsched.core.timers import START_AGAIN_MS
from jobsched.spec.job import SERVING_ROLES, RestartScope, RoleSpec, restart_scope
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
        node = cluster.fleet.nodes.get(replica.binding.node)
        return node.address if node is not None else ""


def converge(
    cluster: Cluster, sight: Sight, job_ids: Iterable[JobId], now_ms: int, addresses: Addresses
) -> list[Action]:
    """Actions for these jobs. Cost: their replicas and what the backend shows of them."""
    actions: list[Action] = []
    for job_id in job_ids:
        job = cluster.jobs.get(job_id)
        if job is not None and job.phase.active:
            actions += _job(cluster, sight, job, now_ms, addresses)
        elif known := sight.by_job.get(job_id):  # nothing of it should exist
            actions += _end(sight, sorted(known))
    return actions


def _end(sight: Sight, keys: Sequence[LaunchKey]) -> list[Action]:
    """Stop those that live at once; what has ended may be forgotten."""
    actions: list[Action] = []
    if alive := tuple([k for k in keys if sight.alive(k)]):
        actions.append(Stop(alive, STALE_GRACE_MS))
    if ended := tuple([k for k in keys if k in sight.replicas and not sight.alive(k)]):
        actions.append(Forget(ended))
    return actions


def _job(cluster: Cluster, sight: Sight, job: Job, now_ms: int, addresses: Addresses) -> list[Action]:
    actions: list[Action] = []
    desired: dict[LaunchKey, Replica] = {}
    leaving: list[LaunchKey] = []
    for replica in job.replicas.values():
        key = launch_key(job.id, job.attempt, replica.role, replica.index, replica.restart)
        if replica.state.desired:
            desired[key] = replica
        elif replica.state is ReplicaState.STOPPING:
            leaving.append(key)
    surplus = [k for k in sight.by_job.get(job.id, ()) if k not in desired and k not in leaving]
    if surplus:
        actions += _end(sight, sorted(surplus))
    if released := tuple([k for k in leaving if sight.alive(k)]) if leaving else ():
        actions.append(Stop(released, job.spec.checkpoint.grace))
    if job.outcome is not None:
        if alive := tuple([k for k in desired if sight.alive(k)]):
            actions.append(Stop(alive, stop_grace_ms(job)))
        return actions
    occupied = {_place_of(k) for k in surplus if sight.alive(k)} if surplus else ()
    starts = [
        (key, replica)
        for key, replica in desired.items()
        if replica.state is ReplicaState.BOUND
        and key not in sight.replicas
        and key not in sight.absent_at_ms  # it came and went: never the same key twice
        and replica.not_before_ms <= now_ms
        and not (occupied and _place_of(key) in occupied)
        and now_ms - sight.ordered_at_ms.get(key, -START_AGAIN_MS) >= START_AGAIN_MS
    ]
    if starts:
        gang = _Gang(cluster, job, addresses)
        actions.append(Start(tuple([gang.launch(key, replica) for key, replica in starts])))
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


PEER_PORT = 2222
"""Port of a replica with an address of its own (TFJob's default); its coordinator uses the next."""


class _Gang:
    """What the launches of one attempt have in common. O(replicas), and each launch O(1) but for the list of peers."""

    def __init__(self, cluster: Cluster, job: Job, addresses: Addresses) -> None:
        self._job = job
        self._checkpoint_dir = _checkpoint_dir(job, addresses)
        self._ranks = ranks(job)
        at: dict[str, dict[int, str]] = {name: {} for name in job.spec.roles}
        for r in job.replicas.values():
            if r.binding is not None:
                at[r.role][r.index] = f"{addresses.host(cluster, job, r)}:{_peer_port(r)}"
        self._held: dict[str, list[int]] = {}
        """Role -> indices that have a place, in order."""
        self._peers: dict[str, tuple[str, ...]] = {}
        for name, places in at.items():
            held = self._held[name] = sorted(places)
            top = held[-1] + 1 if held else 0
            if name != "ps":  # all servers of an attempt are there from its start
                top = max(top, job.spec.roles[name].replicas.max)
            self._peers[name] = tuple([places.get(index, "") for index in range(top)])  # empty while it has no place
        self._mates: dict[NodeName, list[ReplicaId]] = {}
        """Node -> those with a rank that are on it, by rank."""
        self._coordinator = ""
        for rid in self._ranks:
            replica = job.replicas[rid]
            binding = replica.binding
            if binding is not None:
                self._mates.setdefault(binding.node, []).append(rid)
                if not self._coordinator:
                    port = job.coordinator_port or PEER_PORT + 1
                    self._coordinator = f"{addresses.host(cluster, job, replica)}:{port}"
        self._nodes = {name: place for place, name in enumerate(self._mates)}
        roles = job.spec.roles.items()
        self._sparse = any(role.replicas.elastic for name, role in roles if name not in SERVING_ROLES)

    def launch(self, key: LaunchKey, replica: Replica) -> Launch:
        """The complete order to start one replica."""
        job, spec, role, binding = self._job, self._job.spec, self._job.spec.roles[replica.role], replica.binding
        assert binding is not None
        command = ("/bin/sh", "-c", role.command) if isinstance(role.command, str) else role.command
        named = dict(zip(role.ports, binding.ports[1:], strict=False)) if binding.ports else dict(role.ports)
        return Launch(
            key=key,
            job_name=job.name,
            node=binding.node,
            command=command,
            contract=self._contract(replica, binding, role, named),
            env={k: v for k, v in {**spec.env, **role.env}.items() if v is not None},
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

    def _contract(self, replica: Replica, binding: Binding, role: RoleSpec, named: dict[str, int]) -> ReplicaEnv:
        job, checkpoint, rid = self._job, self._job.spec.checkpoint, replica.id
        mates, held = self._mates.get(binding.node, []), self._held[replica.role]
        return ReplicaEnv(
            job_id=job.id,
            job_name=job.name,
            attempt=job.attempt,
            role=replica.role,
            index=replica.index,
            restart=replica.restart,
            rank=self._ranks.get(rid, -1),
            local_rank=mates.index(rid) if rid in self._ranks else 0,
            role_rank=bisect_left(held, replica.index),
            world_size=len(self._ranks),
            local_world_size=max(1, len(mates)),
            role_world_size=len(held),
            node=binding.node,
            node_rank=self._nodes.get(binding.node, 0),
            procs=role.procs,
            coordinator=self._coordinator,
            peers=self._peers,
            ports=named,
            min_replicas=role.replicas.min,
            max_replicas=role.replicas.max,
            elastic=role.replicas.elastic and replica.role != "ps",
            sparse=self._sparse,
            in_place=restart_scope(job.spec, replica.role) is RestartScope.REPLICA,
            checkpoint_dir=self._checkpoint_dir,
            checkpoint_signal=checkpoint.signal,
            threads=max(1, role.cpu // 1_000),
            grace_ms=checkpoint.grace,
            checkpoint_interval_ms=checkpoint.interval,
            array_index=job.array_index,
            gpu_count=len(binding.gpus),
            gpu_shared=role.gpu is not None and role.gpu.milli < WHOLE_GPU,
        )


def _peer_port(replica: Replica) -> int:
    return replica.binding.ports[0] if replica.binding is not None and replica.binding.ports else PEER_PORT


def _checkpoint_dir(job: Job, addresses: Addresses) -> str:
    wanted = job.spec.checkpoint.dir
    if wanted and (wanted.startswith("/") or "://" in wanted):
        return wanted
    if wanted:
        return f"{job.spec.working_dir}/{wanted}" if job.spec.working_dir else wanted
    return f"{addresses.checkpoint_root}/{job.id}" if addresses.checkpoint_root else ""
