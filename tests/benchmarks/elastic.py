"""Elastic jobs against Pollux and Tiresias, on Pollux's own workloads and profiles: must-show row 5 of the brain.

`python -m tests.benchmarks.elastic [WORKLOAD …]` prints one JSON line a figure: without names of workload 6, with
BENCH=full of the published ones (1, 2, 3, 4, 6) and their mean; `0.5_1` is workload 1 at half the load. Peers are the
published averages. Our policy gets what Pollux's scheduler gets, or less: measurements that each running job reports
about itself once a minute (time of a pass, synchronisation, batch, gradient noise), never what is left of it, nor, but
for the time that changes of size took, what other jobs have shown. Rules of the paper's simulator: 16 nodes of 4 GPUs,
sizes reconsidered every 60 s, 30 s without progress at every start and change of size.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time

from jobsched.controller import loop
from jobsched.core.cluster import Cluster
from jobsched.core.passes import Policy
from jobsched.core.plan import Plan
from jobsched.core.schedule import schedule
from jobsched.errors import NotFound
from jobsched.sim import traces
from jobsched.sim.run import POLICIES, Result, Simulation

PUBLISHED = ("1", "2", "3", "4", "6")
LOAD = "1.0"
SIA_MS, POLLUX_MS = 96.0, 2_200.0
"""Median time of their policies in one cycle, from Sia (SOSP'23)."""



def line(name: str, value: float, unit: str, peer: str, ratio: float) -> None:
    row = {"name": name, "value": round(value, 3), "unit": unit, "peer": peer, "ratio": round(ratio, 4)}
    print(json.dumps(row), flush=True)


class Stopwatch:
    """CPU time of all scheduling passes at one instant: a cycle."""

    def __init__(self) -> None:
        self.cycles: dict[int, float] = {}

    def __call__(self, cluster: Cluster, now_ms: int, policy: Policy) -> Plan:
        begin = time.process_time()
        plan = schedule(cluster, now_ms, policy)
        self.cycles[now_ms] = self.cycles.get(now_ms, 0.0) + 1_000 * (time.process_time() - begin)
        return plan

    def quantile(self, share: float) -> float:
        """Of cycles at full minutes, in milliseconds: nothing is decided in between."""
        found = sorted(ms for now, ms in self.cycles.items() if now % 60_000 == 0)
        return found[min(len(found) - 1, int(share * len(found)))]


def load_of(number: str) -> str:
    return number.rpartition("_")[0] or LOAD


def run(number: str, watch: Stopwatch) -> Result:
    workload = traces.pollux(f"workload-{load_of(number)}_{number.rpartition('_')[2]}", elastic=True)
    untimed, loop.schedule = loop.schedule, watch  # type: ignore[assignment]
    try:
        return Simulation(workload, POLICIES["elastic"], "elastic").run()
    finally:
        loop.schedule = untimed


def main() -> None:
    try:
        with gzip.open(traces.find("pollux", "published_jct.json"), "rt") as file:
            published = json.load(file)
    except NotFound as missing:
        print(json.dumps({"name": "elastic-pollux", "skipped": missing.message}), flush=True)
        return
    numbers = tuple(sys.argv[1:]) or (PUBLISHED if os.environ.get("BENCH") == "full" else PUBLISHED[-1:])
    watch, rows = Stopwatch(), []
    for number in numbers:
        result = run(number, watch)
        row = (result.summary.avg_jct_s, *(
            published[f"{name}-{load_of(number)}"]["avg_jct_s"][f"workload-{number.rpartition('_')[2]}"]
            for name in ("pollux", "tiresias")
        ))
        rows.append(row)
        say(f"elastic-pollux-{number}", *row)
        line(f"elastic-pollux-{number}-rescales", result.summary.rescales, "changes of size", "", 0.0)
    if len(rows) > 1:
        say("elastic-pollux-mean", *(sum(column) / len(rows) for column in zip(*rows, strict=True)))
    for share in (0.5, 0.99):
        ms, peer = watch.quantile(share), f"Sia {SIA_MS:g}, Pollux {POLLUX_MS:g}"
        line(f"elastic-cycle-p{round(100 * share)}", ms, "ms of CPU", peer, SIA_MS / ms)


def say(name: str, ours_s: float, pollux_s: float, tiresias_s: float) -> None:
    line(name, ours_s, "s average JCT", f"Pollux {pollux_s:.1f}", pollux_s / ours_s)
    line(f"{name}-tiresias", ours_s, "s average JCT", f"Tiresias {tiresias_s:.1f}", tiresias_s / ours_s)


if __name__ == "__main__":
    main()
