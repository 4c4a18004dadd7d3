"""What platform teams write about queues. The brain's quotas, weights and cohorts extend this model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jobsched.spec.job import Name, SpecModel


class QueueSpec(SpecModel):
    """A named line with weight and quota."""

    name: Name = "default"
    """What jobs write in `queue`."""
    weight: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 1
    """Share of what is free relative to other queues."""
    paused: Annotated[bool, Field(strict=True)] = False
    """Accept jobs but start none."""
    max_gpus: Annotated[int, Field(strict=True, ge=0, le=10_000_000)] | None = None
    """Most GPUs that running jobs of this queue may hold; none: no limit."""


def distinct_queues(queues: tuple[QueueSpec, ...]) -> tuple[QueueSpec, ...]:
    """The queues themselves. ValueError when there are none, or when two have the same name."""
    names = [queue.name for queue in queues]
    double = sorted({name for name in names if names.count(name) > 1})
    if not names or double:
        raise ValueError(f"queue {double[0]!r} is there twice" if double else "at least one queue is needed")
    return queues
