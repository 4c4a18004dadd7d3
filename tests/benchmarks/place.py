"""Placement on Alibaba's GPU-sharing cluster, as in FGD (ATC'23): must-show row 2 of the brain.

`python -m tests.benchmarks.place [LIST …]`: pods of a list are shuffled by the seed, drawn again until 130 % of the
cluster's GPUs are asked for, and placed one at a time by `place_gang` on a real `Cluster`; nothing leaves, what does
not fit is dropped. One JSON line a figure: the share of the GPUs left unallocated, in percent, and its ratio to the
expected file's mean (for FGD's own scores it should be 1; for ours below 1 is better), and pods per CPU-second.
The published shuffle is reproduced in distribution, not seed by seed. BENCH=full: ten lists, ten seeds.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from math import exp, log
from random import Random

from jobsched.controller.longevity import settle
from jobsched.core.cluster import Cluster
from jobsched.core.events import NodeSeen
from jobsched.core.job import RoleShape, Shape
from jobsched.core.ledger import GpuClass, Space
from jobsched.core.policies.fragmentation import BestFit, Gradient, Packing, demand_of
from jobsched.core.policies.placement import Choice, Gang, Score, place_gang
from jobsched.core.policies.ranking import Pool, Rated
from jobsched.core.resources import WHOLE_GPU, NodeName
from jobsched.core.shape import shape_of
from jobsched.errors import NotFound
from jobsched.sim import traces
from jobsched.sim.rows import rows

LISTS = (
    "default", "cpu050", "cpu100", "cpu250", "gpushare40", "gpushare100", "gpuspec10", "gpuspec33", "multigpu20",
    "multigpu50",
)  # fmt: skip
SEEDS = range(42, 52)
TICK = 100
"""Pods between two calls of what the controller calls after every tick."""
ARRIVES = 1.3
FGD_PODS_PER_CPU_S = 2.7
PUBLISHED = {"random": "01-Random", "packing": "04-GpuPacking", "bestfit": "05-BestFit", "fgd": "06-FGD"}
OURS = "fragmentation"


@dataclass(frozen=True, slots=True)
class Anywhere:
    """FGD's baseline `Random`: any node, any GPU that has room. Like nodes are drawn as one, by their number."""

    random: Random
    nodes: Pool
    steady: bool = True
    by_name: bool = False

    @property
    def version(self) -> int:
        """Every question is drawn for anew."""
        return self.random.getrandbits(62)

    def rate(self, space: Space, cls: GpuClass, role: RoleShape) -> Rated:
        milli = role.gpu_milli
        share = 0 < milli < WHOLE_GPU
        levels = [level for level in space.levels(cls) if level >= milli] if share else [WHOLE_GPU]
        like = len(self.nodes.groups[space.cpu_milli, space.memory_bytes, space.gpu_state()].names)
        return Rated(-int(self.random.expovariate(like) * (1 << 60)), self.random.choice(levels))


@cache
def pods(name: str) -> tuple[Shape, ...]:
    path = traces.find("openb", f"openb_pod_list_{name}")
    table = sorted(rows(path), key=lambda row: row["name"])
    return tuple(shape_of(traces.openb_spec(row)) for row in table)


def gpu_milli(shape: Shape) -> int:
    return shape.roles[0].gpu_milli


def arrivals(listed: tuple[Shape, ...], capacity_milli: int, random: Random) -> list[Shape]:
    """Shuffled; then pods drawn again at random, or dropped at random, until 130 % of the capacity is asked for."""
    found = list(listed)
    random.shuffle(found)
    asked = sum(map(gpu_milli, found))
    while asked > ARRIVES * capacity_milli:
        asked -= gpu_milli(found.pop(random.randrange(len(found))))
    while True:
        drawn = random.choice(listed)
        if asked + min(gpu_milli(drawn), WHOLE_GPU) > ARRIVES * capacity_milli:
            return found
        asked += gpu_milli(drawn)
        found.append(drawn)


def empty_cluster(random: Random) -> Cluster:
    """The 1,213 GPU nodes. Their names, which decide between equals, are in random order, as in FGD's simulator."""
    nodes = list(traces.openb_nodes())
    random.shuffle(nodes)
    cluster = Cluster()
    for place, node in enumerate(nodes):
        cluster.evolve(NodeSeen(0, replace(node, name=NodeName(f"{place:04}-{node.name}"))))
    return cluster


def choice(policy: str, name: str, random: Random, cluster: Cluster) -> Choice:
    if policy == "fgd":
        return Gradient.of(Counter(demand_of(shape.roles[0]) for shape in pods(name)))
    if policy == "random":
        return Anywhere(random, cluster.fleet.pool(pods(name)[0]))
    baselines: dict[str, Choice] = {"packing": Packing(), "bestfit": BestFit()}
    return baselines.get(policy) or Score(policy)


def place(name: str, seed: int, policy: str) -> tuple[float, int, float]:
    """(unallocated GPUs in percent, pods that came, CPU seconds of learning and placing)."""
    random = Random(seed)
    cluster = empty_cluster(random)
    capacity = sum(WHOLE_GPU * len(node.gpus) for node in cluster.fleet.nodes.values())
    coming = arrivals(pods(name), capacity, random)
    how = choice(policy, name, random, cluster)
    used = 0
    begin = time.process_time()
    with cluster.ledger.trial():
        for number, shape in enumerate(coming):
            if number % TICK == 0:
                settle()
            cluster.mix.learn(shape)
            if isinstance(place_gang(cluster, shape, (), how), Gang):
                used += gpu_milli(shape)
        cpu_s = time.process_time() - begin
    return 100 - 100 * used / capacity, len(coming), cpu_s


@cache
def expected() -> dict[tuple[str, str], float]:
    """(list, policy of the paper) -> mean unallocated percent of its ten seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    with gzip.open(traces.find("openb", "expected_analysis_allo_discrete"), "rt") as file:
        for row in csv.DictReader(file):
            key = (row["workload"].removeprefix("openb_pod_list_"), row["sc_policy"])
            found.setdefault(key, []).append(100 - float(row["130"]))
    return {key: statistics.mean(values) for key, values in found.items()}


def line(name: str, value: float, unit: str, peer: str, ratio: float) -> None:
    figures = {"name": name, "value": round(value, 4), "unit": unit, "peer": peer, "ratio": round(ratio, 4)}
    print(json.dumps(figures), flush=True)


def main() -> None:
    full = os.environ.get("BENCH") == "full"
    lists = sys.argv[1:] or (LISTS if full else ("default", "gpuspec33"))
    seeds = SEEDS if full else SEEDS[:1]
    policies = ("random", "bestfit", "packing", "fgd", OURS) if full else ("fgd", OURS)
    try:
        expected()
    except NotFound as missing:
        print(json.dumps({"name": "place-openb", "skipped": missing.message}), flush=True)
        return
    ratios = []
    for name in lists:
        for policy in policies:
            runs = [place(name, seed, policy) for seed in seeds]
            left = statistics.mean(run[0] for run in runs)
            peer = PUBLISHED.get(policy, PUBLISHED["fgd"])
            published = expected()[name, peer]
            ratio = left / published
            line(f"place-openb-{name}-{policy}", left, "% unallocated", f"{peer[3:]} {published:.2f}", ratio)
            if policy == OURS:
                ratios.append(ratio)
                speed = sum(run[1] for run in runs) / sum(run[2] for run in runs)
                line(f"place-speed-{name}", speed, "pods/CPU-s", "FGD's engine", speed / FGD_PODS_PER_CPU_S)
    if ratios:
        mean = exp(statistics.mean(map(log, ratios)))
        line("place-openb-geomean", 100 * mean, "% of FGD's unallocated GPUs", "FGD", mean)


if __name__ == "__main__":
    main()
