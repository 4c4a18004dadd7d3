"""The local backend through the whole service: start latency, throughput, recovery, and the CLI's own speed.

`python -m tests.benchmarks.local` starts a server of its own on 4 virtual nodes of 8 GPUs and prints one JSON line a
figure. Every peer is measured in the same run; a ratio above 1 means better than the peer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jobsched
from jobsched.client.client import Client, JobArray, JobHandle

STARTS = int(os.environ.get("STARTS", "60"))
DRAINED = int(os.environ.get("DRAINED", "1000"))
RECOVERIES = 3
PATIENCE_S = 60.0
JOBSCHED = [sys.executable, "-m", "jobsched.cli.main"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
CONFIG = """
backend:
  local:
    preload: [torch]
    virtual_nodes: [{count: 4, cpu: 64, memory: 64Gi, gpus: "sim-gpu:8"}]
"""
DDP = '''
import os, sys, time, pathlib, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), pathlib.Path(sys.argv[1])
model = torch.nn.Linear(32, 32)
step = 0
saved = folder / "model.pt"
if saved.exists():
    state = torch.load(saved); step = state["step"]; model.load_state_dict(state["model"])
def note(line):
    with open(folder / "log", "a") as out: out.write(line + "\\n")
note(f"pid {rank} {os.getpid()}")
while not (folder / "enough").exists():
    loss = model(torch.randn(8, 32)).pow(2).mean(); loss.backward()
    for p in model.parameters(): dist.all_reduce(p.grad); p.data -= 1e-3 * p.grad; p.grad = None
    step += 1
    if rank == 0:
        torch.save({"step": step, "model": model.state_dict()}, folder / "new.pt"); os.replace(folder / "new.pt", saved)
    note(f"step {rank} {step} {time.time()} {os.getpid()}")
    time.sleep(0.02)
os._exit(0)
'''


def say(name: str, value: float, unit: str, peer: str, peer_value: float | None, ratio: float | None) -> None:
    text = f"{peer}: {peer_value:.4g}" if peer_value is not None else peer
    line = {"name": name, "value": round(value, 4), "unit": unit, "peer": text}
    print(json.dumps(line | {"ratio": None if ratio is None else round(ratio, 3)}), flush=True)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Client]:
    home = folder / "home"
    config = folder / "server.yaml"
    config.write_text(CONFIG)
    os.environ["JOBSCHED_HOME"] = str(home)
    process = subprocess.Popen([*JOBSCHED, "serve", "--config", str(config), "--home", str(home)],
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not (home / "server.json").exists():
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        with jobsched.connect() as client:
            yield client
    finally:
        process.terminate()
        process.wait(20)
        pattern = f"jobsched.backends.supervisor {home}"
        for pid in subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGTERM)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def starts(client: Client, folder: Path) -> None:
    """submit() called -> first instruction of the command, beside the same command spawned directly."""
    stamp = folder / "stamp"
    command = ["/bin/sh", "-c", f"exec date +%s%N > {stamp}"]
    bare, ours = [], []
    for _ in range(STARTS):
        begin = time.time_ns()
        subprocess.run(command, check=True)
        bare.append((int(stamp.read_text()) - begin) / 1e6)
        begin = time.time_ns()
        job = client.submit({"roles": {"worker": {"command": command, "gpu": "any:1"}}})
        job.wait(until="done", timeout=30)
        ours.append((int(stamp.read_text()) - begin) / 1e6)
    for share in (0.5, 0.99):
        mine, floor = quantile(ours, share), quantile(bare, share)
        say(f"start_p{int(share * 100)}", mine, "ms", "bare spawn ms", floor, floor / mine)
    say("start_p50_over_bare_spawn", statistics.median(ours) - statistics.median(bare), "ms", "aim ms", 30.0,
        30.0 / max(0.001, statistics.median(ours) - statistics.median(bare)))  # fmt: skip


def drain(client: Client) -> None:
    """One-GPU `true` jobs on 32 virtual GPUs, from the submission to the last end."""
    begin = time.perf_counter()
    array = client.submit({"array": f"0-{DRAINED - 1}", "roles": {"worker": {"command": ["true"], "gpu": "any:1"}}})
    submitted = time.perf_counter() - begin
    assert isinstance(array, JobArray)
    array_id = array[0].answer.job.array_id
    while True:
        if not client.jobs(array=array_id, limit=1, all=False):
            break
        assert time.perf_counter() - begin < 300, "not drained"
        time.sleep(0.1)
    took = time.perf_counter() - begin
    assert not client.jobs(array=array_id, state="FAILED", limit=5)
    begin = time.perf_counter()
    for _ in range(200):
        subprocess.run(["true"], check=True)
    floor = 200 / (time.perf_counter() - begin)
    rate = DRAINED / took
    say("drained_jobs_per_s", rate, "jobs/s", "spawn+reap one after another per s", floor, rate / floor)
    say("submit_array_s", submitted, "s", f"{DRAINED} jobs in one request", None, None)


def lines(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def next_step_after_kill(folder: Path) -> float:
    """SIGKILL rank 1 once both have made steps; seconds until a process that was not there before makes a step,
    `PATIENCE_S` if none does."""
    log = folder / "log"
    deadline = time.monotonic() + PATIENCE_S
    while {line[1] for line in lines(log) if line[0] == "step"} != {"0", "1"} or len(lines(log)) < 40:
        assert time.monotonic() < deadline, f"no steps within {PATIENCE_S} s: {lines(log)[-3:]}"
        time.sleep(0.05)
    old = {line[2] for line in lines(log) if line[0] == "pid"}
    victim = next(int(line[2]) for line in lines(log) if line[0] == "pid" and line[1] == "1")
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for line in lines(log):
            if line[0] == "step" and line[4:5] and line[4] not in old:
                return float(line[3]) - killed
        time.sleep(0.01)
    return PATIENCE_S


def recoveries(client: Client, folder: Path) -> None:
    """SIGKILL of one of two DDP workers -> the next step, under jobsched and under torchrun, the same script."""
    script = folder / "ddp.py"
    script.write_text(DDP)
    ours, theirs = [], []
    worker = {"replicas": 2, "gpu": "any:1", "preload": ["torch"], "restart": {"scope": "job", "max": 5}}
    warm_up = {"command": [sys.executable, "-c", "import torch"], "preload": ["torch"]}
    client.submit({"roles": {"worker": warm_up}}).wait(timeout=60)
    for turn in range(RECOVERIES):
        place = folder / f"ours{turn}"
        place.mkdir()
        command = [sys.executable, str(script), str(place)]
        job = client.submit({"env": {"OMP_NUM_THREADS": "1"}, "roles": {"worker": {**worker, "command": command}}})
        assert isinstance(job, JobHandle)
        ours.append(next_step_after_kill(place))
        assert ours[-1] < PATIENCE_S, f"not recovered within {PATIENCE_S} s: {lines(place / 'log')[-3:]}"
        (place / "enough").touch()
        job.wait(timeout=60)
        place = folder / f"theirs{turn}"
        place.mkdir()
        torchrun = subprocess.Popen(
            [*TORCHRUN, str(script), str(place)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
        )
        try:
            theirs.append(next_step_after_kill(place))
        finally:
            (place / "enough").touch()
            with contextlib.suppress(subprocess.TimeoutExpired):
                torchrun.wait(10)
            torchrun.terminate()  # what did not recover does not end by itself either
            torchrun.wait(60)
    mine, peer = statistics.median(ours), statistics.median(theirs)
    say("recovery_to_next_step_s", mine, "s", "torchrun --max-restarts s", peer, peer / mine)


def cli_speed() -> None:
    program = str(Path(sys.executable).with_name("jobsched"))
    for name, arguments, aim in (("help", ["--help"], 0.15), ("jobs", ["jobs"], 0.4)):
        took = []
        for _ in range(10):
            begin = time.perf_counter()
            subprocess.run([program, *arguments], check=True, stdout=subprocess.DEVNULL)
            took.append(time.perf_counter() - begin)
        say(f"cli_{name}_s", statistics.median(took), "s", "aim s", aim, aim / statistics.median(took))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="jobsched-bench-") as name, server(Path(name)) as client:
        starts(client, Path(name))
        cli_speed()
        drain(client)
        recoveries(client, Path(name))


if __name__ == "__main__":
    main()
