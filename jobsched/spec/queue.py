"""What platform teams write about queues: a tree in which queues lend each other what they do not use.

A queue that others name as their `cohort` is a cohort; it may stand in the list itself (to have limits, a weight or a
cohort of its own) or only be named. Quotas count per resource: `gpus` (of any kind), a GPU kind, `cpu`, `memory`. What
no queue of a tree names is not limited there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from jobsched.spec import quantity
from jobsched.spec.fields import DurationMs, Name, SpecModel
from jobsched.spec.gpu import GPU_KIND
from jobsched.spec.quantity import show

GPUS, CPU, MEMORY = "gpus", "cpu", "memory"
"""Resources with a name of their own; every other name is a GPU kind (`h100` stands for `h100-80gb` too)."""
MAX_DEPTH = 8
"""Deepest tree of cohorts."""


def _amounts(value: object) -> Mapping[str, int]:
    if not isinstance(value, Mapping) or len(value) > 64:
        raise ValueError(f"{show(value)} is not an amount per resource; write for example {{gpus: 16, cpu: 128}}")
    return {str(name): _amount(str(name), given) for name, given in value.items()}


def _amount(name: str, given: object) -> int:
    if name == MEMORY:
        return quantity.parse_bytes(given)
    if name != CPU and not GPU_KIND.fullmatch(name):
        raise ValueError(f"{show(name)} is no resource; one of gpus, cpu, memory or a GPU kind in lower case")
    try:
        return quantity.parse_cpu_milli(given)
    except ValueError:
        raise ValueError(f"{name}: {show(given)} is not a count; write for example 8") from None


def _written(value: Mapping[str, int]) -> dict[str, str]:
    return {name: (quantity.format_bytes if name == MEMORY else quantity.format_cpu)(n) for name, n in value.items()}


Amounts = Annotated[
    Mapping[str, int],
    BeforeValidator(_amounts),
    PlainSerializer(_written, return_type=dict[str, str], when_used="json"),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["integer", "string"]}, "maxProperties": 64,
                    "examples": [{"gpus": 16, "h100": 8, "cpu": 128, "memory": "1Ti"}]}),
]
"""Resource -> amount: GPUs and CPUs in thousandths, memory in bytes."""


class Budget(SpecModel):
    """GPU time that may be spent in a window; windows follow each other without gaps since 1970."""

    gpu_hours: Annotated[int, Field(strict=True, ge=0, le=1_000_000_000)]
    """GPU-hours that jobs may hold GPUs for within one window; once spent, nothing new starts until the next."""
    window: Annotated[DurationMs, Field(ge=60_000)] = 7 * 86_400_000
    """Length of a window."""


class QueueSpec(SpecModel):
    """A named line with weight and quota, or a cohort of such."""

    name: Name = "default"
    """What jobs write in `queue`."""
    cohort: Name | None = None
    """The cohort that the queue belongs to; its queues lend each other what they do not use."""
    weight: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 1
    """Share of what is free relative to its neighbours; 0: only when no neighbour wants anything."""
    paused: Annotated[bool, Field(strict=True)] = False
    """Accept jobs but start none."""
    draining: Annotated[bool, Field(strict=True)] = False
    """Accept no more jobs; what waits and runs goes on to its end."""
    quota: Amounts = Field(default={})
    """What is the queue's own: never refused to it for long, lent to its cohort while unused."""
    borrowing_limit: Amounts = Field(default={})
    """Most that may be held above the quota, per resource; absent: whatever the cohort has to lend."""
    lending_limit: Amounts = Field(default={})
    """Most of the quota that others may use, per resource; absent: all of it."""
    max_gpus: Annotated[int, Field(strict=True, ge=0, le=10_000_000)] | None = None
    """Most GPUs that running jobs of this queue (or cohort) may hold; none: no limit."""
    max_gpus_per_user: Annotated[int, Field(strict=True, ge=0, le=10_000_000)] | None = None
    """Most GPUs that one user's running jobs may hold here; none: no limit."""
    budget: Budget | None = None
    """GPU time per window; none: no limit."""


def retired(queue: QueueSpec, empty: bool) -> QueueSpec:
    """A queue that nobody defines any more: it takes no more jobs. What waits and runs in it goes on to its end by its
    limits; with nothing in it, its quota is its cohort's again."""
    return QueueSpec(name=queue.name, draining=True) if empty else queue.model_copy(update={"draining": True})


def distinct_queues(queues: tuple[QueueSpec, ...]) -> tuple[QueueSpec, ...]:
    """The queues themselves. ValueError when there are none, when two have the same name, when no queue is left for
    jobs, or when a cohort is inside itself."""
    names = [queue.name for queue in queues]
    double = sorted({name for name in names if names.count(name) > 1})
    if not names or double:
        raise ValueError(f"queue {double[0]!r} is there twice" if double else "at least one queue is needed")
    parent = {queue.name: queue.cohort for queue in queues}
    for name in names:
        path, up = [name], parent[name]
        while up is not None:
            if up in path or len(path) >= MAX_DEPTH:
                what = "is inside itself" if up in path else f"is deeper than {MAX_DEPTH} levels"
                raise ValueError(f"cohort {up!r} {what}: {' in '.join([*path, up])}")
            path.append(up)
            up = parent.get(up)
    if not set(names) - set(parent.values()):
        raise ValueError("every queue is a cohort of another; jobs need a queue at the bottom")
    return queues
