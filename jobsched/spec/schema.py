"""The JSON Schema (draft 2020-12) of job files, for editors: every notation people may write, the one-role shorthand
and the wrapped form. Made from the models on demand by `jobsched.load.json_schema`; validation never uses it."""

from __future__ import annotations

from typing import cast

from pydantic import BaseModel

from jobsched.spec.gpu import GpuRequest
from jobsched.spec.job import (
    API_VERSION,
    KIND,
    ROLE_ONLY,
    ArraySpec,
    Checkpoint,
    JobSpec,
    Placement,
    Replicas,
    RestartPolicy,
    RoleSpec,
)

Schema = dict[str, object]
SCHEMA_ID = "https://jobsched.dev/schema/job.v1.json"
_MODELS: tuple[type[BaseModel], ...] = (
    JobSpec, RoleSpec, Replicas, GpuRequest, RestartPolicy, Checkpoint, Placement, ArraySpec,
)
_ANY_SCALAR = {"type": ["string", "number", "boolean"]}
_SCALAR_OR_EMPTY = {"type": ["string", "number", "boolean", "null"]}


def job_schema() -> Schema:
    """Accepts what `load_job` accepts as far as a schema can tell: types, names and bounds, not relations of fields."""
    job = cast(Schema, JobSpec.model_json_schema(ref_template="#/$defs/{model}"))
    defs = _object(job.pop("$defs"))
    for model in _MODELS:
        _write_defaults(model, job if model is JobSpec else _object(defs[model.__name__]))
    role = _properties(_object(defs["RoleSpec"]))
    top = _properties(job)
    for owner in (role, top):
        _object(owner["env"])["additionalProperties"] = _SCALAR_OR_EMPTY
    for labels in (top["labels"], _properties(_object(defs["Placement"]))["nodes"]):
        _object(labels)["additionalProperties"] = _ANY_SCALAR
    role["command"] = {
        "description": _object(role["command"])["description"],
        "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": _ANY_SCALAR}],
    }
    _object(defs["RoleSpec"])["required"] = ["command"]
    cast(list[Schema], _object(defs["ArraySpec"])["anyOf"])[-1]["required"] = ["indices"]
    defs["Job"] = job | {
        "title": "Job",
        "properties": top | {name: role[name] for name in ROLE_ONLY},
        "patternProperties": {"^x-": {}},
        "oneOf": [{"required": ["roles"]}, {"required": ["command"]}],
        "dependentSchemas": {"roles": {"properties": dict.fromkeys(ROLE_ONLY, False)}},
    }
    defs["WrappedJob"] = {
        "title": "WrappedJob",
        "description": "The same job as a Kubernetes object.",
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "spec"],
        "properties": {
            "apiVersion": {"const": API_VERSION},
            "kind": {"const": KIND},
            "metadata": {"type": "object", "properties": {"name": top["name"], "labels": top["labels"]}},
            "spec": {"$ref": "#/$defs/Job"},
            "status": {},
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "jobsched job",
        "type": "object",
        "if": {"required": ["apiVersion"]},
        "then": {"$ref": "#/$defs/WrappedJob"},
        "else": {"$ref": "#/$defs/Job"},
        "$defs": defs,
    }


def _write_defaults(model: type[BaseModel], schema: Schema) -> None:
    """Defaults as people write them (`30s`); pydantic puts the inner integer there, which would read as seconds."""
    written = model.model_construct().model_dump(mode="json") if model is not ArraySpec else {}
    choices = cast(list[Schema], schema.get("anyOf", [schema]))
    for name, field in _properties(choices[-1]).items():
        if "default" in _object(field) and name in written:
            _object(field)["default"] = written[name]


def _object(value: object) -> Schema:
    assert isinstance(value, dict)
    return value


def _properties(schema: Schema) -> Schema:
    return _object(schema["properties"])
