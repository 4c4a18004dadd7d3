"""Handwritten digits with Ray Train, one of its workers per replica, on a Ray cluster that lives as long as the job.

Rank 0 starts the head, the others join it. Ray Train keeps its checkpoints in the job's directory: a new attempt goes
on from the newest one.
"""

import argparse
import csv
import gzip
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobsched import context

DATA = Path(__file__).resolve().parent.parent / "data" / "digits.csv.gz"


def train(options: dict) -> None:
    """One worker of Ray Train: its share of every batch, averaged by DDP."""
    import ray.train
    import ray.train.torch
    import torch
    from torch import nn

    with gzip.open(DATA, "rt") as file:
        table = torch.tensor([[float(cell) for cell in row] for row in csv.reader(file)])
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    images, labels = table[:, :64] / 16, table[:, 64].long()
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model = ray.train.torch.prepare_model(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = 0
    if (saved := ray.train.get_checkpoint()) is not None:
        with saved.as_directory() as directory:
            state = torch.load(Path(directory, "state.pt"), weights_only=True)
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
        print(f"goes on at epoch {first}", flush=True)
    where = next(plain.parameters()).device
    for epoch in range(first, options["epochs"]):
        order = torch.randperm(1437, generator=torch.Generator().manual_seed(epoch))[rank::world]
        for indices in order.split(options["batch"] // world):
            loss = nn.functional.cross_entropy(model(images[indices].to(where)), labels[indices].to(where))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            hits = plain(images[1437:].to(where)).argmax(1) == labels[1437:].to(where)
        metrics = {"epoch": epoch, "loss": loss.item(), "accuracy": hits.float().mean().item()}
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = None
            if rank == 0:
                state = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
                torch.save(state, Path(directory, "state.pt"))
                checkpoint = ray.train.Checkpoint.from_directory(directory)
                context.report(step=epoch + 1, total=options["epochs"], loss=metrics["loss"],
                               accuracy=metrics["accuracy"])
            ray.train.report(metrics, checkpoint=checkpoint)


def own_node(head: str, place: str) -> subprocess.Popen:
    """Start this replica's node of the job's own cluster; it ends with us."""
    env = context.env
    command = [Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats", "--num-cpus=1",
               f"--num-gpus={env.gpu_count}", "--object-store-memory=100000000"]
    host, _, port = head.rpartition(":")
    if env.rank == 0:
        command += ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={place}",
                    f"--node-ip-address={host}"]
    else:
        command += [f"--address={head}"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)


def answers(head: str) -> bool:
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError:
        return False
    return True


def wait_until(holds, what: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} within {limit_s:g} s")
        time.sleep(0.2)


def lead(head: str, options: argparse.Namespace) -> int:
    """Rank 0: train on the whole cluster."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    env = context.env
    os.environ.pop("RAY_ADDRESS", None)  # of the cluster that jobsched itself runs on
    ray.init(head, log_to_driver=False)
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == env.world_size, "not all replicas joined")
    share = {"CPU": 1} | ({"GPU": env.gpu_count} if env.gpu_count else {})
    trainer = TorchTrainer(
        train, train_loop_config=vars(options),
        scaling_config=ScalingConfig(
            num_workers=env.world_size, use_gpu=bool(env.gpu_count), resources_per_worker=share,
            placement_strategy="SPREAD"),
        run_config=RunConfig(
            name=env.job_id, storage_path=env.checkpoint_dir or tempfile.mkdtemp(),
            failure_config=FailureConfig(max_failures=0),  # starting again is jobsched's
            checkpoint_config=CheckpointConfig(num_to_keep=2)),
    )
    accuracy = trainer.fit().metrics["accuracy"]
    print(f"accuracy {accuracy:.4f} with {env.world_size} workers of Ray Train", flush=True)
    ray.shutdown()
    return 0 if accuracy >= options.accuracy else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=48, help="samples of all workers together")
    parser.add_argument("--accuracy", type=float, default=0.95, help="fail below this")
    options = parser.parse_args()
    head = context.env.coordinator
    place = tempfile.mkdtemp(prefix="rt-")  # Ray's sockets need a short path
    if context.rank:
        wait_until(lambda: answers(head), "rank 0 did not start the head")
    node = own_node(head, place)
    try:
        if context.rank:
            wait_until(lambda: not answers(head), "the head did not end", limit_s=86_400)
            return 0
        wait_until(lambda: answers(head) or node.poll() is not None, "the head did not start")
        return lead(head, options)
    finally:
        node.kill()  # asked kindly, it waits half a minute for work that is over; the rest of it ends with us
        node.wait(30)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
