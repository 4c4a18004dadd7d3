"""What platform teams write about queues. The brain's quotas, weights and cohorts extend this model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jobsched.spec.job import Name, SpecModel


class QueueSpec(SpecModel):
    """A named line with weight and quota."""

    name: Name = "default"
    weight: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    """Share of what is free relative to other queues."""
    paused: bool = False
    """Accept jobs but start none."""
    max_gpus: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    """Most GPUs that running jobs of this queue may hold; none: no limit."""
