"""KAI-Scheduler's scale tests: a full cluster, an owner who wants it back, and gangs that need holes in it.

500 simulated nodes of 8 GPUs. *fill*: 4,000 jobs of one GPU, of a queue without quota, borrow all of it. *reclaim one*:
a job of the queue that owns the quota gets its GPU back. *reclaim all*: so do 3,999 more. *consolidate*: on a cluster
where every node is half full of such jobs, 41 gangs of two whole nodes and of higher priority find room, and those who
stood in the way run again in the holes.

The real controller and core with SQLite, on a simulated engine in virtual time, so that what is measured is deciding
and writing: seconds of CPU, and on the wall with every commit synced, from the first submission until everything runs.
KAI's figures (its scale tests, on nodes that are simulated too) are wall time and include Kubernetes' binding and pod
starts. `python -m tests.benchmarks.fill` prints JSON lines: name, value, unit, peer and ratio (> 1: better than peer).
Without BENCH=full: 50 nodes, no peers.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable

from jobsched.controller.loop import Controller
from jobsched.core import events as ev
from jobsched.core.job import Phase
from jobsched.core.passes import Policy
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.victims import Preemption
from jobsched.core.resources import JobId
from jobsched.ports import Store
from jobsched.sim.backend import Script, SimBackend
from jobsched.sim.clock import SimClock
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec
from jobsched.store.sql import SqlStore
from tests.world import a_gpu_node, a_spec

FULL = os.environ.get("BENCH") == "full"
NODES, GPUS = 500 if FULL else 50, 8
GANGS = 41 if FULL else 4
KAI_S = {"fill": 398.0, "reclaim one": 13.9, "reclaim all": 694.0, "consolidate": 456.0}


class Cluster:
    """A controller over a simulated engine; time passes only when nothing is left to do."""

    def __init__(self, store: Store, queues: tuple[QueueSpec, ...]) -> None:
        self.clock = SimClock()
        self.store = store
        nodes = [a_gpu_node(f"n{i:04}", GPUS, port_lo=0, port_hi=0) for i in range(NODES)]
        self.engine = SimBackend(self.clock, nodes, lambda launch: Script())
        policy = Policy(fair=FairShare(), preemption=Preemption(min_runtime_ms=0))
        self.controller = Controller(store, self.engine, self.clock, policy, queues=queues)
        self.serial = 0
        self.controller.tick()

    def submit(self, spec: JobSpec, count: int) -> None:
        events: list[ev.Event] = []
        for _ in range(count):
            self.serial += 1
            job_id = JobId(f"j{self.serial:06}")
            events.append(ev.JobSubmitted(self.clock.now_ms(), job_id, job_id, "me", spec))
        self.store.append(events)

    def halve(self) -> None:
        """Every other job of each node is cancelled."""
        with self.controller.view() as (cluster, _):
            ids = [job_id for node in sorted(cluster.fleet.nodes) for job_id in list(cluster.fleet.jobs_on(node))[::2]]
        self.store.append([ev.JobCancelRequested(self.clock.now_ms(), job_id, "me") for job_id in ids])

    def running(self, queue: str) -> int:
        with self.controller.view() as (cluster, _):
            levels = cluster.active.get(queue, {})
            ids = [job_id for jobs in levels.values() for job_id in jobs]
            return sum(cluster.jobs[job_id].phase is Phase.RUNNING for job_id in ids)

    def seconds_until(self, done: Callable[[], bool]) -> tuple[float, float]:
        """Of CPU, and on the wall."""
        begin, began = time.process_time(), time.monotonic()
        for _ in range(10_000):
            self.controller.tick()
            if done():
                return time.process_time() - begin, time.monotonic() - began
            self.clock.advance_to(self.clock.now_ms() + 5)
        raise AssertionError(f"not done: {self.store.count('phase')}")


def one_gpu(queue: str) -> JobSpec:
    return a_spec(queue=queue, roles={"worker": {"command": "w", "gpu": "any:1", "cpu": 1}})


def main() -> None:
    total = NODES * GPUS
    with tempfile.TemporaryDirectory() as folder:
        owner = QueueSpec.model_validate({"name": "owner", "cohort": "all", "quota": {"gpus": total}})
        guest = QueueSpec.model_validate({"name": "guest", "cohort": "all"})
        store = SqlStore(f"sqlite:///{folder}/fill.db")
        cluster = Cluster(store, (owner, guest))
        gc.freeze()
        cluster.submit(one_gpu("guest"), total)
        say("fill", cluster.seconds_until(lambda: cluster.running("guest") == total))
        cluster.submit(one_gpu("owner"), 1)
        say("reclaim one", cluster.seconds_until(lambda: cluster.running("owner") == 1))
        cluster.submit(one_gpu("owner"), total - 1)
        say("reclaim all", cluster.seconds_until(lambda: cluster.running("owner") == total))
        store.close()

        store = SqlStore(f"sqlite:///{folder}/gangs.db")
        cluster = Cluster(store, (QueueSpec(name="guest"),))
        cluster.submit(one_gpu("guest"), total)
        cluster.seconds_until(lambda: cluster.running("guest") == total)
        cluster.halve()
        cluster.seconds_until(lambda: cluster.running("guest") == total // 2)
        worker = {"command": "w", "gpu": f"any:{GPUS}", "replicas": 2, "cpu": 1}
        cluster.submit(a_spec(queue="guest", priority=1, roles={"worker": worker}), GANGS)
        say("consolidate", cluster.seconds_until(lambda: cluster.running("guest") == total // 2 + GANGS))
        store.close()


def say(name: str, took: tuple[float, float]) -> None:
    for value, unit in zip(took, ("CPU-s", "s"), strict=True):
        line: dict[str, object] = {"name": f"fill: {name}", "value": round(value, 3), "unit": unit}
        if FULL:
            line |= {"peer": KAI_S[name], "ratio": round(KAI_S[name] / value, 3)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
