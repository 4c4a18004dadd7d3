"""Speed as a test: small sizes of the benchmarks against the baselines in `limits.toml`, with room for noise.

Costs are CPU time in units of one fixed loop of plain Python, timed in the same process just before, so that a slower
or busier machine measures about the same. `python -m tests.benchmarks.test_limits` prints the figures as they are here.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.job import RoleShape, Shape
from jobsched.core.policies.placement import Score, place_gang
from jobsched.sim.run import POLICIES, Simulation
from jobsched.sim.workload import make_node, synthetic
from tests.benchmarks import cycle
from tests.benchmarks.scale import tick_ms
from tests.world import World, a_spec

LIMITS = tomllib.loads((Path(__file__).parent / "limits.toml").read_text())
TRIES = 3
"""The best of so many counts."""


def unit_s() -> float:
    """CPU time of the loop that everything is compared to."""
    begin = time.process_time()
    table: dict[int, int] = {}
    for number in range(300_000):
        table[number % 1_000] = table.get(number % 1_000, 0) + number
    return time.process_time() - begin


def cycle_tick() -> float:
    """Median pass with EASY backfill over 200 nodes and 2,000 waiting gangs of which 1 % changed."""
    found = cycle.Bench(200, 2_000).measure()
    return sorted(found.ticks_ms)[len(found.ticks_ms) // 2] / 1_000 / unit_s()


def cycle_elastic() -> float:
    """Mean pass of all that a server does by default, with a tenth of the jobs elastic: sizes are reconsidered every
    ten."""
    found = cycle.Bench(200, 2_000, "elastic").measure()
    return sum(found.ticks_ms) / len(found.ticks_ms) / 1_000 / unit_s()


def cycle_cold() -> float:
    """A thousand bindings on an empty cluster of 200 nodes."""
    return 1_000 / cycle.Bench(200, 2_000).measure().bindings_per_s / unit_s()


def placed_shares() -> float:
    """A thousand placements by the fragmentation score, of jobs that ask for shares and whole GPUs."""
    random = Random(5)
    cluster = Cluster()
    for index in range(200):
        kind, gpus, cpus = (("a10", 4, 64), ("v100", 8, 96), ("t4", 2, 48))[index % 3]
        cluster.evolve(ev.NodeSeen(0, make_node(f"n{index:03}", gpus, kind, cpus * 1_000)))
    asked = [(500 * random.randint(2, 24), random.choice((100, 250, 400, 500, 1_000, 2_000))) for _ in range(40)]
    shapes = [Shape((RoleShape("w", 1, 1, cpu, 0, gpu, ports=0),)) for cpu, gpu in asked]
    begin = time.process_time()
    with cluster.ledger.trial():
        for _ in range(1_000):
            shape = random.choice(shapes)
            cluster.mix.learn(shape)
            place_gang(cluster, shape, (), Score.FRAGMENTATION)
        return (time.process_time() - begin) / unit_s()


def simulated_jobs() -> float:
    """A thousand simulated jobs through the real controller."""
    result = Simulation(synthetic(1_000, nodes="16x8"), POLICIES["priority"], "priority").run()
    return result.cpu_s / unit_s()


def waiting_growth() -> float:
    """Tick with 10,000 jobs waiting unchanged, relative to 1,000."""

    def idle(waiting: int) -> float:
        world = World(nodes=1, gpus=1)
        for _ in range(waiting):
            world.submit(a_spec(roles={"worker": {"command": "x", "gpu": "any:1"}}))
        world.controller.tick()
        world.controller.tick()
        return min(tick_ms(world) for _ in range(20))

    return idle(10_000) / idle(1_000)


def jct(policy: str) -> float:
    """Average JCT on a crowded cluster relative to least attained service. Deterministic."""

    def average_s(name: str) -> float:
        workload = synthetic(400, nodes="2x8", load=1.3)
        return Simulation(workload, POLICIES[name], name).run().summary.avg_jct_s

    return average_s(policy) / average_s("las")


FIGURES: dict[str, Callable[[], float]] = {
    "cycle-tick": cycle_tick, "cycle-elastic": cycle_elastic, "placed-shares": placed_shares, "cycle-cold": cycle_cold,
    "simulated-jobs": simulated_jobs, "waiting-growth": waiting_growth, "jct-learned": lambda: jct("learned"),
    "jct-silent": lambda: jct("silent"), "jct-knapsack": lambda: jct("knapsack"),
}  # fmt: skip


def test_every_limit_is_measured() -> None:
    assert LIMITS.keys() == FIGURES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_it_costs_no_more_than_it_did(name: str) -> None:
    limit = LIMITS[name]["baseline"] * LIMITS[name]["room"]
    costs = []
    for _ in range(TRIES):
        costs.append(FIGURES[name]())
        if costs[-1] <= limit:
            return
    pytest.fail(f"{name} costs {min(costs):.3f}, more than {limit:g}: see limits.toml")


if __name__ == "__main__":
    for name, measure in FIGURES.items():
        baseline = LIMITS[name]["baseline"]
        cost = measure()
        print(json.dumps({"name": f"limit-{name}", "value": round(cost, 4), "unit": "fixed loops", "peer": baseline,
                          "ratio": round(cost / baseline, 3)}))  # fmt: skip
