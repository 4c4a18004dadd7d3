"""Integer resource vectors and GPU shares. Used by every part of core; knows nothing of nodes or jobs."""

from __future__ import annotations

from typing import NewType

from jobsched.core.values import dataclass

GpuId = NewType("GpuId", str)
NodeName = NewType("NodeName", str)
JobId = NewType("JobId", str)

NO_JOB = JobId("")

WHOLE_GPU = 1_000
"""Thousandths that make one GPU."""


@dataclass(frozen=True, slots=True)
class Resources:
    """An amount: CPU in thousandths, memory in bytes, GPUs in thousandths."""

    cpu_milli: int = 0
    memory_bytes: int = 0
    gpu_milli: int = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            self.cpu_milli + other.cpu_milli,
            self.memory_bytes + other.memory_bytes,
            self.gpu_milli + other.gpu_milli,
        )

    def __sub__(self, other: Resources) -> Resources:
        return Resources(
            self.cpu_milli - other.cpu_milli,
            self.memory_bytes - other.memory_bytes,
            self.gpu_milli - other.gpu_milli,
        )

    def times(self, count: int) -> Resources:
        return Resources(self.cpu_milli * count, self.memory_bytes * count, self.gpu_milli * count)

    def fits(self, free: Resources) -> bool:
        return (
            self.cpu_milli <= free.cpu_milli
            and self.memory_bytes <= free.memory_bytes
            and self.gpu_milli <= free.gpu_milli
        )


NOTHING = Resources()


@dataclass(frozen=True, slots=True)
class GpuShare:
    """Part (or all, 1000) of one GPU, given to one replica."""

    gpu: GpuId
    milli: int = WHOLE_GPU
