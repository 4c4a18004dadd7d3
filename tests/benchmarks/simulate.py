"""The simulator against the papers' own simulators, and its speed: must-show rows 1 and 11 of the brain.

`python -m tests.benchmarks.simulate [NAME …]` prints one JSON line a figure: value, unit, the peer's figure, ratio.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor

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


def measured(name: str) -> list[tuple[str, float, str, float, float]]:
    """The figures of one run: (name, value, unit, the peer's, ratio). Raises `NotFound` where the trace is missing."""
    fmt, trace, policy, published_s = FIGURES[name]
    result = Simulation(traces.read(fmt, trace, policy), POLICIES[policy], policy).run()
    ours_s = result.summary.avg_jct_s
    found = [(name, ours_s, "s average JCT", published_s, published_s / ours_s)]
    if fmt == "philly":
        speed, peer = result.summary.jobs / result.cpu_s, HELIOS_JOBS_PER_CPU_S
        found.append((f"sim-speed-{policy}", round(speed, 1), "jobs/CPU-s", peer, speed / peer))
    return found


def main() -> None:
    """Each run in a process of its own, as `jobsched simulate` is: what one has left in memory slows no other down."""
    with ProcessPoolExecutor(max_workers=1, max_tasks_per_child=1) as fresh:
        for name in sys.argv[1:] or FIGURES:
            try:
                for figure in fresh.submit(measured, name).result():
                    line(*figure)
            except NotFound as missing:
                print(json.dumps({"name": name, "skipped": missing.message}), flush=True)


if __name__ == "__main__":
    main()
