"""Values as the text of columns, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

from pydantic import TypeAdapter
from sqlalchemy import Row

from jobsched.core.events import EVENT, Stored
from jobsched.core.job import Job
from jobsched.core.node import Cordon, Node
from jobsched.core.recall import Recall
from jobsched.core.resources import NodeName
from jobsched.ports import Sample
from jobsched.spec.job import ArraySpec, JobSpec
from jobsched.spec.queue import QueueSpec
from jobsched.store.projections import NodeState

_JOB: Final = TypeAdapter(Job)
_STATE: Final = TypeAdapter(dict[str, Any])
_NODE: Final = TypeAdapter(Node)
_CORDON: Final = TypeAdapter(Cordon)
QUEUE: Final = TypeAdapter(QueueSpec)
RECALL: Final = TypeAdapter(Recall)
_ARRAY: Final[TypeAdapter[ArraySpec | None]] = TypeAdapter(ArraySpec | None)
_OWN: Final = {"name", "array"}
"""The fields of a spec that differ between jobs that are otherwise alike. They are kept in `doc`, so that the text in
`spec` is the same for many jobs, is decoded once, and its value is shared."""
_IN_SPEC: Final = {"spec": set(JobSpec.model_fields) - _OWN}


def decode_job(spec: str, doc: str) -> Job:
    state = _STATE.validate_json(doc)
    own = state["spec"]
    array = _ARRAY.validate_python(own.get("array"))
    state["spec"] = _decode_spec(spec).model_copy(update={"name": own.get("name"), "array": array})
    return _JOB.validate_python(state)


@lru_cache(maxsize=4_096)
def _decode_spec(text: str) -> JobSpec:
    return JobSpec.model_validate_json(text)


def job_row(job: Job) -> dict[str, object]:
    """The columns of a job that change, keyed for `statements.UPDATE_JOB`."""
    return {
        "key": job.id,
        "version": job.version,
        "phase": job.phase.value,
        "priority": job.priority,
        "ended_at_ms": job.ended_at_ms,
        "first_placed_at_ms": job.first_placed_at_ms,
        "gpu_milli": job.gpu_milli,
        "gpu_milli_ms": job.gpu_milli_ms,
        "gpu_since_ms": job.gpu_since_ms,
        "doc": _JOB.dump_json(job, exclude=_IN_SPEC, exclude_defaults=True).decode(),
    }


def new_job_row(job: Job) -> dict[str, object]:
    row = job_row(job)
    return row | {
        "id": row.pop("key"),
        "name": job.name,
        "owner": job.owner,
        "queue": job.spec.queue,
        "submitted_at_ms": job.submitted_at_ms,
        "array_id": job.array_id or None,
        "spec": job.spec.model_dump_json(exclude=_OWN),
    }


def edited_row(job: Job) -> dict[str, object]:
    """The columns that only an edit changes, keyed for `statements.UPDATE_SPEC`."""
    return {"key": job.id, "queue": job.spec.queue, "spec": job.spec.model_dump_json(exclude=_OWN)}


def label_rows(job: Job) -> list[dict[str, object]]:
    return [{"key": key, "value": value, "submitted_at_ms": job.submitted_at_ms, "job_id": job.id}
            for key, value in job.labels.items()]


def stored(row: Row[*tuple[Any, ...]]) -> Stored:
    return Stored(row.seq, EVENT.validate_json(row.body))


def nodes(rows: Iterable[Row[*tuple[Any, ...]]]) -> dict[NodeName, NodeState]:
    return {
        row.name: NodeState(
            _NODE.validate_json(row.doc) if row.doc else None,
            row.lost,
            _CORDON.validate_json(row.cordon) if row.cordon else None,
        )
        for row in rows
    }


def node_row(name: NodeName, state: NodeState) -> dict[str, object]:
    doc = _NODE.dump_json(state.node).decode() if state.node is not None else None
    cordon = _CORDON.dump_json(state.cordon).decode() if state.cordon is not None else None
    return {"name": name, "doc": doc, "lost": state.lost, "cordon": cordon}


def sample(row: Row[*tuple[Any, ...]]) -> Sample:
    metrics = tuple((name, value) for name, value in json.loads(row.metrics))
    return Sample(row.job_id, row.at_ms, row.attempt, row.step, row.total, row.world_size, metrics)
