"""Values of core as JSON, and what each operation of the API answers, for its OpenAPI document.

The routes serialise by themselves with adapters that are built when they are first needed: building them all would
double the time that a server takes to start. There is no second set of API types.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from fastapi import FastAPI, Response
from pydantic import TypeAdapter

from jobsched.core.answers import (
    Check,
    CheckpointAnswer,
    EditAnswer,
    JobAnswer,
    JobPage,
    NodeAnswer,
    PlanAnswer,
    QueueAnswer,
    UsageAnswer,
    Verification,
    WhyAnswer,
)
from jobsched.core.events import Stored
from jobsched.core.observation import Incident
from jobsched.ports import Sample
from jobsched.spec.job import JobSpec

T = TypeVar("T")

ANSWERS: Mapping[str, Any] = {
    "submit": JobPage,
    "plan": PlanAnswer,
    "jobs": JobPage,
    "job": JobAnswer,
    "why": WhyAnswer,
    "job_events": tuple[Stored, ...],
    "incidents": tuple[Incident, ...],
    "samples": tuple[Sample, ...],
    "cancel": JobAnswer,
    "hold": JobAnswer,
    "release": JobAnswer,
    "restart": JobAnswer,
    "scale": JobAnswer,
    "priority": JobAnswer,
    "checkpoint": CheckpointAnswer,
    "spec": JobSpec,
    "replace_spec": EditAnswer,
    "change_spec": EditAnswer,
    "nodes": tuple[NodeAnswer, ...],
    "cordon": NodeAnswer,
    "uncordon": NodeAnswer,
    "queues": tuple[QueueAnswer, ...],
    "usage": tuple[UsageAnswer, ...],
    "doctor": tuple[Check, ...],
    "verify": Verification,
}
"""Operation id -> type of its answer; those that are missing here say it in their signature."""


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def dump(kind: type[T], value: T) -> bytes:
    """`value` as JSON on one line."""
    return _adapter(kind).dump_json(value)  # type: ignore[arg-type]  # a class is hashable


def reply(kind: type[T], value: T, status: int = 200, *, tag: int | None = None) -> Response:
    """`tag`: for `If-Match`."""
    headers = {} if tag is None else {"etag": f'"{tag}"'}
    return Response(dump(kind, value), status, headers, media_type="application/json")


def document(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the answers; made once."""
    if api.openapi_schema is None:
        made = FastAPI.openapi(api)
        schemas = made["components"]["schemas"]
        for operation in (op for path in made["paths"].values() for op in path.values()):
            kind = ANSWERS.get(operation["operationId"])
            if kind is not None:
                body = _adapter(kind).json_schema(
                    mode="serialization", ref_template="#/components/schemas/Answer.{model}"
                )
                schemas |= {f"Answer.{name}": schema for name, schema in body.pop("$defs", {}).items()}
                good = next(code for code in operation["responses"] if code.startswith("2"))
                operation["responses"][good]["content"] = {"application/json": {"schema": body}}
    assert api.openapi_schema is not None
    return api.openapi_schema
