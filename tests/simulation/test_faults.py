"""Seeded faults: nodes, racks, GPUs and replicas fail, engine and store go away, servers die or pause at any call of a
port while another one leads. After every tick the invariants hold; in the end every job has ended and nothing is left.
Of four seeds, three play jobs of every sort under all that a server does by default, one plays gangs alone under other
policies.

`python -m tests.simulation.test_faults SEED` runs one seed again. BENCH=full runs a thousand.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import structlog

from jobsched.core.events import EVENT
from jobsched.core.policies.health import Health
from jobsched.sim.faults import Chaos, parse_faults
from jobsched.sim.mixed import mixed
from jobsched.sim.run import POLICIES, Simulation
from jobsched.sim.tally import SORTS
from jobsched.sim.workload import Rules, Workload, make_nodes, synthetic

SHOWN = (0, 1, 2, 4, 5, 6)
SEEDS = 1_000 if os.environ.get("BENCH") == "full" else 8
OFTEN = (
    "replica=5m,gpu=10m,node=10m,rack=1h,outage=20m,slow=20m,clock=1h,store=15m,crash=2m,leaders=4m,pool=30m,wish=5m"
)
DOUBTS = Health(threshold=1.5)
"""A node is put on probation sooner than by default, or a run of a few hours would hardly show it."""


def gangs(seed: int) -> Workload:
    nodes = tuple(replace(n, labels=(("rack", f"r{i // 4}"),)) for i, n in enumerate(make_nodes("8x8")))
    workload = synthetic(30, seed, "8x8", 0.9, 3_600.0)
    return replace(workload, nodes=nodes, rules=Rules(save_every_ms=600_000))


def play(seed: int) -> Chaos:
    """One seed to its end, verified."""
    policy = ("server", "server", "server", ("priority", "sjf", "las")[seed // 4 % 3])[seed % 4]
    workload = mixed(80, seed, "6x8", longest_s=3_600.0) if policy == "server" else gangs(seed)
    simulation = Simulation(workload, POLICIES[policy], policy, seed)
    if policy == "server":
        simulation.policy = replace(simulation.policy, health=DOUBTS)
    chaos = Chaos(simulation, parse_faults(OFTEN), 86_400_000, f"python -m tests.simulation.test_faults {seed}")
    chaos.run(limit_ticks=30_000)
    chaos.verify()
    assert sum(chaos.counts.values()) > 0
    return chaos


def digest(chaos: Chaos) -> str:
    log = b"\n".join(EVENT.dump_json(stored.event) for stored in chaos.sim.store.read(0, 1 << 30))
    return hashlib.sha256(log).hexdigest()


@pytest.fixture(autouse=True)
def _quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_is_lost_whatever_breaks(seed: int) -> None:
    play(seed)


def test_everything_that_should_survive_faults_happens_in_them() -> None:
    """Over a few seeds: a run in which, say, nobody ever shrinks proves nothing about shrinking."""
    seen: Counter[str] = Counter()
    for seed in SHOWN:
        seen += play(seed).tally.counts
    assert [sort for sort in SORTS if not seen[sort]] == []


def test_the_event_log_does_not_depend_on_the_hash_seed() -> None:
    found = set()
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "tests.simulation.test_faults", "4"]
        ended = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        )
        found.add(ended.stdout.split()[-1])
    assert len(found) == 1


def test_a_spec_of_faults() -> None:
    assert parse_faults("node=6h,crash") == {"node": 21_600_000, "crash": 7_200_000}
    with pytest.raises(ValueError, match="'fire' is not a kind of fault"):
        parse_faults("fire=1h")


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    played = play(int(sys.argv[1]))
    print(f"what happened: {played.tally}", file=sys.stderr)
    print(digest(played))
