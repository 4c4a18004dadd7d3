"""Handwritten digits on a parameter server: the same file runs as `ps` and as `worker`.

Workers lease batches from server 0, push gradients, pull parameters, each at its own pace. Server 0 counts which
samples were really used; the job fails if any epoch used one twice or not at all.
"""

import argparse
import csv
import gzip
import sys
import time
from pathlib import Path

import torch
from torch import nn

from jobsched import context
from jobsched.train.data import Plan
from jobsched.train.parameter_server import ParameterClient, ParameterServer

TRAIN = 1437


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """(1797, 64) pixels in 0..1 and (1797,) labels, in a fixed random order."""
    with gzip.open(Path(__file__).parent.parent / "data" / "digits.csv.gz", "rt") as file:
        table = torch.tensor([[float(cell) for cell in row] for row in csv.reader(file)])
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return table[:, :64] / 16, table[:, 64].long()


def build_model() -> nn.Module:
    """The same initial values on every side."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def serve(plan: Plan, options: argparse.Namespace) -> int:
    """Role ps."""
    model = build_model()
    whole = sum(parameter.numel() for parameter in model.parameters())

    def optimizer(shard: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.SGD(shard, lr=0.05, momentum=0.5)
        pause_s = options.apply_ms / 1_000 * sum(parameter.numel() for parameter in shard) / whole
        made.register_step_post_hook(lambda *_: time.sleep(pause_s))
        return made

    ParameterServer(model, optimizer, plan=plan, max_staleness=options.max_staleness,
                    checkpoint_every_s=options.checkpoint_s).serve()
    return 0


def work(plan: Plan, options: argparse.Namespace) -> int:
    """Role worker."""
    images, labels = load_digits()
    model = build_model()
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels, model = images.to(where), labels.to(where), model.to(where)
    client = ParameterClient(model, plan=plan)
    began, samples = time.perf_counter(), 0
    for lease in client.leases():
        indices = torch.from_numpy(lease.indices).to(where)
        loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
        loss.backward()
        client.step(lease)
        samples += len(indices)
        context.report(step=client.done, total=plan.total, loss=loss.detach(),
                       local_samples_per_s=samples / (time.perf_counter() - began))
        if options.slow_until is None or not options.slow_until.exists():
            time.sleep(options.pause_ms / 1_000)
    client.pull()
    with torch.no_grad():
        accuracy = (model(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean().item()
    exact = float(client.epochs_exact == plan.epochs)
    context.report(step=client.done, accuracy=accuracy, epoch_exact=exact, epochs=client.epochs)
    print(f"accuracy {accuracy:.4f}, {client.epochs_exact} of {plan.epochs} epochs exact, "
          f"{samples} samples used here", flush=True)
    client.close()
    return 0 if accuracy >= options.accuracy and exact else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pause-ms", type=float, default=20, help="extra time per step, to watch it")
    parser.add_argument("--slow-until", type=Path, metavar="FILE", help="no pause once this file is there")
    parser.add_argument("--apply-ms", type=float, default=0, help="extra time per push over the whole model: servers "
                        "are then what a job waits for")
    parser.add_argument("--max-staleness", type=int, default=None, help="pushes a worker may be ahead of the slowest")
    parser.add_argument("--accuracy", type=float, default=0.95, help="fail below this")
    parser.add_argument("--checkpoint-s", type=float, help="default: the interval in job.yaml")
    options = parser.parse_args()
    plan = Plan(TRAIN, options.batch, options.epochs)
    return serve(plan, options) if context.role == "ps" else work(plan, options)


if __name__ == "__main__":
    sys.exit(main())
