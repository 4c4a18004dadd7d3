"""Sampling of progress: seldom, but the last report of an attempt always."""

from __future__ import annotations

from jobsched.controller.telemetry import Sampler
from jobsched.core.job import Phase
from jobsched.core.observation import Observation, Progress, ReplicaReport, Seen, Sight
from jobsched.core.resources import NodeName
from tests.world import World


def test_a_last_report_that_comes_with_the_end_is_kept() -> None:
    """All in one observation, before the log knows of the end: the next look would find the job gone."""
    world = World()
    job_id = world.submit()
    world.run_to_phase(job_id, Phase.RUNNING)
    sight, sampler, now = Sight(), Sampler(), world.clock.now_ms()
    key = world.key(job_id, "worker", 0)

    def report(step: int, state: Seen, **metrics: float) -> None:
        progress = Progress(step=step, metrics=tuple(metrics.items()))
        code = 0 if state is Seen.EXITED else None
        seen = ReplicaReport(key, NodeName("n1"), state, exit_code=code, progress=progress)
        sight.fold(Observation(full=False, replicas=(seen,)), now)

    report(1, Seen.RUNNING, loss=2.0)
    assert len(sampler.samples(world.cluster, sight, [job_id], now)) == 1
    report(2, Seen.RUNNING, loss=1.0)
    assert sampler.samples(world.cluster, sight, [job_id], now + 10) == []
    report(2, Seen.EXITED, accuracy=0.97)
    assert [dict(s.metrics) for s in sampler.samples(world.cluster, sight, [job_id], now + 20)] == [{"accuracy": 0.97}]
