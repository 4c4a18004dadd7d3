"""What fields of a spec are made of: text, names, labels, durations and sizes, and the frozen model that holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from jobsched.spec import quantity
from jobsched.spec.quantity import show

SECRET = "secret://"
"""What an environment value begins with when it is a reference, resolved by the backend at the last moment."""

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,251}[A-Za-z0-9])?")

DurationMs = Annotated[
    int,
    BeforeValidator(quantity.parse_duration_ms),
    PlainSerializer(quantity.format_duration, return_type=str, when_used="json"),
    WithJsonSchema({"type": ["string", "number"], "pattern": quantity.DURATION, "minimum": 0,
                    "examples": ["90s", "30m", "1h30m", "2d"]}),
]
"""Milliseconds. What is validated is text or a number of seconds; only defaults and copies hold milliseconds."""
Bytes = Annotated[
    int,
    BeforeValidator(quantity.parse_bytes),
    PlainSerializer(quantity.format_bytes, return_type=str, when_used="json"),
    WithJsonSchema({"type": ["string", "number"], "pattern": quantity.SIZE, "minimum": 0,
                    "examples": ["512Mi", "32Gi", "80GB"]}),
]
CpuMilli = Annotated[
    int,
    BeforeValidator(quantity.parse_cpu_milli),
    PlainSerializer(quantity.format_cpu, return_type=str, when_used="json"),
    WithJsonSchema({"type": ["string", "number"], "pattern": quantity.CPUS, "minimum": 0,
                    "examples": [4, 0.5, "500m"]}),
]


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError(f"{show(value)} is not a name; use lower-case letters, digits and '-', at most 52")
    return value


def _role_name(value: str) -> str:
    if len(value) > 24 or not NAME.fullmatch(value):
        raise ValueError(f"{show(value)} is not a role name; use lower-case letters, digits and '-', at most 24")
    return value


def _env_name(value: str) -> str:
    if not ENV_NAME.fullmatch(value):
        raise ValueError(f"{show(value)} is not a variable name; use letters, digits and '_'")
    return value


def _label_key(value: str) -> str:
    if not LABEL.fullmatch(value):
        raise ValueError(f"{show(value)} is not a label name; use letters, digits, '.', '_', '/' and '-'")
    return value


def _module_name(value: str) -> str:
    if len(value) > 255 or not all(part.isidentifier() for part in value.split(".")):
        raise ValueError(f"{show(value)} is not the name of a Python module")
    return value


def _env_value(value: str) -> str:
    if value.startswith(SECRET) and not LABEL.fullmatch(value.removeprefix(SECRET)):
        raise ValueError(f"{show(value)} is not a reference to a secret; write for example secret://wandb-key")
    return value


Text = Annotated[str, Field(max_length=100_000, pattern=r"^[^\x00]*$")]
"""Text that can be handed to a process: no NUL, and below the kernel's limit for one argument."""
Name = Annotated[str, AfterValidator(_name), Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})]
RoleName = Annotated[str, AfterValidator(_role_name)]
EnvName = Annotated[str, AfterValidator(_env_name)]
ModuleName = Annotated[str, AfterValidator(_module_name)]
LabelKey = Annotated[str, AfterValidator(_label_key)]
LabelValue = Annotated[str, Field(max_length=253, pattern=r"^[^\x00]*$")]
Env = Mapping[EnvName, Annotated[Text, AfterValidator(_env_value)] | None]
Labels = Annotated[Mapping[LabelKey, LabelValue], Field(max_length=64)]


class SpecModel(BaseModel):
    """Frozen, closed (unknown fields are errors), lists become tuples, defaults are documented in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def any_of(schema: dict[str, object], notations: list[object]) -> None:
    """Rewrite the JSON Schema of a model in place: its normal form, or one of the notations that people write."""
    own = ("type", "properties", "additionalProperties", "minimum", "maximum")
    normal = {key: schema.pop(key) for key in own if key in schema}
    schema["anyOf"] = [*notations, normal]
