"""What the library inside a replica costs: `python -m tests.benchmarks.train` prints one JSON line per figure.

report_us: one `context.report` call. ps_pushes_per_s: push and pull of a small model against one server on loopback,
one worker and three. reform_s: SIGKILL of one of three DDP members to the survivors' next step. join_s: start of a
replica (forked with torch imported) to the first step of the larger group.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from jobsched.train.context import Context
from tests.train.gang import Gang

PUSHER = """
import time, torch
from torch import nn
from jobsched import context
from jobsched.train.parameter_server import ParameterClient, ParameterServer
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
if context.role == "ps":
    ParameterServer(model, lambda p: torch.optim.SGD(p, lr=0.01)).serve()
else:
    client = ParameterClient(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    began, pushes = time.perf_counter(), 0
    while time.perf_counter() - began < 3:
        for p, g in zip(model.parameters(), grads):
            p.grad = g
        client.step()
        pushes += 1
    context.report(pushes_per_s=pushes / (time.perf_counter() - began))
    client.close()
"""


def report_us() -> float:
    context, count = Context(), 200_000
    context.report(step=0)
    began = time.perf_counter()
    for step in range(count):
        context.report(step=step, loss=0.5, total=count)
    return (time.perf_counter() - began) / count * 1e6


def ps_pushes_per_s(directory: Path, workers: int) -> float:
    gang = Gang(directory, {"ps": 1, "worker": workers})
    script = directory / "pusher.py"
    script.write_text(PUSHER)
    try:
        gang.start("ps", 0, [str(script)])
        for index in range(workers):
            gang.start("worker", index, [str(script)])
        for index in range(workers):
            gang.wait_exit("worker", index)
        return sum(gang.last("worker", i)["metrics"]["pushes_per_s"] for i in range(workers))
    finally:
        gang.close()


def reform_and_join_s(directory: Path, victims: tuple[int, ...] = (2, 0, 1)) -> tuple[list[float], list[float]]:
    """One figure of each per victim; reports come at most every 100 ms, so steps are timed by the log line."""
    gang = Gang(directory, {"worker": 3}, min_replicas=2)
    command = ["jobs/digits_ddp/train.py", "--epochs", "200", "--pause-ms", "5"]
    reform, join = [], []
    try:
        for index in range(3):
            gang.start("worker", index, command)
        gang.wait_report(lambda r: r.body.get("world") == 3 and r.body["step"] > 20, 60)
        for victim in victims:
            witness = (victim + 1) % 3
            killed = gang.kill("worker", victim)
            reform.append(_log_time(gang, witness, "world size 2", killed) - killed)
            began = time.time()
            gang.start("worker", victim, command, restart=len(join) + 1)
            join.append(_log_time(gang, witness, "world size 3", began) - began)
            time.sleep(0.5)
        return reform, join
    finally:
        gang.close()


def _log_time(gang: Gang, index: int, text: str, since_s: float) -> float:
    """When the replica's log gained this line (printed as the first batch of the new group is dealt)."""
    log = gang.directory / f"worker-{index}.log"
    size = log.stat().st_size
    while text not in log.read_bytes()[size:].decode():
        assert time.time() < since_s + 60, gang.logs()
        time.sleep(0.002)
    return time.time()


def main() -> None:
    def tell(name: str, value: float, unit: str) -> None:
        sys.stdout.write(json.dumps({"name": name, "value": round(value, 4), "unit": unit}) + "\n")
        sys.stdout.flush()

    tell("report_us", report_us(), "us")
    with tempfile.TemporaryDirectory() as scratch:
        for workers in (1, 3):
            tell(f"ps_pushes_per_s_{workers}w", ps_pushes_per_s(Path(scratch) / f"ps{workers}", workers), "1/s")
        reform, join = reform_and_join_s(Path(scratch) / "ddp")
        tell("reform_s", median(reform), "s")
        tell("join_s", median(join), "s")


if __name__ == "__main__":
    main()
