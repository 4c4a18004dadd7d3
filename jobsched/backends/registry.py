"""Backends by name: from a server's configuration to the object. Used by `wiring`; the only module that knows them all.

Engines with heavy libraries are imported when they are asked for, never before.
"""

from __future__ import annotations

import importlib
import zlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from jobsched.errors import MissingExtra
from jobsched.ports import Backend
from jobsched.spec.backends import BackendConfig, DockerBackend, KubernetesBackend, LocalBackend, RayBackend


def make_backend(config: BackendConfig, home: Path) -> Backend:
    """The backend that the configuration asks for. BackendUnreachable when its engine is."""
    if config.docker is not None:
        return make_docker(config.docker, home)
    if config.kubernetes is not None:
        return make_kubernetes(config.kubernetes, home)
    if config.ray is not None:
        return make_ray(config.ray, home)
    return make_local(config.local, home)


def make_local(config: LocalBackend, home: Path) -> Backend:
    from jobsched.backends import local, local_nodes
    from jobsched.backends.supervisor.protocol import Settings

    groups = [
        local_nodes.VirtualGroup(
            count=nodes.count, name_prefix=nodes.name_prefix, cpu_milli=nodes.cpu, memory_bytes=nodes.memory,
            gpus=tuple((stock.kind, stock.count) for stock in nodes.gpus), gpu_memory_bytes=nodes.gpu_memory,
            labels=tuple(nodes.labels.items()), taints=nodes.taints,
        )
        for nodes in config.virtual_nodes
    ]
    first, last = config.ports.first, config.ports.last
    skew = zlib.crc32(str(home).encode())  # two servers on one machine begin in different places
    source = (
        local_nodes.fixed(local_nodes.virtual_nodes(groups, first, last, skew)) if groups
        else local_nodes.Machine(port_lo=first, port_hi=last, port_from=first + skew % (last - first + 1))
    )
    settings = Settings(log_bytes=config.logs.size * (config.logs.rotations + 1), limits=config.limits)
    return local.LocalBackend(home, source, settings=settings, warm=config.preload)


def make_docker(config: DockerBackend, home: Path) -> Backend:
    load_engine("docker", "docker")
    from jobsched.backends import docker

    return docker.DockerBackend(home, config)


def make_kubernetes(config: KubernetesBackend, home: Path) -> Backend:
    load_engine("kubernetes.config", "kubernetes")
    from jobsched.backends import kubernetes

    return kubernetes.KubernetesBackend(home, config)


def make_ray(config: RayBackend, home: Path) -> Backend:
    if find_spec("ray") is None:  # not imported here: a driver of its own does that, in a process of its own
        raise _missing("ray", "ray")
    from jobsched.backends import ray

    return ray.RayBackend(home, config)


def load_engine(module: str, extra: str) -> ModuleType:
    """An engine's client library. MissingExtra, with the line to install it, when it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise _missing(module, extra) from error


def _missing(module: str, extra: str) -> MissingExtra:
    package = module.split(".")[0]
    return MissingExtra(f"the {extra} backend needs the package {package!r}", hint=f'pip install "jobsched[{extra}]"')
