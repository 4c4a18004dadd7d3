"""What users write: a training job and its roles, as frozen pydantic models.

`jobsched.load` builds these from YAML, JSON or a dict and turns every failure into a `Problem` with its place; the
API and the store carry `JobSpec.model_dump(mode="json")`, which reads back to an equal spec. Nothing here does I/O,
and nothing here decides: defaults are the ones of the field (TFJob, PyTorchJob, torchrun), named where they matter.

Checks sit on the field they blame, so that the error points there and one wrong field does not hide another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from jobsched.spec import quantity
from jobsched.spec.fields import (
    NAME,
    Bytes,
    CpuMilli,
    DurationMs,
    Env,
    EnvName,
    Labels,
    ModuleName,
    Name,
    RoleName,
    SpecModel,
    Text,
    any_of,
)
from jobsched.spec.gpu import GpuRequest
from jobsched.spec.pod import PodOverlay
from jobsched.spec.quantity import show

API_VERSION, KIND = "jobsched.dev/v1alpha1", "TrainingJob"
"""Of the wrapped form, which `kubectl apply` takes too."""
SERVING_ROLES = ("ps", "evaluator")
"""Roles that only serve: they have no rank and never decide success."""
MAX_REPLICAS = 10_000
"""Most replicas of a job, all roles together."""
MAX_MEMBERS = 100_000
"""Most members of an array."""
_BOUNDS = re.compile(r"\s*([0-9]{1,9})\s*(?:\.\.\s*([0-9]{1,9})\s*)?")


def _command(value: object) -> object:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{show(value)} is not a command; write text for the shell, or a list of words")
    if not words or not words[0].strip():
        raise ValueError("a role needs a command")
    if any("\0" in word or len(word) > 100_000 for word in words):
        raise ValueError("a command cannot hold NUL characters or words of more than 100,000 characters")
    return value


ExitCode = Annotated[int, Field(strict=True, ge=1, le=255)]
ReplicaCount = Annotated[int, Field(strict=True, ge=1, le=MAX_REPLICAS)]


class Replicas(SpecModel):
    """How many replicas a role has: a number, or `{min, max, prefer}` (or `2..4`) for an elastic role. Role `ps`
    changes its number with a new attempt, which goes on from its checkpoints."""

    model_config = ConfigDict(json_schema_extra=lambda schema: any_of(schema, [
        {"type": "integer", "minimum": 1, "maximum": MAX_REPLICAS},
        {"type": "string", "pattern": r"^\s*[0-9]+\s*(\.\.\s*[0-9]+\s*)?$", "examples": ["2..4"]},
    ]))

    min: ReplicaCount = 1
    """The job starts and goes on with at least so many."""
    max: ReplicaCount = 1
    """Never more than so many."""
    prefer: ReplicaCount = 1
    """As many as this when there is room; default: max."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        match value:
            case bool() | float():
                raise ValueError(f"{show(value)} is not a number of replicas; write for example 4, or 2..4")
            case int():
                return {"min": value, "max": value, "prefer": value}
            case str():
                bounds = _BOUNDS.fullmatch(value) if len(value) <= quantity.MAX_TEXT else None
                if bounds is None:
                    raise ValueError(f"{show(value)} is not a number of replicas; write for example 4, or 2..4")
                least, most = int(bounds[1]), int(bounds[2] or bounds[1])
                return {"min": least, "max": most, "prefer": most}
            case dict():
                said = [value.get(name) for name in ("max", "prefer", "min")]  # one that is wrong is reported once
                high = next((n for n in said if isinstance(n, int) and 1 <= n <= MAX_REPLICAS), 1)
                return {"min": 1, "max": high, "prefer": high, **value}
            case _:
                return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.prefer <= self.max:
            raise ValueError(f"replicas need min <= prefer <= max, not {self.min}, {self.prefer}, {self.max}")
        return self

    @property
    def elastic(self) -> bool:
        return self.min != self.max

    def __str__(self) -> str:
        return f"{self.min}..{self.max}" if self.elastic else str(self.max)


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
    max: Annotated[int, Field(strict=True, ge=0, le=1_000)] = 3
    """Counted restarts before the job fails; progress since the last one gives the budget back."""
    backoff: DurationMs = 1_000
    """Wait before the second restart in a row; doubles each time."""
    backoff_max: DurationMs = 300_000
    """Longest wait between restarts."""
    retry_on: tuple[ExitCode, ...] = ()
    """Exit codes that are retried although they are below 128."""
    fail_on: tuple[ExitCode, ...] = ()
    """Exit codes that end the job although they are 128 or above."""

    @field_validator("backoff_max")
    @classmethod
    def _grows(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("backoff", 0) > value:
            raise ValueError("backoff_max is below backoff")
        return value

    @field_validator("fail_on")
    @classmethod
    def _disjoint(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        both = sorted(set(value) & set(info.data.get("retry_on", ())))
        if both:
            raise ValueError(f"exit code {both[0]} is in both retry_on and fail_on")
        return value


class KubernetesWishes(SpecModel):
    """What the job wants of Kubernetes in particular; other backends ignore it."""

    pod: PodOverlay = Field(default={})
    """Parts of a pod laid over what jobsched makes: `{spec: {priorityClassName: high}}`."""


class RoleSpec(SpecModel):
    """A named set of like replicas."""

    command: Annotated[
        str | tuple[str, ...],
        BeforeValidator(_command),
        Field(validate_default=True, json_schema_extra={"minLength": 1, "minItems": 1}),
    ] = ""
    """What each replica runs: a string goes through `/bin/sh -c`, a list is executed as it is."""
    replicas: Replicas = Replicas()
    """A number, `{min, max, prefer}` or `2..4`."""
    cpu: CpuMilli = 1_000
    """CPUs of one replica (4, 0.5, 500m)."""
    memory: Bytes = 0
    """Memory of one replica (32Gi); 0 asks for none and sets no limit."""
    gpu: GpuRequest | None = None
    """GPUs of one replica (h100:8, 24GB..:2, any:0.5)."""
    image: Text = ""
    """Container image; ignored by the local backend."""
    working_dir: Text = ""
    """Directory in which the command runs; relative to the job file; default: the job's."""
    env: Env = Field(default={})
    """Environment; an empty value is filled from the caller, refused if unset there; `secret://NAME` is a reference."""
    ports: Annotated[Mapping[EnvName, Annotated[int, Field(strict=True, ge=0, le=65_535)]], Field(max_length=16)] = {}
    """Named ports of one replica; 0 lets the backend choose. Found in `JOBSCHED_PORT_<NAME>`."""
    restart: RestartPolicy | None = None
    """Restart policy of this role; default: the job's."""
    procs: Annotated[int, Field(strict=True, ge=1, le=1_024)] = 1
    """Training processes that one replica starts itself (torchrun's --nproc-per-node)."""
    preload: Annotated[tuple[ModuleName, ...], Field(max_length=64)] = ()
    """Modules that a backend may keep imported in a warm interpreter, so that `python …` commands start faster."""
    kubernetes: KubernetesWishes = KubernetesWishes()
    """Wishes about this role's pods, laid over the job's."""

    @field_validator("ports")
    @classmethod
    def _distinct(cls, value: Mapping[str, int]) -> Mapping[str, int]:
        if len({name.upper() for name in value}) < len(value):
            raise ValueError("two ports differ only in upper and lower case; their variables would be the same")
        fixed = [port for port in value.values() if port]
        if len(set(fixed)) < len(fixed):
            raise ValueError("two ports have the same number")
        return value


class Checkpoint(SpecModel):
    """Where checkpoints live and how a replica is asked to write one."""

    dir: Text = ""
    """Directory or URL; relative to the job's directory; default: one that jobsched keeps for the job."""
    signal: Literal["USR1", "USR2", "TERM", "INT", "HUP", "none"] = "USR1"
    """Signal that asks for a checkpoint before a stop."""
    grace: DurationMs = 30_000
    """Longest wait for the acknowledgement; the stop goes on as soon as it comes."""
    interval: DurationMs = 0
    """How often the training library saves; default: its own (seconds). Scripts find it in the contract."""


_LEVELS = ("node", "nvlink", "rack", "zone")


class Placement(SpecModel):
    """Wishes about where replicas run."""

    within: Literal["", "node", "nvlink", "rack", "zone"] = ""
    """All replicas in one domain of this level (required)."""
    prefer: Literal["", "node", "nvlink", "rack", "zone"] = ""
    """The same as a preference."""
    spread: Literal["", "node", "rack", "zone"] = ""
    """Replicas of one role on different domains of this level."""
    nodes: Labels = Field(default={})
    """Labels that a node must carry."""
    tolerate: Annotated[tuple[Text, ...], Field(max_length=64)] = ()
    """Taints (key or key=value) that do not keep this job away."""
    avoid: Annotated[tuple[Text, ...], Field(max_length=1_000)] = ()
    """Node names never to use."""

    @field_validator("spread")
    @classmethod
    def _possible(cls, value: str, info: ValidationInfo) -> str:
        within = info.data.get("within", "")
        if value and within and _LEVELS.index(value) >= _LEVELS.index(within):
            raise ValueError(f"replicas cannot be within one {within} and spread over each {value}")
        return value


class ArraySpec(SpecModel):
    """The same job many times; each member finds its number in `JOBSCHED_ARRAY_INDEX`.

    Written `0-9`, `1,3,5`, `0-99%4` (at most 4 at a time), or a number of members; JSON carries that notation too.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema: any_of(schema, [
        {"type": "string", "pattern": r"^\s*[0-9][0-9, -]*(%\s*[0-9]+\s*)?$", "examples": ["0-9", "1,3,5", "0-99%4"]},
        {"type": "integer", "minimum": 1, "maximum": MAX_MEMBERS},
    ]))

    indices: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=0, le=1_000_000)], ...],
        Field(min_length=1, max_length=MAX_MEMBERS, validate_default=True),
    ] = ()
    """Member numbers."""
    max_parallel: Annotated[int, Field(strict=True, ge=0, le=MAX_MEMBERS)] = 0
    """Members that may run at once; 0 means no limit."""

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: object) -> object:
        match value:
            case bool() | float():
                raise ValueError(f"{show(value)} is not an array; {_ARRAY_HINT}")
            case int() if value < 1 or value > MAX_MEMBERS:
                raise ValueError(f"an array has 1 to {MAX_MEMBERS:,} members, not {show(value)}")
            case int():
                return {"indices": tuple(range(value))}
            case str():
                return _parse_array(value)
            case _:
                return value

    @field_validator("indices")
    @classmethod
    def _ordered(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return value if all(a < b for a, b in pairwise(value)) else tuple(sorted(set(value)))

    @model_serializer(mode="wrap", when_used="json")
    def _compact(self, _normal: SerializerFunctionWrapHandler) -> str:
        return str(self)

    def __str__(self) -> str:
        """The notation, which reads back to an equal array: `0-9,12%4`."""
        gaps = [(a, b) for a, b in pairwise(self.indices) if b > a + 1]
        starts = [*self.indices[:1], *(b for _, b in gaps)]
        ends = [*(a for a, _ in gaps), *self.indices[-1:]]
        spans = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
        return f"{spans}%{self.max_parallel}" if self.max_parallel else spans


_ARRAY_HINT = "write for example 0-9, 1,3,5 or 0-99%4"
_SPAN = re.compile(r"([0-9]{1,7})(?:\s*-\s*([0-9]{1,7}))?")


def _parse_array(text: str) -> dict[str, object]:
    spans, percent, parallel = text.partition("%")
    if percent and not (parallel.strip().isascii() and parallel.strip().isdigit() and len(parallel) < 9):
        raise ValueError(f"{show(text)} is not an array; {_ARRAY_HINT}")
    indices: set[int] = set()
    written = 0
    for part in spans.split(","):
        span = _SPAN.fullmatch(part.strip())
        if span is None:
            raise ValueError(f"{show(text)} is not an array; {_ARRAY_HINT}")
        low, high = int(span[1]), int(span[2] or span[1])
        if not low <= high < low + MAX_MEMBERS:
            raise ValueError(f"{show(part.strip())} is not a range of at most {MAX_MEMBERS:,} members")
        written += high - low + 1
        if written > MAX_MEMBERS:  # members written twice count twice, which keeps the work bounded
            raise ValueError(f"an array has at most {MAX_MEMBERS:,} members")
        indices.update(range(low, high + 1))
    return {"indices": tuple(sorted(indices)), "max_parallel": int(parallel or 0)}


def _or_a_name(schema: dict[str, object]) -> None:
    any_of(schema, [{"type": "string", "pattern": f"^{NAME.pattern}$"}])


SuccessRule = Literal["auto", "chief", "worker0", "all_workers"]
CleanUp = Literal["all", "running", "none"]


class JobSpec(SpecModel):
    """One training job. Every field but `roles` has a default; a job with one role may write its fields at the top."""

    name: Name | None = None
    """Unique among your live jobs only if you submit with --if-exists; made up (`adjective-noun-4hex`) when absent."""
    queue: Name = "default"
    """Queue to wait in."""
    priority: Annotated[int, Field(strict=True, ge=-1_000_000, le=1_000_000, json_schema_extra=_or_a_name)] = 0
    """Higher goes first within the queue: a number, or a class of the server's configuration (low, normal, high)."""
    priority_class: Name | Literal[""] = ""
    """The class that `priority` names; the server puts its number there."""
    labels: Labels = Field(default={})
    """Free labels, for selection with -l."""
    roles: Annotated[Mapping[RoleName, RoleSpec], Field(validate_default=True)] = {}
    """Role name -> role. `chief` and `worker` train; `ps` and `evaluator` serve and never decide success."""
    working_dir: Text = ""
    """Directory in which commands run; relative to the job file."""
    image: Text = ""
    """Container image of every role that names none."""
    env: Env = Field(default={})
    """Environment of every role."""
    restart: RestartPolicy = RestartPolicy()
    """Restart policy of every role that has none."""
    success: SuccessRule = "auto"
    """Whose exit decides: the chief's, worker 0's, or all must exit 0; auto: the chief if there is one, else all."""
    clean_up: CleanUp = "all"
    """Which containers and scratch files are removed after the end; logs are always kept."""
    keep_after_finish: DurationMs = 7 * 86_400_000
    """How long logs and scratch files stay after the end."""
    expected: DurationMs = 0
    """How long the job is expected to run, all attempts together; 0: no idea. It ends nothing: orders that look at run
    times learn how far such guesses are off."""
    deadline: DurationMs = 0
    """Time after its submission by which the job should be over; 0: none. It ends nothing: `ordering: in-time` goes by
    it."""
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
    after: Annotated[tuple[Text, ...], Field(max_length=1_000)] = ()
    """Ids or names of jobs that must succeed first."""
    kubernetes: KubernetesWishes = KubernetesWishes()
    """Wishes about pods, where replicas are pods."""

    @model_validator(mode="before")
    @classmethod
    def _named_priority(cls, value: object) -> object:
        """`priority: high` names a class, of which only the server knows the number."""
        if isinstance(value, Mapping) and isinstance(named := value.get("priority"), str) and NAME.fullmatch(named):
            if named.isdigit():
                return value
            if value.get("priority_class") not in (None, "", named):
                raise ValueError(f"priority is {show(named)} and priority_class {show(value['priority_class'])}")
            return {**value, "priority": 0, "priority_class": named}
        return value

    @field_validator("roles")
    @classmethod
    def _gang(cls, value: Mapping[str, RoleSpec]) -> Mapping[str, RoleSpec]:
        if not value:
            raise ValueError("a job needs at least one role with a command")
        if all(name in SERVING_ROLES for name in value):
            raise ValueError("a job needs a role that trains; ps and evaluator only serve")
        total = sum(role.replicas.max for role in value.values())
        if total > MAX_REPLICAS:
            raise ValueError(f"{total:,} replicas in all roles together; at most {MAX_REPLICAS:,} are allowed")
        if "chief" in value and value["chief"].replicas.max > 1:
            raise ValueError("there is one chief; use role 'worker' for the others")
        return value

    @field_validator("success")
    @classmethod
    def _decidable(cls, value: str, info: ValidationInfo) -> str:
        needed = {"chief": "chief", "worker0": "worker"}.get(value)
        if needed and needed not in info.data.get("roles", {needed}):
            raise ValueError(f"success is {value!r} but there is no role {needed!r}")
        return value


def training_roles(spec: JobSpec) -> tuple[str, ...]:
    """Roles whose replicas have ranks: all but `ps` and `evaluator`, chief first, then in written order."""
    names = [name for name in spec.roles if name not in SERVING_ROLES]
    if len(names) < 2:
        return tuple(names)
    return tuple(sorted(names, key=lambda n: (n not in ("chief", "master"), names.index(n))))


def restart_policy(spec: JobSpec, role: str) -> RestartPolicy:
    """The policy that holds for a role, with its scope made definite."""
    policy = spec.roles[role].restart or spec.restart
    return policy if policy.scope is not None else policy.model_copy(update={"scope": restart_scope(spec, role)})


def restart_scope(spec: JobSpec, role: str) -> RestartScope:
    """The same's scope alone, which is asked for at each launch."""
    scope = (spec.roles[role].restart or spec.restart).scope
    serving = role in SERVING_ROLES or "ps" in spec.roles
    return scope or (RestartScope.REPLICA if serving else RestartScope.JOB)


def resizes_in_place(spec: JobSpec, role: str) -> bool:
    """Whether replicas of a role may come and go while the rest trains on. Never parameter servers: the model is
    divided among them, so another number of them begins with another attempt, from their checkpoints."""
    return role != "ps" and restart_scope(spec, role) is RestartScope.REPLICA


ROLE_ONLY = tuple(name for name in RoleSpec.model_fields if name not in JobSpec.model_fields)
"""Fields of a role that may stand at the top of a job with one role, the shorthand for `roles: {worker: …}`."""
