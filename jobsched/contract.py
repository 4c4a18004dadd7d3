"""The contract between jobsched and what runs inside a replica: `ReplicaEnv` <-> environment variables.

Written by `core.launch` through backends (`to_environ`), read by `jobsched.train.context` (`from_environ`) and by
people's unmodified scripts. Standard library only, because it is imported inside every training container.

Sources of the foreign variables: torchrun's `PET_*` and `RANK …` (torch.distributed.run), TFJob's `TF_CONFIG` dense and
sparse forms, ps-lite's `DMLC_*`, PyTorchJob's `MASTER_*`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:

    def value(*, frozen, slots):
        """Guarded by mypy alone, as in `core.values`: at run time each field would be ten times as dear to fill, for
        every launch."""
        return dataclass(slots=slots)


PREFIX = "JOBSCHED_"
CONTRACT_VARIABLE = "JOBSCHED_CONTRACT"
"""Holds the whole record as one line of JSON; the single source for `from_environ`."""

USER_WINS = (
    "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "WANDB_RUN_ID", "WANDB_RESUME",
    "WANDB_RUN_GROUP", "WANDB_NAME", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME",
)
"""Variables that the contract only sets where the user's own environment does not."""

SERVING_ROLES = ("ps", "evaluator")


@value(frozen=True, slots=True)
class ReplicaEnv:
    """Everything one replica needs to know about itself and its peers.

    `rank` counts training replicas (not ps, not evaluator) from 0, chief first; -1 for the others. `role_rank` is the
    rank within the role. `peers` maps role -> "host:port" per index up to the role's max; an index that has no place
    yet has an empty address. Of role ps it holds those of this attempt and no more. `coordinator` is "host:port" of
    rank 0, free for rank 0 to bind. `ports` are the named ports. `report` is the address for progress reports:
    `unix:PATH` (datagrams), `http(s)://…`, or `log:` (lines on stdout). Ranks are not stable across attempts; `index`
    and addresses are, within an attempt.
    """

    job_id: str
    job_name: str
    attempt: int
    role: str
    index: int
    restart: int = 0
    rank: int = -1
    local_rank: int = 0
    role_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    role_world_size: int = 1
    node: str = ""
    node_rank: int = 0
    procs: int = 1
    coordinator: str = ""
    peers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    min_replicas: int = 1
    max_replicas: int = 1
    elastic: bool = False
    """Replicas of its own role may come and go while it runs: min < max, and not ps."""
    sparse: bool = False
    """Some role of the job is elastic: TF_CONFIG takes its sparse form."""
    in_place: bool = False
    """Replicas of this role are restarted in place: the library should re-form instead of dying with its peers."""
    checkpoint_dir: str = ""
    checkpoint_signal: str = "USR1"
    scratch_dir: str = ""
    report: str = ""
    token: str = ""
    """Authorises this replica's reports."""
    secret: str = ""
    """Shared by all replicas of the job; peers show it to one another. Empty: the job's id alone must do."""
    array_index: int = -1
    gpu_count: int = 0
    gpu_shared: bool = False
    """Its GPU serves other replicas too: it has a share of it."""
    threads: int = 0
    """Threads that one process should use: OMP_NUM_THREADS where the user sets none; 0 leaves it alone."""
    deadline_ms: int = 0
    """Instant (ms since the epoch) at which the job's time limit ends it; 0: none."""
    checkpoint_interval_ms: int = 0
    """How often the job wants to save; 0: the library's own default."""
    grace_ms: int = 30_000
    """Longest time between the request for a checkpoint and the stop."""

    @property
    def address(self) -> str:
        """This replica's own "host:port", the one its peers know."""
        return self.peers[self.role][self.index]

    @property
    def peer_token(self) -> str:
        """What a message between replicas must carry, so that a stray process of another job is turned away."""
        return f"{self.job_id}:{self.secret}"

    @property
    def launch_key(self) -> str:
        return f"{self.job_id}/{self.attempt}/{self.role}/{self.index}/{self.restart}"


def to_environ(env: ReplicaEnv, user: Mapping[str, str]) -> dict[str, str]:
    """The user's variables plus the contract's; where both name one, `USER_WINS` decides.

    GPU visibility is the backend's.
    """
    host, _, port = env.coordinator.rpartition(":")
    ours = {
        CONTRACT_VARIABLE: json.dumps(asdict(env), separators=(",", ":")),
        "JOBSCHED_JOB_ID": env.job_id,
        "JOBSCHED_JOB_NAME": env.job_name,
        "JOBSCHED_ATTEMPT": str(env.attempt),
        "JOBSCHED_RESTART": str(env.restart),
        "JOBSCHED_ROLE": env.role,
        "JOBSCHED_INDEX": str(env.index),
        "JOBSCHED_NODE": env.node,
        "JOBSCHED_CHECKPOINT_DIR": env.checkpoint_dir,
        "JOBSCHED_SCRATCH_DIR": env.scratch_dir,
        "PYTHONUNBUFFERED": "1",
        "TF_CONFIG": json.dumps(tf_config(env), separators=(",", ":")),
        "WANDB_RUN_ID": env.job_id,
        "WANDB_RESUME": "allow",
        "WANDB_RUN_GROUP": env.job_name,
        "WANDB_NAME": env.job_name,
        "MLFLOW_RUN_ID": env.job_id,
        "MLFLOW_EXPERIMENT_NAME": env.job_name,
    }
    for name, number in env.ports.items():
        ours[f"JOBSCHED_PORT_{name.upper()}"] = str(number)
    if env.array_index >= 0:
        ours["JOBSCHED_ARRAY_INDEX"] = str(env.array_index)
    if env.threads:
        ours["OMP_NUM_THREADS"] = str(env.threads)
    if env.coordinator:
        ours |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    if env.rank >= 0:
        ours |= {
            "RANK": str(env.rank),
            # Its GPUs are pinned, so a replica that has some is a node of its own: LOCAL_RANK must be a GPU it can see.
            "LOCAL_RANK": "0" if env.gpu_count else str(env.local_rank),
            "WORLD_SIZE": str(env.world_size * env.procs),
            "LOCAL_WORLD_SIZE": str(env.procs if env.gpu_count else env.local_world_size),
            "ROLE_RANK": str(env.role_rank),
            "ROLE_WORLD_SIZE": str(env.role_world_size),
            "GROUP_RANK": str(env.rank if env.gpu_count else env.node_rank),
        }
        ours |= torchrun_environ(env, host, port)
    ours |= dmlc_environ(env)
    return {**user, **{k: v for k, v in ours.items() if not (k in USER_WINS and k in user)}}


def from_environ(environ: Mapping[str, str]) -> ReplicaEnv | None:
    """The record that `to_environ` wrote; None outside a jobsched replica."""
    text = environ.get(CONTRACT_VARIABLE)
    if not text:
        return None
    data = json.loads(text)
    data["peers"] = {role: tuple(addresses) for role, addresses in data["peers"].items()}
    known = ReplicaEnv.__dataclass_fields__
    return ReplicaEnv(**{k: v for k, v in data.items() if k in known})


def tf_config(env: ReplicaEnv) -> dict[str, object]:
    """TF_CONFIG: dense (every declared type is listed), or sparse when a role is elastic: a worker sees every ps and
    itself, a ps only itself.

    `cluster` keeps the index of a lone task (`{"1": "host:port"}`), which TensorFlow reads; `sparseCluster` is the
    form that TFJob's dynamic workers read.
    """
    task = {"type": env.role, "index": env.index}
    if not env.sparse:
        return {
            "cluster": {role: list(addresses) for role, addresses in env.peers.items()},
            "task": task,
            "environment": "cloud",
        }
    own = {str(env.index): env.address}
    servers = list(env.peers.get("ps", ())) if env.role == "worker" else [env.address] if env.role == "ps" else []
    return {
        "cluster": ({"ps": servers} if env.role == "worker" and servers else {}) | {env.role: own},
        "sparseCluster": {"worker": own if env.role == "worker" else {}, "ps": servers},
        "task": task,
        "environment": "cloud",
    }


def torchrun_environ(env: ReplicaEnv, host: str, port: str) -> dict[str, str]:
    """PET_*: what `torchrun SCRIPT` without options reads. Elastic roles get a c10d rendezvous, others a static one."""
    ours = {"PET_NPROC_PER_NODE": str(env.procs), "PET_NODE_RANK": str(env.rank)}
    if env.elastic:
        return ours | {
            "PET_NNODES": f"{env.min_replicas}:{env.max_replicas}",
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": env.coordinator,
            "PET_RDZV_ID": f"{env.job_id}-{env.attempt}",
        }
    return ours | {"PET_NNODES": str(env.world_size), "PET_MASTER_ADDR": host, "PET_MASTER_PORT": port}


def dmlc_environ(env: ReplicaEnv) -> dict[str, str]:
    """ps-lite's variables, for jobs with parameter servers; its scheduler is the job's coordinator address."""
    servers = env.peers.get("ps", ())
    if not servers:
        return {}
    host, _, port = (env.coordinator or servers[0]).rpartition(":")
    return {
        "DMLC_ROLE": {"ps": "server", "scheduler": "scheduler"}.get(env.role, "worker"),
        "DMLC_PS_ROOT_URI": host,
        "DMLC_PS_ROOT_PORT": port,
        "DMLC_NUM_SERVER": str(len(servers)),
        "DMLC_NUM_WORKER": str(env.world_size),
    }
