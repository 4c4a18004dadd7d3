"""Admission: passing quota. In which shape a job may start now as far as its queue goes, or which limit forbids it.

Asked by every step of a pass before it looks for places, and by `explain`. Looks at no node's free resources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from jobsched.core.cluster import Cluster
from jobsched.core.job import Binding, Job, Reason, RoleShape, Shape
from jobsched.core.policies.quota import Account, Refused, amounts_of
from jobsched.core.resources import WHOLE_GPU
from jobsched.spec.queue import CPU, GPUS, MEMORY


def admit(cluster: Cluster, job: Job, now_ms: int, least: bool = False) -> Shape | Refused:
    """The shape in which the job passes its queue's limits and its array's: as preferred, else at its minimum. Kinds
    of GPUs without quota left for the whole gang are taken out of it. `least`: at its minimum in any case."""
    queue = cluster.queues.get(job.spec.queue)
    if queue is None or queue.paused:
        return Refused(Reason.QUEUE_PAUSED, job.spec.queue)
    most = job.spec.array.max_parallel if job.array_id and job.spec.array else 0
    if most and cluster.quotas.arrays.get(job.array_id, 0) >= most:
        return Refused(Reason.ARRAY_LIMIT, job.spec.queue, limit=most)
    shape = cluster.shape(job)
    if least:
        shape = at_least(shape)
    if not cluster.quotas.account(queue.name).bounded:
        return shape
    found = _within(cluster, shape, queue.name, job.owner, now_ms)
    if isinstance(found, Shape) or all(role.prefer == role.min for role in shape.roles):
        return found
    return _within(cluster, at_least(shape), queue.name, job.owner, now_ms)


def at_least(shape: Shape) -> Shape:
    """The same gang at its minimum."""
    if all(role.prefer == role.min for role in shape.roles):
        return shape
    return replace(shape, roles=tuple(replace(role, prefer=role.min) for role in shape.roles))


def more(cluster: Cluster, job: Job, role: RoleShape, count: int, kind: str, now_ms: int) -> int:
    """How many of `count` further replicas of a running job pass its queue's limits, on GPUs of `kind`."""
    each = amounts_of(role, kind, role.gpu_milli)
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        needs = {resource: amount * middle for resource, amount in each}
        if cluster.quotas.refuses(job.spec.queue, job.owner, needs, now_ms) is None:
            low = middle
        else:
            high = middle - 1
    return low


def needs_of(shape: Shape) -> dict[str, int]:
    """What the whole gang takes, whatever the kind of its GPUs."""
    needs = {GPUS: 0, CPU: 0, MEMORY: 0}
    for role in shape.roles:
        needs[GPUS] += role.prefer * role.gpu_milli
        needs[CPU] += role.prefer * role.cpu_milli
        needs[MEMORY] += role.prefer * role.memory_bytes
    return needs


def least_needs(cluster: Cluster, account: Account, shape: Shape) -> dict[str, int]:
    """What a gang needs at its minimum of what its queue's tree limits; of GPU kinds, the one it likes best."""
    quotas, shape = cluster.quotas, at_least(shape)
    found: dict[str, int] = {}
    if not account.root.nominal:
        return found
    amounts = needs_of(shape)
    for role in shape.roles if quotas.limits_kinds(account.name) else ():
        best = next(iter(cluster.ledger.matching(role)), None) if role.gpu_milli else None
        if best is not None:
            amounts[best[0]] = amounts.get(best[0], 0) + role.min * role.gpu_milli
    for resource, amount in amounts.items():
        for key in quotas.limits(account.root, resource) if amount else ():
            found[key] = found.get(key, 0) + amount
    return found


def most_ever(cluster: Cluster, queue: str, shape: Shape) -> Refused | None:
    """The limit that keeps such a job from ever starting in a queue, even if nothing else ran; None: none does."""
    account, needs = cluster.quotas.account(queue), needs_of(at_least(shape))
    gpus = needs[GPUS]
    for each in account.path:
        if each.spec is not None and each.spec.max_gpus is not None and gpus > each.spec.max_gpus * WHOLE_GPU:
            return Refused(Reason.QUOTA_QUEUE, each.name, GPUS, gpus, limit=each.spec.max_gpus * WHOLE_GPU)
        if each.spec is not None and each.spec.budget is not None and gpus and not each.spec.budget.gpu_hours:
            return Refused(Reason.BUDGET, each.name, GPUS, gpus)
    per_user = account.spec.max_gpus_per_user if account.spec is not None else None
    if per_user is not None and gpus > per_user * WHOLE_GPU:
        return Refused(Reason.QUOTA_USER, queue, GPUS, gpus, limit=per_user * WHOLE_GPU)
    for key, amount in needs.items():
        if key in account.root.nominal and amount > account.ever(key):
            return Refused(Reason.QUOTA_QUEUE, queue, key, amount, limit=account.ever(key))
    return None


def limited(cluster: Cluster, job: Job, bindings: Iterable[Binding]) -> dict[str, int]:
    """What bindings of a job take of what its queue's tree limits."""
    root = cluster.quotas.account(job.spec.queue).root
    roles = cluster.shape(job).by_name
    found: dict[str, int] = {}
    for binding in bindings if root.nominal else ():
        for resource, amount in cluster.amounts(binding, roles[binding.role]):
            for key in cluster.quotas.limits(root, resource):
                found[key] = found.get(key, 0) + amount
    return found


def _within(cluster: Cluster, shape: Shape, queue: str, owner: str, now_ms: int) -> Shape | Refused:
    quotas = cluster.quotas
    refused = quotas.refuses(queue, owner, needs_of(shape), now_ms)
    if refused is not None:
        return refused
    if not quotas.limits_kinds(queue):
        return shape
    kinds = {role.role: _kinds(cluster, role) for role in shape.roles if role.gpu_milli}
    allowed: dict[str, Refused | None] = {}
    for kind in dict.fromkeys(kind for found in kinds.values() for kind in found):
        takes = sum(r.prefer * r.gpu_milli for r in shape.roles if kind in kinds.get(r.role, ()))
        allowed[kind] = quotas.refuses(queue, owner, {kind: takes}, now_ms)
    return _only(shape, kinds, allowed)


def _kinds(cluster: Cluster, role: RoleShape) -> tuple[str, ...]:
    """The kinds of GPUs that there are for a role, best first."""
    return tuple(dict.fromkeys(kind for kind, _ in cluster.ledger.matching(role)))


def _only(
    shape: Shape, kinds: Mapping[str, tuple[str, ...]], allowed: Mapping[str, Refused | None]
) -> Shape | Refused:
    """The shape on kinds that are not refused; the refusal of the best kind when a role is left without any."""
    if not any(allowed.values()):
        return shape
    roles = []
    for role in shape.roles:
        mine = kinds.get(role.role, ())
        left = tuple(kind for kind in mine if allowed[kind] is None)
        if mine and not left:
            refused = allowed[mine[0]]
            assert refused is not None
            return refused
        roles.append(role if len(left) == len(mine) else replace(role, gpu_kinds=left))
    return replace(shape, roles=tuple(roles))
