"""The simulator against the papers' own simulators, and its speed: must-show rows 1 and 11 of the brain.

`python -m tests.benchmarks.simulate [NAME …]` prints one JSON line a figure: value, unit, the peer's figure, ratio.
"""

from __future__ import annotations

import json
import sys

from jobsched.errors import NotFound
from jobsched.sim import traces
from jobsched.sim.run import POLICIES, Simulation

FIGURES = {
    "equals-muri-srsf": ("muri", "trace3", "srsf", 185_021.88),
    "equals-muri-tiresias": ("muri", "trace3", "las", 347_213.25),
    "equals-pollux-tiresias": ("pollux", "workload-1.0_6", "las", 3_469.69),
    "equals-philly-fifo": ("philly", "philly_2017-10", "fifo", 79_139.0),
    "equals-philly-sjf": ("philly", "philly_2017-10", "sjf", 28_145.0),
}
"""Name -> (format, trace, policy, the paper's average JCT in seconds)."""
HELIOS_JOBS_PER_CPU_S = 155.0


def line(name: str, value: float, unit: str, peer: float, ratio: float) -> None:
    print(json.dumps({"name": name, "value": value, "unit": unit, "peer": peer, "ratio": round(ratio, 6)}), flush=True)


def main() -> None:
    for name in sys.argv[1:] or FIGURES:
        fmt, trace, policy, published_s = FIGURES[name]
        try:
            workload = traces.read(fmt, trace, policy)
        except NotFound as missing:
            print(json.dumps({"name": name, "skipped": missing.message}), flush=True)
            continue
        result = Simulation(workload, POLICIES[policy], policy).run()
        ours_s = result.summary.avg_jct_s
        line(name, ours_s, "s average JCT", published_s, published_s / ours_s)
        if fmt == "philly":
            speed = result.summary.jobs / result.cpu_s
            line(f"sim-speed-{policy}", round(speed, 1), "jobs/CPU-s", HELIOS_JOBS_PER_CPU_S,
                 speed / HELIOS_JOBS_PER_CPU_S)  # fmt: skip


if __name__ == "__main__":
    main()
