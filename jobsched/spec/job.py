"""What users write: a training job and its roles, as frozen pydantic models.

`jobsched.load` builds these from YAML, JSON or a dict and turns every failure into a `Problem` with its place; the
API and the store carry `JobSpec.model_dump(mode="json")`, which reads back to an equal spec. Nothing here does I/O,
and nothing here decides: defaults are the ones of the field (TFJob, PyTorchJob, torchrun), named where they matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from jobsched.spec import quantity

NAME = re.compile(r"^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$")
ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")

DurationMs = Annotated[
    int,
    BeforeValidator(quantity.parse_duration_ms),
    PlainSerializer(quantity.format_duration, return_type=str, when_used="json"),
]
Bytes = Annotated[
    int,
    BeforeValidator(quantity.parse_bytes),
    PlainSerializer(quantity.format_bytes, return_type=str, when_used="json"),
]
CpuMilli = Annotated[
    int,
    BeforeValidator(quantity.parse_cpu_milli),
    PlainSerializer(quantity.format_cpu, return_type=str, when_used="json"),
]


def _name(value: str) -> str:
    if not NAME.match(value):
        raise ValueError(f"{value!r} is not a name; use lower-case letters, digits and '-', at most 52 of them")
    return value


def _check_names(value: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in value:
        if not ENV_NAME.match(name):
            raise ValueError(f"{name!r} is not a name; use letters, digits and '_'")
    return value


Name = Annotated[str, AfterValidator(_name)]
ExitCode = Annotated[int, Field(ge=1, le=255)]


class SpecModel(BaseModel):
    """Frozen, closed (unknown fields are errors), lists become tuples, defaults are documented in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class GpuRequest(SpecModel):
    """GPUs of one replica: kinds in order of preference, a range of memory, and how much, in thousandths of a GPU.

    Written `h100:8`, `any:1`, `any:0.5`, `24GB..:2` (memory range), `[h100:8, a100:8]`, `8`, or
    `{type: [h100, a100], memory: 24GB.., count: 8}`.
    """

    kinds: tuple[str, ...] = ()
    """GPU kinds that will do, best first; empty means any kind. `h100` also matches `h100-80gb`."""
    memory_min_bytes: Bytes = 0
    """Least memory of one GPU."""
    memory_max_bytes: Bytes = quantity.MAX_BYTES
    """Most memory of one GPU."""
    milli: Annotated[int, Field(ge=1, le=1_024_000)] = 1_000
    """Thousandths of a GPU; below 1000 a share of one GPU, else a whole number of GPUs times 1000."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        return parse_gpu(value)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.milli > 1_000 and self.milli % 1_000:
            raise ValueError(f"{self.milli / 1_000:g} GPUs: above 1 only whole GPUs can be asked for")
        if self.memory_min_bytes > self.memory_max_bytes:
            raise ValueError("the lower bound of GPU memory is above the upper bound")
        return self

    @property
    def count(self) -> int:
        """How many GPU devices one replica is given (a share counts as one)."""
        return max(1, self.milli // 1_000)

    def __str__(self) -> str:
        kinds = "|".join(self.kinds) or "any"
        amount = f"{self.milli // 1_000}" if self.milli % 1_000 == 0 else f"{self.milli / 1_000:g}"
        low, high = self.memory_min_bytes, self.memory_max_bytes
        if low or high != quantity.MAX_BYTES:
            kinds += f"({quantity.format_bytes(low) if low else ''}.." \
                     f"{quantity.format_bytes(high) if high != quantity.MAX_BYTES else ''})"
        return f"{kinds}:{amount}"


def parse_gpu(value: object) -> object:
    """Normal form (a dict of `GpuRequest` fields) of every GPU notation; other values pass through to pydantic."""
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a GPU request; write for example h100:8, any:1 or 2")
    if isinstance(value, (int, float)):
        return {"milli": _gpu_milli(value)}
    if isinstance(value, str):
        return _parse_gpu_text(value)
    if isinstance(value, (list, tuple)):
        parts = [parse_gpu(v) for v in value]
        if not parts or not all(isinstance(p, dict) for p in parts):
            raise ValueError("a list of GPUs holds notations such as h100:8, best first")
        dicts = [p for p in parts if isinstance(p, dict)]
        amounts = {p.get("milli", 1_000) for p in dicts}
        if len(amounts) > 1:
            raise ValueError("every entry of a GPU list must ask for the same number of GPUs")
        ranges = {(p.get("memory_min_bytes", 0), p.get("memory_max_bytes", quantity.MAX_BYTES)) for p in dicts}
        if len(ranges) > 1:
            raise ValueError("every entry of a GPU list must have the same memory range")
        low, high = ranges.pop()
        kinds = [k for p in dicts for k in p.get("kinds", ())]
        return {"kinds": kinds, "milli": amounts.pop(), "memory_min_bytes": low, "memory_max_bytes": high}
    if isinstance(value, dict) and ({"type", "memory", "count"} & value.keys()):
        rest = {k: v for k, v in value.items() if k not in ("type", "memory", "count")}
        wanted = value.get("type", ())
        listed = (wanted,) if isinstance(wanted, str) else wanted
        rest["kinds"] = tuple(k for k in listed if k != "any") if isinstance(listed, (list, tuple)) else listed
        if "memory" in value:
            low, high = _memory_range(str(value["memory"]))
            rest["memory_min_bytes"], rest["memory_max_bytes"] = low, high
        rest["milli"] = _gpu_milli(value.get("count", 1))
        return rest
    return value


def _parse_gpu_text(text: str) -> dict[str, object]:
    head, colon, tail = text.strip().rpartition(":")
    if not colon:
        head, tail = (text.strip(), "1") if not re.fullmatch(r"[0-9.]+", text.strip()) else ("any", text.strip())
    elif not re.fullmatch(r"[0-9.]+", tail):  # a MIG kind such as h100-80gb:1g.10gb holds a colon of its own
        head, tail = text.strip(), "1"
    result: dict[str, object] = {"milli": _gpu_milli(tail)}
    if ".." in head and re.match(r"^[0-9.]", head):
        result["memory_min_bytes"], result["memory_max_bytes"] = _memory_range(head)
    elif head and head != "any":
        kinds = [k.strip() for k in head.split("|")]
        for kind in kinds:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,62}", kind):
                raise ValueError(f"{text!r} is not a GPU request; write for example h100:8, 24GB..:2, any:1 or any:0.5")
        result["kinds"] = kinds
    return result


def _memory_range(text: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    if not dots:
        size = quantity.parse_bytes(text)
        return size, size
    return (
        quantity.parse_bytes(low) if low.strip() else 0,
        quantity.parse_bytes(high) if high.strip() else quantity.MAX_BYTES,
    )


def _gpu_milli(value: object) -> int:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else -1.0
    except ValueError:
        number = -1.0
    if not 0.001 <= number <= 1_024:
        raise ValueError(f"{value!r} is not a number of GPUs; write 1 to 1024, or a share such as 0.5")
    return round(number * 1_000)


class Replicas(SpecModel):
    """How many replicas a role has: a number, or `{min, max, prefer}` for an elastic role."""

    min: Annotated[int, Field(ge=1, le=10_000)] = 1
    max: Annotated[int, Field(ge=1, le=10_000)] = 1
    prefer: Annotated[int, Field(ge=1, le=10_000)] = 1

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(f"{value!r} is not a number of replicas")
        if isinstance(value, int):
            return {"min": value, "max": value, "prefer": value}
        if isinstance(value, str) and re.fullmatch(r"\s*\d{1,6}\s*\.\.\s*\d{1,6}\s*", value):
            bounds = [int(part) for part in value.split("..")]
            return {"min": bounds[0], "max": bounds[1], "prefer": bounds[1]}
        if isinstance(value, dict):
            low = value.get("min", 1)
            high = value.get("max", value.get("prefer", low))
            return {"min": low, "max": high, "prefer": value.get("prefer", high),
                    **{k: v for k, v in value.items() if k not in ("min", "max", "prefer")}}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.prefer <= self.max:
            raise ValueError(f"replicas need min <= prefer <= max, not {self.min}, {self.prefer}, {self.max}")
        return self

    @property
    def elastic(self) -> bool:
        return self.min != self.max


class RestartScope(StrEnum):
    """What is started anew when a replica of the role fails retryably."""

    REPLICA = "replica"
    ROLE = "role"
    JOB = "job"


class RestartPolicy(SpecModel):
    """When and how a failed replica is started again.

    Exit codes 1-127 are permanent and codes >= 128 (signals) retryable unless `retry_on` / `fail_on` say otherwise
    (TFJob's ExitCode policy). Failures that are not the job's fault (node lost, preemption) never count.
    """

    scope: RestartScope | None = None
    """replica | role | job; default: replica for `ps` and for the workers of a job with `ps`, else job."""
    max: Annotated[int, Field(ge=0, le=1_000)] = 3
    """Counted restarts before the job fails; progress since the last one gives the budget back."""
    backoff: DurationMs = 1_000
    """Wait before the second restart in a row; doubles each time."""
    backoff_max: DurationMs = 300_000
    """Longest wait between restarts."""
    retry_on: tuple[ExitCode, ...] = ()
    """Exit codes that are retried although they are below 128."""
    fail_on: tuple[ExitCode, ...] = ()
    """Exit codes that end the job although they are 128 or above."""

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        both = sorted(set(self.retry_on) & set(self.fail_on))
        if both:
            raise ValueError(f"exit code {both[0]} is in both retry_on and fail_on")
        return self


class RoleSpec(SpecModel):
    """A named set of like replicas."""

    command: str | tuple[str, ...] = ""
    """What each replica runs: a string goes through `/bin/sh -c`, a list is executed as it is."""
    replicas: Replicas = Replicas()
    """A number, `{min, max, prefer}` or `2..4`."""
    cpu: CpuMilli = 1_000
    """CPUs of one replica (4, 0.5, 500m)."""
    memory: Bytes = 0
    """Memory of one replica (32Gi); 0 asks for none and sets no limit."""
    gpu: GpuRequest | None = None
    """GPUs of one replica (h100:8, 24GB..:2, any:0.5)."""
    image: str = ""
    """Container image; ignored by the local backend."""
    working_dir: str = ""
    """Directory in which the command runs; relative to the job file; default: the job's."""
    env: Mapping[str, str | None] = {}
    """Environment variables; an empty value is filled from the caller and refused if unset there; `secret://NAME` is a reference."""
    ports: Mapping[str, int] = {}
    """Named ports of one replica; 0 lets the backend choose. Found in `JOBSCHED_PORT_<NAME>`."""
    restart: RestartPolicy | None = None
    """Restart policy of this role; default: the job's."""
    procs: Annotated[int, Field(ge=1, le=1_024)] = 1
    """Training processes that one replica starts itself (torchrun's --nproc-per-node)."""
    preload: tuple[str, ...] = ()
    """Python modules that a backend may keep imported in a warm interpreter, so that `python …` commands start faster."""

    @field_validator("env", "ports")
    @classmethod
    def _names(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        return _check_names(value)

    @field_validator("ports")
    @classmethod
    def _ports(cls, value: Mapping[str, int]) -> Mapping[str, int]:
        for name, port in value.items():
            if not 0 <= port <= 65_535:
                raise ValueError(f"port {name} is {port}; ports are 1 to 65535, or 0 for any")
        return value


class Checkpoint(SpecModel):
    """Where checkpoints live and how a replica is asked to write one."""

    dir: str = ""
    """Directory or URL; relative to the job's directory; default: one that jobsched keeps for the job."""
    signal: Literal["USR1", "USR2", "TERM", "INT", "HUP", "none"] = "USR1"
    """Signal that asks for a checkpoint before a stop."""
    grace: DurationMs = 30_000
    """Longest wait for the acknowledgement; the stop goes on as soon as it comes."""
    interval: DurationMs = 0
    """How often the job saves, if it says so; used to tell what a restart may lose."""


class Placement(SpecModel):
    """Wishes about where replicas run."""

    within: Literal["", "node", "nvlink", "rack", "zone"] = ""
    """All replicas in one domain of this level (required)."""
    prefer: Literal["", "node", "nvlink", "rack", "zone"] = ""
    """The same as a preference."""
    spread: Literal["", "node", "rack", "zone"] = ""
    """Replicas of one role on different domains of this level."""
    nodes: Mapping[str, str] = {}
    """Labels that a node must carry."""
    tolerate: tuple[str, ...] = ()
    """Taints (key or key=value) that do not keep this job away."""
    avoid: tuple[str, ...] = ()
    """Node names never to use."""


class ArraySpec(SpecModel):
    """The same job many times; each member finds its number in `JOBSCHED_ARRAY_INDEX`."""

    indices: tuple[Annotated[int, Field(ge=0, le=1_000_000)], ...] = ()
    """Member numbers; written `0-9`, `1,3,5` or `0-99%4` (at most 4 at a time)."""
    max_parallel: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Members that may run at once; 0 means no limit."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            value = f"0-{value - 1}" if value > 0 else str(value)
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*([0-9,\-\s]+?)\s*(?:%\s*(\d{1,6}))?\s*", value)
        if match is None:
            raise ValueError(f"{value!r} is not an array; write for example 0-9, 1,3,5 or 0-99%4")
        indices: list[int] = []
        for part in match[1].split(","):
            span = re.fullmatch(r"\s*(\d{1,7})\s*(?:-\s*(\d{1,7}))?\s*", part)
            if span is None:
                raise ValueError(f"{value!r} is not an array; write for example 0-9, 1,3,5 or 0-99%4")
            low, high = int(span[1]), int(span[2] or span[1])
            if not low <= high < low + 100_000:
                raise ValueError(f"{part.strip()!r} is not a range of at most 100,000 members")
            indices.extend(range(low, high + 1))
        return {"indices": tuple(sorted(set(indices))), "max_parallel": int(match[2] or 0)}


SuccessRule = Literal["auto", "chief", "worker0", "all_workers"]
CleanUp = Literal["all", "running", "none"]


class JobSpec(SpecModel):
    """One training job. Every field but `roles` has a default; a job with one role may write its fields at the top."""

    name: Name | None = None
    """Unique among your live jobs only if you submit with --if-exists; made up (`adjective-noun-4hex`) when absent."""
    queue: Name = "default"
    """Queue to wait in."""
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = 0
    """Higher goes first within the queue."""
    labels: Mapping[str, str] = {}
    """Free labels, for selection with -l."""
    roles: Mapping[Name, RoleSpec] = {}
    """Role name -> role. `chief` and `worker` train; `ps` and `evaluator` serve and never decide success."""
    working_dir: str = ""
    """Directory in which commands run; relative to the job file."""
    image: str = ""
    """Container image of every role that names none."""
    env: Mapping[str, str | None] = {}
    """Environment of every role."""
    restart: RestartPolicy = RestartPolicy()
    """Restart policy of every role that has none."""
    success: SuccessRule = "auto"
    """chief: the chief's exit decides; worker0: worker 0's; all_workers: all must exit 0; auto: chief if there is one, else all_workers."""
    clean_up: CleanUp = "all"
    """Which containers and scratch files are removed after the end; logs are always kept."""
    keep_after_finish: DurationMs = 7 * 86_400_000
    """How long logs and scratch files stay after the end."""
    time_limit: DurationMs = 0
    """Longest run of all attempts together; 0 means none."""
    queue_deadline: DurationMs = 0
    """Longest wait in the queue before the job fails; 0 means none."""
    start_timeout: DurationMs = 600_000
    """Longest time between placement and all replicas running."""
    heartbeat_timeout: DurationMs = 30_000
    """Silence of a replica that reports through jobsched.train after which it is suspected."""
    hang_timeout: DurationMs = 0
    """Time without a new step after which a running job is taken for hung; 0: never."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoint directory, signal and grace."""
    placement: Placement = Placement()
    """Where replicas may run."""
    array: ArraySpec | None = None
    """Submit the job once per index."""
    after: tuple[str, ...] = ()
    """Ids or names of jobs that must succeed first."""

    @field_validator("env")
    @classmethod
    def _names(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        return _check_names(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.roles:
            raise ValueError("a job needs at least one role with a command")
        for name, role in self.roles.items():
            if not role.command or (isinstance(role.command, str) and not role.command.strip()):
                raise ValueError(f"role {name!r} has no command")
        if not training_roles(self):
            raise ValueError("a job needs a role that trains; ps and evaluator only serve")
        if self.success == "chief" and "chief" not in self.roles:
            raise ValueError("success is 'chief' but there is no role 'chief'")
        if self.success == "worker0" and "worker" not in self.roles:
            raise ValueError("success is 'worker0' but there is no role 'worker'")
        return self


SERVING_ROLES = ("ps", "evaluator")


def training_roles(spec: JobSpec) -> tuple[str, ...]:
    """Roles whose replicas have ranks: all but `ps` and `evaluator`, chief first, then in written order."""
    names = [name for name in spec.roles if name not in SERVING_ROLES]
    return tuple(sorted(names, key=lambda n: (n not in ("chief", "master"), names.index(n))))


def restart_policy(spec: JobSpec, role: str) -> RestartPolicy:
    """The policy that holds for a role, with its scope made definite."""
    policy = spec.roles[role].restart or spec.restart
    if policy.scope is not None:
        return policy
    serving = role in SERVING_ROLES or "ps" in spec.roles
    return policy.model_copy(update={"scope": RestartScope.REPLICA if serving else RestartScope.JOB})
