"""Parameter servers and workers numbered by what they bring, against ratios that stay as they are.

`python -m tests.benchmarks.served` prints one JSON line a figure: 100 jobs, with BENCH=full also three seeds at three
loads. The jobs' true speeds follow Optimus' formula (EuroSys'18) with coefficients that differ from job to job and
that nobody is told; jobs report the time of a step, 3 % off, once a minute; every start costs half a minute. 8 nodes of
8 GPUs and 64 CPUs. Peers, under the same policy: workers alone elastic, with four servers; one server for each four
workers, or each, for as many workers as users ask for.
"""

from __future__ import annotations

import json
import os
import time

from jobsched.sim.run import POLICIES, Simulation
from jobsched.sim.workload import RATIOS, served


def main() -> None:
    cases = [(100, 0.7, 0)]
    if os.environ.get("BENCH") == "full":
        cases += [(100, load, seed) for load in (0.4, 0.7, 1.0) for seed in range(3) if (load, seed) != (0.7, 0)]
    for jobs, load, seed in cases:
        jct: dict[str, float] = {}
        began = time.process_time()
        for ratio in RATIOS:
            result = Simulation(served(jobs, seed, ratio, load=load), POLICIES["elastic"], "elastic").run()
            jct[ratio] = result.summary.avg_jct_s
            if ratio == RATIOS[0]:
                minutes = result.summary.makespan_s / 60
                ours_ms, rescales = 1_000 * (time.process_time() - began) / minutes, result.summary.rescales
        for ratio in RATIOS[1:]:
            say(f"served-{load:g}-{seed}-{ratio}", jct["free"], "s average JCT", f"{ratio} {jct[ratio]:.1f}",
                jct[ratio] / jct["free"])  # fmt: skip
        say(f"served-{load:g}-{seed}-rescales", rescales / jobs, "changes of size a job", "", 0.0)
        say(f"served-{load:g}-{seed}-cpu", ours_ms, "ms of CPU a simulated minute, all of it", "", 0.0)


def say(name: str, value: float, unit: str, peer: str, ratio: float) -> None:
    row = {"name": name, "value": round(value, 3), "unit": unit, "peer": peer, "ratio": round(ratio, 4)}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
