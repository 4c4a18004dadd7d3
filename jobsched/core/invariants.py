"""What must hold of every cluster state, whatever happened; checked by tests, the simulator and `debug verify`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from jobsched.core.cluster import Cluster, shrinks_anew
from jobsched.core.job import Job, Phase
from jobsched.core.resources import WHOLE_GPU, GpuId, JobId, NodeName
from jobsched.core.shape import role_resources
from jobsched.spec.queue import GPUS


def check(cluster: Cluster) -> tuple[str, ...]:
    """Sentences about what is broken; empty when all holds. O(live jobs + nodes)."""
    return tuple(_problems(cluster))


def check_part(cluster: Cluster, job_ids: Iterable[JobId], names: Iterable[NodeName]) -> tuple[str, ...]:
    """The same of these jobs and nodes only. O(their replicas)."""
    return tuple(_part(cluster, job_ids, names))


def _part(cluster: Cluster, job_ids: Iterable[JobId], names: Iterable[NodeName]) -> Iterator[str]:
    nodes = dict.fromkeys(names)
    for job_id in job_ids:
        job = cluster.jobs.get(job_id)
        if job is None:
            continue
        yield from _job_problems(job)
        for replica in job.replicas.values():
            if replica.binding is not None:
                nodes[replica.binding.node] = None
                if (job.id, replica.id) not in cluster.fleet.on_node.get(replica.binding.node, {}):
                    yield f"{replica.id} of job {job.id} is not known on {replica.binding.node}"
    for name in nodes:
        space = cluster.ledger.spaces.get(name)
        if space is None:
            continue
        used: dict[GpuId, int] = {}
        for (job_id, rid), (binding, _) in cluster.fleet.on_node.get(name, {}).items():
            owner = cluster.jobs.get(job_id)
            if owner is None or rid not in owner.replicas or owner.replicas[rid].binding != binding:
                yield f"{name} is booked with {rid} of job {job_id}, which is not there"
            for share in binding.gpus:
                used[share.gpu] = used.get(share.gpu, 0) + share.milli
        for binding, _ in cluster.ledger.decided():
            for share in binding.gpus if binding.node == name else ():
                used[share.gpu] = used.get(share.gpu, 0) + share.milli
        for gpu, free in space.gpu_free.items():
            taken, foreign = used.get(gpu, 0), sum(s.milli for s in space.node.foreign_gpus if s.gpu == gpu)
            if taken > WHOLE_GPU or free != max(0, WHOLE_GPU - foreign) - taken:
                yield f"{taken} thousandths of {gpu} on {name} are bound, the ledger says that {free} are free"


def _problems(cluster: Cluster) -> Iterator[str]:
    gpu_used: dict[tuple[NodeName, GpuId], int] = {}
    cpu_used: dict[NodeName, int] = {}
    ports: dict[tuple[NodeName, int], str] = {}
    queue_gpu: dict[str, int] = {}
    for job in cluster.jobs.values():
        yield from _job_problems(job)
        for replica in job.replicas.values():
            binding = replica.binding
            if binding is None:
                continue
            who = f"{job.id}/{replica.id}"
            cpu_milli = role_resources(job.spec.roles[replica.role]).cpu_milli
            cpu_used[binding.node] = cpu_used.get(binding.node, 0) + cpu_milli
            for share in binding.gpus:
                slot = (binding.node, share.gpu)
                gpu_used[slot] = gpu_used.get(slot, 0) + share.milli
                queue_gpu[job.spec.queue] = queue_gpu.get(job.spec.queue, 0) + share.milli
            for port in binding.ports:
                if (binding.node, port) in ports:
                    yield f"port {port} of {binding.node} is bound twice: {ports[binding.node, port]} and {who}"
                ports[binding.node, port] = who
    for binding, shape in cluster.ledger.decided():
        cpu_used[binding.node] = cpu_used.get(binding.node, 0) + shape.cpu_milli
        for share in binding.gpus:
            gpu_used[binding.node, share.gpu] = gpu_used.get((binding.node, share.gpu), 0) + share.milli
    for (node, gpu), milli in gpu_used.items():
        if milli > WHOLE_GPU:
            yield f"gpu {gpu} of {node} is bound {milli / WHOLE_GPU:g} times"
    for name, space in cluster.ledger.spaces.items():
        for gpu, free in space.gpu_free.items():
            foreign = sum(s.milli for s in space.node.foreign_gpus if s.gpu == gpu)
            if free != max(0, WHOLE_GPU - foreign) - gpu_used.get((name, gpu), 0):
                yield f"the ledger says {free} thousandths of {gpu} on {name} are free, which does not add up"
        expected = space.node.cpu_milli - space.node.foreign.cpu_milli - cpu_used.get(name, 0)
        if space.cpu_milli != expected:
            yield f"the ledger says {space.cpu_milli} milli-CPUs of {name} are free, it should be {expected}"
    for stock in cluster.ledger.stocks():
        there = [space for space in cluster.ledger.spaces.values() if stock.of(space.node)]
        if stock.free_milli != sum(sum(space.gpu_free.values()) for space in there):
            yield f"the ledger says {stock.free_milli} thousandths of GPUs are free on nodes with {stock.labels}"
    yield from _quota_problems(cluster, queue_gpu)
    for job_id, leavers in cluster.nominated.items():
        claimant = cluster.jobs.get(job_id)
        if claimant is None or not (claimant.phase is Phase.QUEUED or shrinks_anew(claimant)):
            yield f"room is made for job {job_id}, which does not wait"
        if not leavers.keys() <= cluster.leaving.keys():
            yield f"who makes room for job {job_id} is not leaving"
    waiting = [place.job_id for line in cluster.lines.values() for place in line.places]
    if len(waiting) != len(set(waiting)):
        yield "a job waits in two lines"
    for job_id in waiting:
        waiter = cluster.jobs.get(job_id)
        if waiter is None or waiter.phase is not Phase.QUEUED:
            yield f"job {job_id} waits in a line but is not queued"


def _quota_problems(cluster: Cluster, queue_gpu: Mapping[str, int]) -> Iterator[str]:
    """Cohort sums: every account holds what its own jobs and its members hold, and uses what members do not keep."""
    accounts = cluster.quotas.accounts
    for name, account in accounts.items():
        members = [a for a in accounts.values() if a.parent is account]
        gpus = queue_gpu.get(name, 0) + sum(a.held.get(GPUS, 0) for a in members)
        if account.held.get(GPUS, 0) != gpus:
            yield f"queue {name} is booked with {account.held.get(GPUS, 0)} milli-GPUs but holds {gpus}"
        holds = cluster.quotas.holds(name)
        for key in account.root.nominal:
            above = sum(max(0, a.used.get(key, 0) - a.kept.get(key, 0)) for a in members)
            own = sum(amount for r, amount in holds.items() if key in cluster.quotas.limits(account.root, r))
            if account.used.get(key, 0) != above + own:
                yield f"cohort sum of {key} in {name} is {account.used.get(key, 0)}, it should be {above + own}"


def _job_problems(job: Job) -> Iterator[str]:
    if job.phase.terminal:
        yield f"ended job {job.id} is still in memory"
    if job.phase is Phase.QUEUED and job.replicas:
        yield f"queued job {job.id} has replicas"
    if job.phase.active and not job.replicas:
        yield f"active job {job.id} has no replicas"
    if (job.phase is Phase.STOPPING) != (job.outcome is not None):
        yield f"job {job.id} is {job.phase} but its outcome is {job.outcome}"
    if job.phase is Phase.STARTING:
        for name, role in job.spec.roles.items():
            if sum(r.role == name for r in job.replicas.values()) < min(role.replicas.min, job.wanted_count(name)):
                yield f"gang of job {job.id} was placed below the minimum of role {name}"
