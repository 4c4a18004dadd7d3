"""Launches: the complete, backend-neutral order to start one replica. Pure; used by converge and by every backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import NewType

from jobsched.contract import ReplicaEnv
from jobsched.core.resources import GpuShare, JobId, NodeName
from jobsched.core.values import dataclass
from jobsched.spec.pod import PodOverlay

LaunchKey = NewType("LaunchKey", str)
"""`job/attempt/role/index/restart`: the same key is never started twice."""


@dataclass(frozen=True, slots=True)
class KeyParts:
    job_id: JobId
    attempt: int
    role: str
    index: int
    restart: int


def launch_key(job_id: JobId, attempt: int, role: str, index: int, restart: int) -> LaunchKey:
    return LaunchKey(f"{job_id}/{attempt}/{role}/{index}/{restart}")


def parse_key(key: LaunchKey) -> KeyParts:
    """Inverse of `launch_key`; ValueError for anything else."""
    job_id, attempt, role, index, restart = key.split("/")
    return KeyParts(JobId(job_id), int(attempt), role, int(index), int(restart))


def own_key(text: str) -> LaunchKey | None:
    """The key that an engine tells of; None for what is none of ours (for example a foreign label on a container)."""
    key = LaunchKey(text)
    try:
        parse_key(key)
    except ValueError:
        return None
    return key


@dataclass(frozen=True, slots=True)
class Launch:
    """Start this replica on this node with these GPUs.

    `command` is argv (a string command is already wrapped as `/bin/sh -c`). `env` holds the user's variables with
    `secret://NAME` values still unresolved: the backend resolves them at the last moment. `contract` is rendered by
    `contract.to_environ` after `env`, so the user's own values win only where the contract says so.
    `stop_signal` asks for a checkpoint; `preload` names modules of a warm interpreter, a pure optimisation.
    """

    key: LaunchKey
    job_name: str
    node: NodeName
    command: tuple[str, ...]
    contract: ReplicaEnv
    env: Mapping[str, str] = field(default_factory=dict)
    working_dir: str = ""
    image: str = ""
    cpu_milli: int = 0
    memory_bytes: int = 0
    gpus: tuple[GpuShare, ...] = ()
    ports: tuple[int, ...] = ()
    """Every port the replica may bind, `Binding.ports`."""
    stop_signal: str = "USR1"
    preload: tuple[str, ...] = ()
    keep_ms: int = 0
    """How long logs are kept after the end."""
    clean_up: str = "all"
    """Whose container and scratch files go at the end: all; running: only of those that had to be stopped; none."""
    pod: PodOverlay = field(default_factory=dict)
    """Parts of a pod that the job wants otherwise; read where replicas are pods."""


@dataclass(frozen=True, slots=True)
class Start:
    """Action: start these launches, a gang or a part of one."""

    launches: tuple[Launch, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Action: stop these replicas: checkpoint signal, SIGTERM at the acknowledgement or after `grace_ms`, SIGKILL."""

    keys: tuple[LaunchKey, ...]
    grace_ms: int


@dataclass(frozen=True, slots=True)
class AskStacks:
    """Action: capture the stacks of these replicas into their logs and the next observation."""

    keys: tuple[LaunchKey, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """Action: the end of these replicas is in the log; the engine may drop them."""

    keys: tuple[LaunchKey, ...]


Action = Start | Stop | AskStacks | Forget
