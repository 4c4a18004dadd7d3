"""What would let a waiting job start sooner: the same request with one thing changed, tried on the cluster as it is.

Asked by `why`. Read-only; a handful of placements per answer, whatever the size of the cluster. When changes help that
do not help at once, `core.forecast` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jobsched.core.cluster import Cluster
from jobsched.core.explain import could_ever_fit
from jobsched.core.job import Job, Shape
from jobsched.core.node import kind_matches
from jobsched.core.policies.admission import admit
from jobsched.core.policies.backfill import Guard, in_the_way
from jobsched.core.policies.placement import Gang, place_gang
from jobsched.core.resources import WHOLE_GPU, JobId
from jobsched.core.values import changed
from jobsched.spec.gpu import GpuRequest
from jobsched.spec.job import JobSpec, Replicas, RoleSpec

NOBODY = JobId("")
QUEUES_TRIED = 8
KINDS_TRIED = 8
LATER_TRIED = 2
"""Kinds and queues that are thought of for later."""


def starts_now(cluster: Cluster, job: Job, spec: JobSpec, now_ms: int) -> bool:
    """Whether the job could start this very moment, were it written like `spec`. O(one placement)."""
    probe = changed(job, id=NOBODY, spec=spec, wanted={})
    promised = [claim for claim in cluster.reservations.values() if claim.job_id != job.id]
    claims = in_the_way(cluster, probe, (-probe.priority, 0, 0, ""), promised, now_ms)
    if any(claim.limits(probe) for claim in claims):
        return False
    with cluster.trial():
        Guard(cluster).keep(claims)
        shape = admit(cluster, probe, now_ms)
        return isinstance(shape, Shape) and isinstance(place_gang(cluster, shape, job.avoid), Gang)


def sooner(cluster: Cluster, job: Job, now_ms: int) -> tuple[str, ...]:
    """Changes with which it would start now, in words: the least painful of each sort."""

    def now(spec: JobSpec) -> bool:
        return starts_now(cluster, job, spec, now_ms)

    return tuple(f"{text}: now" for text in (
        *_other_queues(cluster, job.spec, now), *_anywhere(job.spec, now), *_other_kinds(cluster, job.spec, now),
        *_smaller(job.spec, now), *_split(job.spec, now),
    ))  # fmt: skip


def later(cluster: Cluster, job: Job) -> tuple[tuple[str, Job], ...]:
    """The job with one thing changed, for a forecast each: other kinds of GPU and other queues that can hold it, half
    the gang or half the GPUs of a lone replica."""
    spec, found = job.spec, list[tuple[str, JobSpec]]()
    hungriest = _hungriest(spec)
    if hungriest is not None:
        name, role = hungriest
        assert role.gpu is not None
        for kind in _kinds_besides(cluster, role.gpu)[:LATER_TRIED]:
            other = _with(spec, name, gpu=_gpu(role.gpu, kinds=(kind,)))
            found.append((f"{kind} instead of {_kinds(role.gpu)}", other))
        half = (_parts(role) + 1) // 2
        if half < _parts(role):
            found.append((_fewer(half, name, role), _shrunk(spec, name, half)))
    for queue in _queues_besides(cluster, spec)[:LATER_TRIED]:
        found.append((f"queue {queue} instead of {spec.queue}", spec.model_copy(update={"queue": queue})))
    return tuple(
        (text, changed(job, spec=other, wanted={})) for text, other in found if not could_ever_fit(cluster, other)
    )


def _hungriest(spec: JobSpec) -> tuple[str, RoleSpec] | None:
    """The role that asks for most GPUs; None: no role asks for any."""
    sizes = {name: role.replicas.min * role.gpu.milli for name, role in spec.roles.items() if role.gpu}
    if not sizes:
        return None
    name = max(sizes, key=lambda each: sizes[each])
    return name, spec.roles[name]


def _with(spec: JobSpec, name: str, **fields: object) -> JobSpec:
    return spec.model_copy(update={"roles": {**spec.roles, name: spec.roles[name].model_copy(update=fields)}})


def _fixed(count: int) -> Replicas:
    return Replicas(min=count, max=count, prefer=count)


def _gpu(request: GpuRequest, **fields: object) -> GpuRequest:
    return request.model_copy(update=fields)


def _other_queues(cluster: Cluster, spec: JobSpec, now: Callable[[JobSpec], bool]) -> Iterator[str]:
    for name in _queues_besides(cluster, spec):
        if now(spec.model_copy(update={"queue": name})):
            yield f"queue {name} instead of {spec.queue}"
            return


def _queues_besides(cluster: Cluster, spec: JobSpec) -> list[str]:
    """Other queues that take jobs."""
    cohorts = {queue.cohort for queue in cluster.queues.values()}
    others = sorted(
        name for name, queue in cluster.queues.items()
        if name != spec.queue and name not in cohorts and not queue.paused and not queue.draining
    )  # fmt: skip
    return others[:QUEUES_TRIED]


def _anywhere(spec: JobSpec, now: Callable[[JobSpec], bool]) -> Iterator[str]:
    within, spread = spec.placement.within, spec.placement.spread
    if within and now(spec.model_copy(update={"placement": spec.placement.model_copy(update={"within": ""})})):
        yield f"not all within one {within}"
    if spread and now(spec.model_copy(update={"placement": spec.placement.model_copy(update={"spread": ""})})):
        yield f"not one replica per {spread}"


def _other_kinds(cluster: Cluster, spec: JobSpec, now: Callable[[JobSpec], bool]) -> Iterator[str]:
    hungriest = _hungriest(spec)
    if hungriest is None:
        return
    name, role = hungriest
    assert role.gpu is not None
    for kind in _kinds_besides(cluster, role.gpu):
        if now(_with(spec, name, gpu=_gpu(role.gpu, kinds=(kind,)))):
            yield f"{kind} instead of {_kinds(role.gpu)}"
            return


def _kinds_besides(cluster: Cluster, request: GpuRequest) -> list[str]:
    """Kinds of GPU that there are and that were not asked for."""
    others = dict.fromkeys(k for k, _ in cluster.ledger.classes() if not kind_matches(k, request.kinds))
    return list(others)[:KINDS_TRIED]


def _kinds(request: GpuRequest) -> str:
    return "|".join(request.kinds) or "any"


def _smaller(spec: JobSpec, now: Callable[[JobSpec], bool]) -> Iterator[str]:
    """The largest gang that would start, or of a lone replica, the most GPUs."""
    hungriest = _hungriest(spec)
    if hungriest is None:
        return
    name, role = hungriest
    most = _most(_parts(role), lambda count: now(_shrunk(spec, name, count)))
    if most:
        yield _fewer(most, name, role)


def _most(below: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, 0 if none does; found by halving the gap: whatever fits, less fits as well."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _parts(role: RoleSpec) -> int:
    """Into how many parts a role's request falls: its replicas, or of a lone replica, the GPUs."""
    assert role.gpu is not None
    return role.replicas.min if role.replicas.min > 1 else role.gpu.milli // WHOLE_GPU


def _shrunk(spec: JobSpec, name: str, count: int) -> JobSpec:
    """With so many of those parts."""
    role = spec.roles[name]
    assert role.gpu is not None
    if role.replicas.min > 1:
        return _with(spec, name, replicas=_fixed(count))
    return _with(spec, name, gpu=_gpu(role.gpu, milli=count * WHOLE_GPU))


def _fewer(count: int, name: str, role: RoleSpec) -> str:
    assert role.gpu is not None
    if role.replicas.min == 1:
        return f"{count} instead of {role.gpu.milli // WHOLE_GPU} GPUs"
    gpus = count * role.gpu.milli / WHOLE_GPU
    return f"{count} instead of {role.replicas.min} {name} replicas ({gpus:g} GPU{'s' if gpus != 1 else ''})"


def _split(spec: JobSpec, now: Callable[[JobSpec], bool]) -> Iterator[str]:
    """The same number of GPUs in more and smaller replicas."""
    hungriest = _hungriest(spec)
    if hungriest is None:
        return
    name, role = hungriest
    assert role.gpu is not None
    size = role.gpu.milli // WHOLE_GPU
    count = role.replicas.min
    while size % 2 == 0 and size > 1:
        size, count = size // 2, count * 2
        if now(_with(spec, name, replicas=_fixed(count), gpu=_gpu(role.gpu, milli=size * WHOLE_GPU))):
            parts = f"{count} × {size} GPU{'s' if size > 1 else ''}"
            yield f"{parts} instead of {role.replicas.min} × {role.gpu.milli // WHOLE_GPU}"
            return
