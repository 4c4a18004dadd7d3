"""The scheduling cycle at size: must-show row 8 of the brain.

`python -m tests.benchmarks.cycle [easy|server|elastic|learned|shortest] …`: N nodes of 8 GPUs, W waiting gangs of 1-64
GPUs (half in replicas of one GPU, half in whole nodes and a rest) of 4 queues and 3 priorities. Measured on a
`Cluster` that folds events as the controller's does, with EASY backfill alone (`easy`) or with all that a server does
by default (`server`: fair turns, preemption, elasticity, defragmentation too), then with a tenth of the jobs elastic,
of which half grow and shrink in place, and which report their speed (`elastic`): the cold passes that fill the empty
cluster, in bindings per second of `schedule`; then ticks in each of which 1 % of the running jobs end, 1 % of the
waiting ones are cancelled and as many are submitted anew: the time to fold these events (about 2 % of the jobs
change), the pass with the folding of its decisions, and both. Times are CPU time. One JSON line a figure; the ratio is
to the smallest size, 1 is no growth. BENCH=full: all sizes. ONE_IN=200: half as many come and go, so that 1 % of the
jobs change.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from jobsched.controller.longevity import prepare, settle
from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.job import Cause, Outcome, Phase, Reason, ReplicaState
from jobsched.core.node import Node
from jobsched.core.passes import Policy
from jobsched.core.policies.backfill import Backfill
from jobsched.core.policies.goodput import Report, SpeedModel
from jobsched.core.resources import JobId
from jobsched.core.schedule import schedule
from jobsched.sim.workload import gang_spec, make_node
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec
from jobsched.spec.server import PolicyConfig
from jobsched.wiring import _policy as server_policy

NODES = (1_000, 5_000, 10_000)
WAITING = (10_000, 100_000)
QUEUES = 4
TICKS = 200
FRUGAL = ("learned", "shortest")
"""Orderings that place everybody anew and look at the first of each kind of jobs that waits."""
ONE_IN = int(os.environ.get("ONE_IN", 100))
SERVER = server_policy(PolicyConfig(), ())
POLICIES = {"easy": Policy(backfill=Backfill()), "server": SERVER, "elastic": SERVER,
            **{by: server_policy(PolicyConfig.model_validate({"ordering": by}), ()) for by in FRUGAL}}
ELASTIC_IN = 10
"""One job in so many is elastic, where some are."""
COMPLETED = Outcome(Phase.SUCCEEDED, Reason.COMPLETED)
CANCELLED = Cause(Reason.CANCELLED)


@cache
def spec(gpus: int, single: bool, queue: int, priority: int) -> JobSpec:
    made = gang_spec(gpus, 8, queue=f"q{queue}", single=single)
    return made.model_copy(update={"priority": priority})


@cache
def elastic_spec(gpus: int, in_place: bool, queue: int, priority: int) -> JobSpec:
    """Half to twice as many workers of one GPU."""
    replicas = {"min": max(1, gpus // 2), "max": 2 * gpus, "prefer": gpus}
    role = {"command": "train", "cpu": "1m", "gpu": "any:1", "replicas": replicas,
            "restart": {"scope": "replica" if in_place else "job"}}  # fmt: skip
    return JobSpec.model_validate({"roles": {"worker": role}, "queue": f"q{queue}", "priority": priority})


def any_spec(random: Random, elastic: bool = False) -> JobSpec:
    """Mostly small, up to 64 GPUs."""
    gpus = min(64, int(random.paretovariate(0.7)))
    if elastic and random.randrange(ELASTIC_IN) == 0:
        gpus = 1 << gpus.bit_length() - 1
        return elastic_spec(gpus, random.random() < 0.5, random.randrange(QUEUES), random.randrange(3))
    return spec(gpus, random.random() < 0.5, random.randrange(QUEUES), random.randrange(3))


def drawn(ids: list[JobId], random: Random) -> JobId:
    """Any of them, taken out."""
    at = random.randrange(len(ids))
    ids[at], ids[-1] = ids[-1], ids[at]
    return ids.pop()


@dataclass(slots=True)
class Figures:
    bindings_per_s: float
    ticks_ms: list[float]
    """Passes."""
    folding_ms: list[float]
    started: int

    def quantile(self, name: str, percent: int) -> float:
        """Of passes, folding, or both together (nearest rank)."""
        both = [one + other for one, other in zip(self.ticks_ms, self.folding_ms, strict=True)]
        times = {"pass": self.ticks_ms, "folding": self.folding_ms, "tick": both}[name]
        return sorted(times)[-(-len(times) * percent // 100) - 1]


class Bench:
    def __init__(self, nodes: int, waiting: int, policy: str = "easy") -> None:
        self.policy, self.elastic = POLICIES[policy], policy == "elastic"
        self.random = Random(7)
        self.cluster = Cluster(rank=self.policy.rank, alike=self.policy.alike)
        self.now_ms = 1_000
        self.serial = 0
        for queue in range(QUEUES):
            self.cluster.evolve(ev.QueueDefined(0, QueueSpec(name=f"q{queue}")))
        for index in range(nodes):
            self.cluster.evolve(ev.NodeSeen(0, self.node(index)))
        self.waiting: list[JobId] = []
        self.running: list[JobId] = []
        self.stopping: list[ev.AttemptStopping] = []
        self.moving: dict[JobId, None] = {}
        """Jobs some of whose replicas come or go."""
        self.resized = 0
        self.target = waiting

    @staticmethod
    def node(index: int) -> Node:
        return make_node(f"n{index:05}", 8, labels=(("rack", f"r{index // 32:03}"),))

    def arrivals(self, count: int) -> list[ev.JobEvent]:
        found: list[ev.JobEvent] = []
        for _ in range(count):
            self.serial += 1
            job_id = JobId(f"j{self.serial:07}")
            found.append(ev.JobSubmitted(self.now_ms, job_id, job_id, "me", any_spec(self.random, self.elastic)))
            self.waiting.append(job_id)
        return found

    def fold(self, events: list[ev.JobEvent]) -> None:
        for event in events:
            self.cluster.evolve(event)

    def run_pass(self) -> int:
        """Schedule and fold; returns the bindings made."""
        plan = schedule(self.cluster, self.now_ms, self.policy)
        bindings = 0
        for decision in plan.decisions:
            self.cluster.evolve(decision)
            if isinstance(decision, ev.AttemptStopping):
                self.stopping.append(decision)
                self.resized += decision.outcome.reason is Reason.RESCALED
                continue
            if isinstance(decision, ev.ReplicasBound | ev.ReplicasReleased):
                self.moving[decision.job_id] = None
                self.resized += 1
                continue
            assert isinstance(decision, ev.AttemptPlaced)
            bindings += len(decision.bindings)
            started = tuple(binding.id for binding in decision.bindings)
            self.cluster.evolve(ev.AttemptStarted(self.now_ms, decision.job_id, decision.attempt, started))
            self.running.append(decision.job_id)
        self.cluster.touched.clear()
        return bindings

    def changes(self) -> list[ev.JobEvent]:
        """One in `ONE_IN` of those that run ends, of those that wait is cancelled; as many are submitted. Who had to
        leave, left."""
        found: list[ev.JobEvent] = []
        for event in self.stopping:
            found.append(ev.AttemptEnded(self.now_ms, event.job_id, event.attempt, event.outcome.phase))
            self.waiting.append(event.job_id)
            self.running.remove(event.job_id)
        self.stopping.clear()
        for job_id in self.moving:
            found += self.moved(job_id)
        self.moving.clear()
        for _ in range(max(1, len(self.running) // ONE_IN)):
            job = self.cluster.jobs[drawn(self.running, self.random)]
            found.append(ev.AttemptStopping(self.now_ms, job.id, job.attempt, COMPLETED))
            found.append(ev.AttemptEnded(self.now_ms, job.id, job.attempt, Phase.SUCCEEDED))
        cancelled: dict[JobId, None] = {}
        while len(cancelled) < self.target // ONE_IN:
            waiter = self.cluster.jobs.get(drawn(self.waiting, self.random))
            if waiter is not None and waiter.phase is Phase.QUEUED and waiter.id not in cancelled:
                found.append(ev.JobEnded(self.now_ms, waiter.id, Phase.CANCELLED, CANCELLED))
                cancelled[waiter.id] = None
        return found + self.arrivals(self.target + len(cancelled) - self.cluster.waiting_count())

    def moved(self, job_id: JobId) -> Iterator[ev.JobEvent]:
        """Replicas that were to come run, and those that were to leave have left."""
        job = self.cluster.jobs.get(job_id)
        if job is None or job.phase is not Phase.RUNNING:
            return
        at = (self.now_ms, job_id, job.attempt)
        states = {state: tuple(r.id for r in job.replicas.values() if r.state is state) for state in ReplicaState}
        if came := states[ReplicaState.BOUND]:
            yield ev.ReplicasStarted(*at, came)
        if left := states[ReplicaState.STOPPING]:
            yield ev.ReplicasGone(*at, left)

    def report(self) -> None:
        """Of the elastic jobs, those that have not since their size changed tell their speed, and of the others as many
        as change."""
        cluster = self.cluster
        for job_id in cluster.elastic:
            job, model = cluster.jobs[job_id], cluster.speeds.setdefault(job_id, SpeedModel())
            bound = [r for r in job.replicas.values() if r.binding is not None]
            size = len(bound), 0
            if job.phase is not Phase.RUNNING or (model.shown(job.attempt, size) and self.random.randrange(ONE_IN)):
                continue
            compute_s = 0.1 + 0.001 * (int(job_id[1:]) % 100)
            step_s = compute_s * (1.0 + 0.02 * len(bound))
            nodes = len({r.binding.node for r in bound if r.binding is not None})
            model.note(Report(nodes, len(bound), 1.0, step_s, step_s - compute_s))
            model.passed(job.attempt, size, self.now_ms, -1, self.now_ms)

    def measure(self) -> Figures:
        prepare()
        self.fold(self.arrivals(self.target))
        settle()
        bindings, begin = 0, time.process_time()
        while made := self.run_pass():
            bindings += made
        cold_s = time.process_time() - begin
        self.fold(self.arrivals(self.target - self.cluster.waiting_count()))
        started, ticks, folding = 0, [], []
        for tick in range(TICKS + 10):
            self.now_ms += 1_000
            events = self.changes()
            begin = time.process_time()
            self.fold(events)
            if self.elastic:
                self.report()
            changed = time.process_time()
            before = len(self.running)
            self.run_pass()
            settle()
            ended = time.process_time()
            if tick >= 10:
                folding.append(1_000 * (changed - begin))
                ticks.append(1_000 * (ended - changed))
                started += len(self.running) - before
        return Figures(bindings / cold_s, ticks, folding, started)


def line(name: str, value: float, unit: str, peer: str, ratio: float) -> None:
    figures = {"name": name, "value": round(value, 3), "unit": unit, "peer": peer, "ratio": round(ratio, 3)}
    print(json.dumps(figures), flush=True)


def main() -> None:
    full = os.environ.get("BENCH") == "full"
    first: dict[str, Figures] = {}
    sizes = [(n, w) for n in (NODES if full else NODES[:1]) for w in (WAITING if full else WAITING[:1])]
    for policy in sys.argv[1:] or ("easy", "server"):
        for nodes, waiting in sizes:
            found = Bench(nodes, waiting, policy).measure()
            base = first.setdefault(policy, found)
            name, peer = f"cycle-{policy}-{nodes}x{waiting}", f"{NODES[0]}x{WAITING[0]}"
            for part in ("tick", "pass", "folding"):
                for percent in (50, 99):
                    value = found.quantile(part, percent)
                    line(f"{name}-{part}-p{percent}", value, "ms", peer, value / base.quantile(part, percent))
            line(f"{name}-started", found.started / TICKS, "gangs/tick", peer, found.started / max(1, base.started))
            line(f"{name}-cold", found.bindings_per_s, "bindings/CPU-s", "10000", found.bindings_per_s / 10_000)


if __name__ == "__main__":
    main()
