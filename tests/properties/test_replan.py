"""Orders that place everybody anew: looking at few of those that wait decides as looking at all of them does."""

from __future__ import annotations

from random import Random

import pytest

from jobsched.core.job import Job
from jobsched.core.policies import preemption
from jobsched.core.resources import JobId
from tests.benchmarks.cycle import FRUGAL, Bench

TICKS = 25


def lives(ordering: str, seed: int) -> list[dict[JobId, tuple[object, ...]]]:
    """What becomes of all jobs, tick by tick."""

    def shown(job: Job) -> tuple[object, ...]:
        return job.phase, job.attempt, *(replica.binding for replica in job.replicas.values())

    bench = Bench(12, 240, ordering)
    bench.random = Random(seed)
    bench.fold(bench.arrivals(bench.target))
    found = []
    for _ in range(TICKS):
        bench.run_pass()
        found.append({job_id: shown(job) for job_id, job in bench.cluster.jobs.items()})
        bench.now_ms += 400_000
        bench.fold(bench.changes())
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ordering", FRUGAL)
def test_few_are_as_good_as_all(ordering: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "FEW", 1_000_000)
    everybody = lives(ordering, seed)
    assert any(phase[0] != "RUNNING" for phase in everybody[-1].values())
    monkeypatch.setattr(preemption, "FEW", 1)
    monkeypatch.setattr(preemption, "DEEPER", 2)
    assert lives(ordering, seed) == everybody
