"""A day of a 64-node cluster in which things break: what is lost, and that nothing else is (must-show row 12).

`python -m tests.benchmarks.faults [FIRST [COUNT]]` runs these seeds (default: one; BENCH=full: a thousand) and prints
one JSON line a figure. Each seed runs twice: without faults, and while nodes, GPUs and replicas fail once an hour per
100 nodes, servers die at any call of a port and two of them lead by turns. The invariants hold after every tick, every
job ends, nothing is left running; goodput is the work done per GPU-hour held, beside that of the run without faults.
Jobs save every ten minutes and need half a minute to start.

One seed in ten is also played with jobs of every sort, elastic ones and nodes on demand among them, under all that a
server does by default; of these the average completion time beside that without faults is told, and how often what
happened.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace

import structlog

from jobsched.core.accounting import Accounts
from jobsched.sim.faults import Chaos, parse_faults
from jobsched.sim.mixed import mixed
from jobsched.sim.run import POLICIES, Simulation
from jobsched.sim.tally import SORTS
from jobsched.sim.workload import Rules, Workload, make_nodes, synthetic

NODES = "64x8"
JOBS = 1_200
DAY_MS = 86_400_000
START_MS = 30_000
SAVE_EVERY_MS = 600_000
FAULTS = "node=3h,gpu=6h,replica=6h,crash=1h,leaders=2h"
"""Node, GPU and replica failures together: one in 94 minutes, which is one an hour per 100 nodes."""
PER_POLICY = ("priority", "sjf", "fifo")
MIXED_EVERY, MIXED_JOBS = 10, 1_200


def workload(seed: int) -> Workload:
    nodes = tuple(replace(n, labels=(("rack", f"r{i // 8}"),)) for i, n in enumerate(make_nodes(NODES)))
    made = synthetic(JOBS, seed, NODES, longest_s=43_200, median_s=5_400)
    arrivals = tuple(replace(a, work=replace(a.work, start_ms=START_MS)) for a in made.arrivals)  # type: ignore[type-var]
    return replace(made, nodes=nodes, arrivals=arrivals, rules=Rules(save_every_ms=SAVE_EVERY_MS))


def held_ms(accounts: Accounts) -> int:
    return sum(job.gpu_ms for job in accounts.jobs.values())


def play(seed: int) -> tuple[float, int, int]:
    """(goodput beside the run without faults, faults, ticks); raises when something is broken."""
    policy = PER_POLICY[seed % len(PER_POLICY)]
    calm = Simulation(workload(seed), POLICIES[policy], policy, seed).run()
    simulation = Simulation(workload(seed), POLICIES[policy], policy, seed)
    chaos = Chaos(simulation, parse_faults(FAULTS), DAY_MS, f"python -m tests.benchmarks.faults {seed}")
    chaos.run()
    chaos.verify()
    return held_ms(calm.accounts) / held_ms(simulation.result().accounts), sum(chaos.counts.values()), simulation.ticks


def play_mixed(seed: int) -> tuple[float, Chaos]:
    """(average completion time without faults beside that with them, what broke and what it led to); raises when
    something is broken."""
    made = mixed(MIXED_JOBS, seed, NODES, longest_s=43_200, median_s=5_400)
    calm, broken = (Simulation(made, POLICIES["server"], "server", seed) for _ in range(2))
    chaos = Chaos(broken, parse_faults(f"{FAULTS},pool=3h"), DAY_MS, f"python -m tests.benchmarks.faults {seed}")
    chaos.run()
    chaos.verify()
    return calm.run().summary.avg_jct_s / broken.result().summary.avg_jct_s, chaos


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    first = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000 if os.environ.get("BENCH") == "full" else 1
    began = time.process_time()
    runs = [play(seed) for seed in range(first, first + count)]
    goodput = [ratio for ratio, _, _ in runs]
    faults = sum(number for _, number, _ in runs)
    mean = sum(goodput) / len(goodput)
    for name, value, unit, peer in (
        ("faults-goodput-mean", round(100 * mean, 2), "% of the run without faults", 95.0),
        ("faults-goodput-worst", round(100 * min(goodput), 2), "% of the run without faults", 95.0),
    ):
        print(json.dumps({
            "name": name, "value": value, "unit": unit, "peer": peer, "ratio": round(value / peer, 4), "seeds": count,
            "faults": faults, "ticks": sum(ticks for _, _, ticks in runs), "broken": 0,
            "cpu_s": round(time.process_time() - began, 1),
        }), flush=True)  # fmt: skip
    seeds = [seed for seed in range(first, first + count) if seed % MIXED_EVERY == 0 or count == 1]
    if not seeds:
        return
    began, happened, ratios, ticks, struck = time.process_time(), Counter[str](), list[float](), 0, 0
    for seed in seeds:
        ratio, chaos = play_mixed(seed)
        ratios.append(ratio)
        happened += chaos.tally.counts
        ticks, struck = ticks + chaos.sim.ticks, struck + sum(chaos.counts.values())
    value = round(100 * sum(ratios) / len(ratios), 2)
    print(json.dumps({
        "name": "faults-mixed-jct", "value": value, "unit": "% of the speed without faults", "peer": 100.0,
        "ratio": round(value / 100, 4), "seeds": len(seeds), "faults": struck, "ticks": ticks, "broken": 0,
        "cpu_s": round(time.process_time() - began, 1), "happened": {sort: happened[sort] for sort in SORTS},
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
