"""Expected starts beside what then happened: how many of the jobs that wait are told one, and how many of those have
started by the two ends of their bands, which claim a half and nine tenths.

`python -m tests.benchmarks.starts` prints one JSON line a figure; of a synthetic workload, with BENCH=full of October
of Philly too. Jobs are asked about when they are submitted. Nobody says how long they run and none has a time limit:
where Slurm, the only peer that tells an expected start, could tell none.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from jobsched.core import events as ev
from jobsched.core.forecast import expected, picture_for
from jobsched.core.job import Phase
from jobsched.core.plan import Forecast
from jobsched.core.resources import JobId
from jobsched.errors import NotFound
from jobsched.sim import traces
from jobsched.sim.run import POLICIES, Simulation
from jobsched.sim.workload import Workload, synthetic

POLICY = "server"
SLACK_MS = 1_000
"""A start is told to the second."""


@dataclass(frozen=True, slots=True)
class Calibration:
    asked: int
    told: int
    by_half: int
    """How many of those told had started by the early end of the band."""
    by_nine_tenths: int
    """And by the late one."""


def measured(workload: Workload, one_in: int) -> Calibration:
    """One in so many submissions is asked about, if it has to wait."""
    simulation = Simulation(workload, POLICIES[POLICY], POLICY)
    asked: dict[JobId, Forecast] = {}
    seq = count = 0
    going = True
    while going:
        going = simulation.step()
        for stored in simulation.store.read(seq):
            seq, event = stored.seq, stored.event
            if not isinstance(event, ev.JobSubmitted):
                continue
            count += 1
            with simulation.controller.view() as (cluster, _):
                job = cluster.jobs.get(event.job_id)
                if count % one_in or job is None or job.phase is not Phase.QUEUED:
                    continue
                picture = picture_for(cluster, job, event.at_ms, simulation.policy)
            asked[job.id] = expected(picture, job, event.at_ms, simulation.policy)
    told = {job_id: forecast for job_id, forecast in asked.items() if forecast.before_ms}
    started = {job_id: job.first_placed_at_ms for job_id in told if (job := simulation.store.job(job_id)) is not None}
    return Calibration(
        len(asked), len(told),
        sum(started[job_id] <= forecast.after_ms + SLACK_MS for job_id, forecast in told.items()),
        sum(started[job_id] <= forecast.before_ms + SLACK_MS for job_id, forecast in told.items()),
    )  # fmt: skip


def line(name: str, value: float, unit: str, peer: float, note: str) -> None:
    found = {"name": name, "value": round(value, 3), "unit": unit, "peer": peer, "ratio": round(value / peer, 3)}
    print(json.dumps({**found, "note": note}), flush=True)


def main() -> None:
    found = [("synthetic", synthetic(jobs=3_000, load=1.3), 5)]
    if os.environ.get("BENCH") == "full":
        try:
            found.append(("philly", traces.read("philly", "philly_2017-10", POLICY), 150))
        except NotFound as missing:
            print(json.dumps({"name": "starts-philly", "skipped": missing.message}), flush=True)
    for name, workload, one_in in found:
        seen = measured(workload, one_in)
        told = max(1, seen.told)
        line(f"starts-{name}-told", seen.told / max(1, seen.asked), "of jobs asked about", 1.0, f"{seen.asked} asked")
        line(f"starts-{name}-p50", seen.by_half / told, "started by the early end", 0.5, "peer: what it claims")
        line(f"starts-{name}-p90", seen.by_nine_tenths / told, "started by the late end", 0.9, "peer: what it claims")


if __name__ == "__main__":
    main()
