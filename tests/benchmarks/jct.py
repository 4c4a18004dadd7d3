"""Who waits how long under which order: must-show rows 3, 4, 6 and 7 of the brain.

`python -m tests.benchmarks.jct [NAME …]` prints one JSON line a figure; BENCH=full: all of them, else those of seconds.
Each is an average JCT in seconds (or a count of deadlines), beside what it has to beat on the same trace.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass

from jobsched.errors import NotFound
from jobsched.sim import traces
from jobsched.sim.run import POLICIES, START_MS, Result, Simulation

TIRESIAS_S = {"trace1": 3_330_371.307, "trace3": 347_213.248, "trace1_pr": 6_921_682.793, "trace3_pr": 2_213_110.128}
SRSF_S = {"trace1": 980_140.57, "trace3": 185_021.88, "trace1_pr": 1_801_859.995, "trace3_pr": 798_057.683}
"""Published averages (Muri, SIGCOMM'22)."""
QSSF_S = 34_141.0
"""October of Philly with noisy estimates, by the simulator of Helios (SC'21)."""
SMALL = ("muri-learned-trace3", "muri-silent-trace3", "muri-knapsack-trace3")


@dataclass(frozen=True, slots=True)
class Figure:
    """One policy on one trace, and its peer: a published figure, or another policy that is run beside it."""

    fmt: str
    trace: str
    policy: str
    peer_s: float = 0.0
    peer: str = ""


FIGURES = {
    **{f"muri-knapsack-{name}": Figure("muri", name, "knapsack", peer) for name, peer in SRSF_S.items()},
    **{f"muri-{how}-{name}": Figure("muri", name, how, peer)
       for how in ("learned", "silent") for name, peer in TIRESIAS_S.items()},
    **{f"philly-{how}": Figure("philly", "philly_2017-10", how, QSSF_S) for how in ("guessed", "learned")},
    **{f"gavel-kinds-{vc}": Figure("gavel", f"msr_seed0_{vc}", "kinds", peer="blind")
       for vc in ("0e4a51", "2869ce", "103959", "e13805")},
    **{f"gavel-kinds-{name}": Figure("gavel", f"physical_{name}", "kinds", peer="blind")
       for name in ("max_min_fairness", "minimize_makespan")},
    "chronus-in-time": Figure("chronus", "trace_job_Philly_MIX1", "in-time", peer="edf"),
    "chronus-preempting": Figure("chronus", "trace_job_Philly_MIX1", "in-time", peer="edf-preempting"),
}  # fmt: skip


def run(figure: Figure, policy: str) -> tuple[Simulation, Result]:
    simulation = Simulation(traces.read(figure.fmt, figure.trace, policy), POLICIES[policy], policy)
    return simulation, simulation.run()


def line(name: str, value: float, unit: str, peer: float, ratio: float) -> None:
    print(json.dumps({"name": name, "value": round(value, 1), "unit": unit, "peer": peer, "ratio": round(ratio, 4)}),
          flush=True)  # fmt: skip


def deadlines(simulation: Simulation, result: Result) -> tuple[int, float]:
    """Deadlines met, and the average JCT in seconds of those that have none."""
    met, waited = 0, []
    for job_id, arrival in simulation.arrivals.items():
        job = result.accounts.jobs[job_id]
        if arrival.deadline_ms:
            met += job.ended_ms - START_MS <= arrival.deadline_ms
        else:
            waited.append(job.jct_ms / 1_000)
    return met, sum(waited) / max(1, len(waited))


def worst_queues(result: Result) -> dict[str, float]:
    """Average JCT in seconds by queue."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for job in result.accounts.jobs.values():
        found[job.queue].append(job.jct_ms)
    return {queue: sum(jcts) / len(jcts) / 1_000 for queue, jcts in sorted(found.items())}


def measure(name: str, figure: Figure) -> None:
    simulation, result = run(figure, figure.policy)
    ours_s, peer_s = result.summary.avg_jct_s, figure.peer_s
    if figure.peer:
        other, beside = run(figure, figure.peer)
        peer_s = beside.summary.avg_jct_s
        if figure.fmt == "chronus":
            (met, calm_s), (peer_met, peer_calm_s) = deadlines(simulation, result), deadlines(other, beside)
            line(f"{name}-met", met, "deadlines met", peer_met, met / peer_met)
            line(f"{name}-best-effort", calm_s, "s average JCT", round(peer_calm_s, 1), peer_calm_s / calm_s)
            return
    line(name, ours_s, "s average JCT", round(peer_s, 1), peer_s / ours_s)
    if figure.fmt == "philly":
        _, first_come = run(figure, "fifo")
        before = worst_queues(first_come)
        for queue, jct_s in worst_queues(result).items():
            line(f"{name}-{queue}", jct_s, "s average JCT", round(before[queue], 1), before[queue] / jct_s)


def main() -> None:
    for name in sys.argv[1:] or (FIGURES if os.environ.get("BENCH") == "full" else SMALL):
        try:
            measure(name, FIGURES[name])
        except NotFound as missing:
            print(json.dumps({"name": name, "skipped": missing.message}), flush=True)


if __name__ == "__main__":
    main()
