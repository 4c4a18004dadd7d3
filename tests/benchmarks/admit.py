"""How fast jobs get through: Kueue's performance test, against the real service.

5 cohorts of 6 queues, each with a quota of 20 CPUs and up to 100 more borrowed; per queue 350 jobs of 1 CPU for 0.2 s
(one every 100 ms), 100 of 5 CPUs for 0.5 s, one every 500 ms, and 50 of 20 CPUs for 1 s, one every 1.2 s (kueue,
test/performance/scheduler, default_generator_config.yaml). Submitted one by one over HTTP by another process; service,
controller and SQLite are the real ones on the real clock. Only the engine is not: its replicas are entries that end in
time, as Kueue's own test has no kubelets either.

`python -m tests.benchmarks.admit` prints JSON lines: name, value, unit, peer and ratio (> 1: better than peer). Peer
of the wall time is what quotas alone allow. BENCH=full: all 15,000 jobs; else a tenth of them.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from urllib.parse import urlsplit

from jobsched.core import events as ev
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.node import Node
from jobsched.core.observation import Observation
from jobsched.core.resources import NodeName
from jobsched.ports import Backend
from jobsched.sim.backend import Script, SimBackend
from jobsched.spec.queue import QueueSpec
from jobsched.spec.server import ServerConfig
from jobsched.wiring import Server, SystemClock, configure_logging

COHORTS, QUEUES, QUOTA, BORROW = 5, 6, 20, 100
CLASSES = {"small": (350, 100, 1, 200, 50), "medium": (100, 500, 5, 500, 100), "large": (50, 1_200, 20, 1_000, 200)}
"""Class -> (jobs per queue, milliseconds between two, CPUs, run time in milliseconds, priority)."""
SHRINK = 1 if os.environ.get("BENCH") == "full" else 10
CONNECTIONS = 8
KUEUE_S = 351.0
"""Wall time of the same test in Kueue's own CI."""


class NoopEngine(SimBackend):
    """The simulated engine on the real clock: it waits for what happens next, and may be called by several threads."""

    def __init__(self, clock: SystemClock, nodes: Sequence[Node]) -> None:
        super().__init__(clock, nodes, lambda launch: Script(run_ms=int(launch.command[-1])))
        self._changes = threading.Condition()
        self._now = clock.now_ms

    def observe(self, timeout_ms: int = 0) -> Observation:
        until = self._now() + timeout_ms
        with self._changes:
            while (at := self.next_event_ms()) is None or at > self._now():
                wait_ms = min(until, until if at is None else at) - self._now()
                if wait_ms <= 0 and self._now() >= until:
                    break
                self._changes.wait(max(wait_ms, 0.5) / 1_000)
            return super().observe()

    def start(self, launches: Sequence[Launch]) -> None:
        with self._changes:
            super().start(launches)
            self._changes.notify_all()

    def stop(self, keys: Sequence[LaunchKey], grace_ms: int) -> None:
        with self._changes:
            super().stop(keys, grace_ms)
            self._changes.notify_all()

    def forget(self, keys: Sequence[LaunchKey]) -> None:
        with self._changes:
            super().forget(keys)


class NoopServer(Server):
    def _make_backend(self) -> Backend:
        nodes = [Node(NodeName(f"n{i}"), 200_000, 2**40) for i in range(COHORTS * QUEUES * QUOTA // 100)]
        return NoopEngine(SystemClock(), nodes)


def queues() -> tuple[QueueSpec, ...]:
    return tuple(
        QueueSpec.model_validate({
            "name": f"q{cohort}-{queue}", "cohort": f"c{cohort}", "quota": {"cpu": QUOTA},
            "borrowing_limit": {"cpu": BORROW},
        })
        for cohort in range(COHORTS) for queue in range(QUEUES)
    )  # fmt: skip


def serve(home: str, total: int, say: multiprocessing.connection.Connection) -> None:
    """The server's process: tells its address, then when all jobs have ended and what each class waited."""
    configure_logging("warning")
    waits: dict[str, list[int]] = {name: [] for name in CLASSES}
    submitted: dict[str, tuple[str, int]] = {}
    done = threading.Event()
    ended = 0

    def listen(news: Sequence[ev.Stored], _: object) -> None:
        nonlocal ended
        for stored in news:
            event = stored.event
            if isinstance(event, ev.JobSubmitted):
                submitted[event.job_id] = (event.name.partition("-")[0], event.at_ms)
            elif isinstance(event, ev.AttemptPlaced) and event.attempt == 1:
                name, at_ms = submitted[event.job_id]
                waits[name].append(event.at_ms - at_ms)
            elif isinstance(event, ev.AttemptEnded) and event.phase.terminal:
                ended += 1
        if ended >= total:
            done.set()

    with NoopServer(ServerConfig(home=home, queues=queues())) as server:
        server.controller.subscribe(listen)
        say.send((server.url, server.token))
        begin = time.process_time()
        done.wait(600)
        at = time.monotonic()
        means = {name: fmean(found) / 1_000 for name, found in waits.items() if found}
        say.send((at, time.process_time() - begin, ended, means, server.controller.health.ticks))


def submit(url: str, token: str) -> float:
    """Post every job when it is due; returns when the first was."""
    plan = sorted(
        (at * every, f"q{cohort}-{queue}", name, cpus, run_ms, priority, at)
        for name, (count, every, cpus, run_ms, priority) in CLASSES.items()
        for at in range(count // SHRINK)
        for cohort in range(COHORTS)
        for queue in range(QUEUES)
    )
    address, lock, begin = urlsplit(url), threading.Lock(), time.monotonic()
    rows = iter(plan)

    def post() -> None:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        while True:
            with lock:
                row = next(rows, None)
            if row is None:
                return
            due_ms, queue, name, cpus, run_ms, priority, at = row
            time.sleep(max(0.0, begin + due_ms / 1_000 - time.monotonic()))
            spec = {"name": f"{name}-{queue}-{at}", "queue": queue, "priority": priority,
                    "roles": {"worker": {"command": ["noop", str(run_ms)], "cpu": cpus, "memory": 0}}}  # fmt: skip
            body = json.dumps({"spec": spec, "owner": "bench"})
            headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
            connection.request("POST", "/v1/jobs", body, headers)
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status < 300, text

    threads = [threading.Thread(target=post) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return begin


def main() -> None:
    counts = {name: count // SHRINK for name, (count, *_) in CLASSES.items()}
    floor_s = sum(counts[name] * cpus * run_ms for name, (_, _, cpus, run_ms, _) in CLASSES.items()) / QUOTA / 1_000
    total = sum(counts.values()) * COHORTS * QUEUES
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as home:
        mine, theirs = context.Pipe()
        process = context.Process(target=serve, args=(str(Path(home) / "home"), total, theirs))
        process.start()
        url, token = mine.recv()
        begin = submit(url, token)
        posted_s = time.monotonic() - begin
        at, cpu_s, ended, means, ticks = mine.recv()
        process.join(30)
    assert ended == total, f"{ended} of {total} jobs ended"
    wall_s = at - begin
    say("admit: wall", wall_s, "s", floor_s)
    if SHRINK == 1:
        say("admit: wall, beside Kueue's CI", wall_s, "s", KUEUE_S)
    say("admit: last job submitted after", posted_s, "s", max(c * e for c, e, *_ in CLASSES.values()) / SHRINK / 1_000)
    say("admit: CPU of the server per job", 1_000 * cpu_s / total, "ms", 1_000 * floor_s / total)
    for name, mean_s in means.items():
        line = {"name": f"admit: mean wait of {name} jobs", "value": round(mean_s, 3), "unit": "s"}
        print(json.dumps(line), flush=True)
    print(json.dumps({"name": "admit: ticks", "value": ticks, "unit": "ticks"}), flush=True)


def say(name: str, value: float, unit: str, peer: float) -> None:
    ratio = round(peer / value, 3)
    line = {"name": name, "value": round(value, 3), "unit": unit, "peer": round(peer, 3), "ratio": ratio}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
