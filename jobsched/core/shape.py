"""Shapes: what placement needs to know of a job, computed once from its spec. Jobs of equal shape fit alike."""

from __future__ import annotations

from jobsched.core.job import Job, RoleShape, Shape
from jobsched.core.resources import WHOLE_GPU, Resources
from jobsched.spec.job import JobSpec, RoleSpec, training_roles


def shape_of(spec: JobSpec, wanted: dict[str, int] | None = None) -> Shape:
    """The shape of a spec; `wanted` overrides preferred counts of elastic roles. Serving roles (ps) come last, so that
    scarce GPUs are looked for first."""
    trains = training_roles(spec)
    names = [*trains, *(name for name in spec.roles if name not in trains)]
    return Shape(
        roles=tuple(_role_shape(name, spec.roles[name], (wanted or {}).get(name)) for name in names),
        within=spec.placement.within,
        prefer=spec.placement.prefer,
        spread=spec.placement.spread,
        node_labels=tuple(sorted(spec.placement.nodes.items())),
        tolerate=tuple(sorted(spec.placement.tolerate)),
        avoid=tuple(sorted(spec.placement.avoid)),
        elastic=any(role.replicas.elastic for role in spec.roles.values()),
    )


def shape_of_job(job: Job) -> Shape:
    return shape_of(job.spec, dict(job.wanted))


def sized_roles(spec: JobSpec) -> tuple[str, str]:
    """The roles whose numbers `policies.elasticity` decides together: the first training role with a range, or, where
    only the servers have one, the first, those with whole GPUs before those with shares, and these before those without
    any; and `ps`, "" where there is none. Both "": nothing of the job is elastic."""
    gpus = {name: gpu.milli if (gpu := spec.roles[name].gpu) is not None else 0 for name in training_roles(spec)}
    trains = sorted(gpus, key=lambda name: -min(gpus[name], WHOLE_GPU))
    elastic = [name for name in trains if spec.roles[name].replicas.elastic]
    servers = "ps" if "ps" in spec.roles else ""
    if elastic:
        return elastic[0], servers
    return (trains[0], servers) if trains and servers and spec.roles[servers].replicas.elastic else ("", "")


def role_resources(role: RoleSpec) -> Resources:
    """What one replica of the role takes from its node."""
    return Resources(role.cpu, role.memory, role.gpu.milli if role.gpu else 0)


def _role_shape(name: str, role: RoleSpec, wanted: int | None) -> RoleShape:
    gpu = role.gpu
    prefer = wanted if wanted is not None else role.replicas.prefer
    return RoleShape(
        role=name,
        min=min(role.replicas.min, prefer),
        prefer=prefer,
        cpu_milli=role.cpu,
        memory_bytes=role.memory,
        gpu_milli=gpu.milli if gpu else 0,
        gpu_kinds=tuple(k.lower() for k in gpu.kinds) if gpu else (),
        gpu_memory_min_bytes=gpu.memory_min_bytes if gpu else 0,
        gpu_memory_max_bytes=gpu.memory_max_bytes if gpu else 0,
        ports=1 + len(role.ports),
    )
