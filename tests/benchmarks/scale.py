"""Growth: memory and tick time with 1,000 to 100,000 jobs waiting, and start-up with many finished ones.

`python -m tests.benchmarks.scale` prints one JSON line a figure. The ratio is to the smallest size of the same run: 1
is flat growth.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import psutil

from jobsched.core import events as ev
from jobsched.core.job import Phase
from jobsched.sim.backend import Script
from tests.world import World, a_spec

SIZES = (1_000, 10_000, 100_000)
CHANGES = 100
SHAPES = 20


def line(name: str, value: float, unit: str, peer: str = "", ratio: float | None = None) -> None:
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit, "peer": peer, "ratio": ratio}), flush=True)


def tick_ms(world: World) -> float:
    begin = time.perf_counter()
    world.controller.tick()
    return (time.perf_counter() - begin) * 1_000


def crowd(waiting: int) -> tuple[float, float, float]:
    """(median idle tick, median tick with one job ending and the next starting, MiB) with `waiting` jobs of 20 shapes
    behind a full cluster."""
    before = psutil.Process().memory_info().rss
    world = World(nodes=4, gpus=8, scripts=lambda launch: Script())
    roles = [{"worker": {"command": "x", "gpu": f"any:{1 + n % 8}", "cpu": f"{100 + n}m"}} for n in range(SHAPES)]
    specs = [a_spec(roles=role) for role in roles]
    fillers = [world.submit(a_spec(priority=1)) for _ in range(32)]
    world.tick(3)
    assert all(world.job(job_id).phase is Phase.RUNNING for job_id in fillers)
    for first in range(0, waiting, 1_000):
        world.store.append([
            ev.JobSubmitted(world.clock.now_ms(), f"w{first + n:07}", "w", "me", specs[n % SHAPES])  # type: ignore[arg-type]
            for n in range(1_000)
        ])
    world.controller.tick()
    world.controller.tick()
    memory = (psutil.Process().memory_info().rss - before) / 2**20
    idle = statistics.median(tick_ms(world) for _ in range(CHANGES))
    busy = []
    for _ in range(CHANGES):
        world.engine.kill(next(iter(world.engine.alive())), 9)
        busy += [tick_ms(world), tick_ms(world)]
        world.clock.advance_to(world.clock.now_ms() + 10)
    return idle, statistics.median(busy), memory


def main() -> None:
    sizes = SIZES[:2] if os.environ.get("BENCH") == "small" else SIZES
    first: tuple[float, float, float] | None = None
    for size in sizes:
        figures = crowd(size)
        first = first or figures
        peer = f"{sizes[0]} waiting"
        line(f"tick_idle_{size}_waiting", figures[0], "ms", peer, round(figures[0] / first[0], 2))
        line(f"tick_changing_{size}_waiting", figures[1], "ms", peer, round(figures[1] / first[1], 2))
        line(f"memory_{size}_waiting", figures[2], "MiB", peer, round(figures[2] / max(first[2], 0.1), 2))


if __name__ == "__main__":
    sys.exit(main())
