"""Handwritten digits, synchronous and elastic: 2 to 4 replicas that come and go, each sample used once an epoch.

Every step adds up, over all ranks, which samples they really loaded; at the end of each epoch every count must be one.
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
from jobsched.train import ddp
from jobsched.train.data import Plan


def load_digits(where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(1797, 64) pixels in 0..1 and (1797,) labels, in a fixed random order."""
    with gzip.open(Path(__file__).parent.parent / "data" / "digits.csv.gz", "rt") as file:
        table = torch.tensor([[float(cell) for cell in row] for row in csv.reader(file)])
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))].to(where)
    return table[:, :64] / 16, table[:, 64].long()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=48, help="samples of all ranks together")
    parser.add_argument("--max-batch", type=int, default=0, help="most of them, where the gradients are noisy enough")
    parser.add_argument("--pause-ms", type=float, default=0, help="extra time per step, to watch it")
    parser.add_argument("--sample-ms", type=float, default=0, help="extra time per sample of one rank")
    parser.add_argument("--slow-until", type=Path, metavar="FILE", help="no extra time once this file is there")
    parser.add_argument("--timeout-s", type=float, default=60, help="longest wait for a peer within one step")
    parser.add_argument("--accuracy", type=float, default=0.95, help="fail below this")
    options = parser.parse_args()

    torch.manual_seed(0)
    where = ddp.device()
    images, labels = load_digits(where)
    train = 1437
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = ddp.Elastic(model, optimizer, plan=Plan(train, options.batch, options.epochs),
                          state={"used": torch.zeros(train, device=where), "exact": 0},
                          timeout_s=options.timeout_s, max_batch=options.max_batch)
    world, steps = 0, 0
    for batch in trainer.batches():
        if trainer.world != world:
            world = trainer.world
            print(f"world size {world} at step {trainer.position}", flush=True)
        began = time.perf_counter()
        indices = torch.from_numpy(batch.indices).to(where)
        loss = nn.functional.cross_entropy(model(images[indices]), labels[indices])
        loaded = torch.zeros(train, device=where).index_add_(0, indices, torch.ones(len(indices), device=where))
        sums = trainer.step(loss, used=loaded)
        steps += 1
        trainer.state["used"] += sums["used"]
        if options.slow_until is None or not options.slow_until.exists():
            time.sleep((options.pause_ms + options.sample_ms * len(indices)) / 1_000)
        context.report(samples_per_s=float(sums["used"].sum()) / (time.perf_counter() - began))
        if batch.last and sums["used"].any():  # zeros: the step broke off and comes again
            if not (trainer.state["used"] == 1).all():
                print(f"epoch {batch.epoch}: some sample was not used exactly once", file=sys.stderr)
                return 1
            trainer.state["used"].zero_()
            trainer.state["exact"] += 1

    with torch.no_grad():
        accuracy = (model(images[train:]).argmax(1) == labels[train:]).float().mean().item()
    exact = float(trainer.state["exact"] == options.epochs)
    context.report(steps=steps, accuracy=accuracy, epoch_exact=exact, epochs=trainer.state["exact"])
    print(f"accuracy {accuracy:.4f}, {trainer.state['exact']} of {options.epochs} epochs exact, "
          f"world sizes (step, size): {trainer.world_sizes}", flush=True)
    return 0 if accuracy >= options.accuracy and exact else 1


if __name__ == "__main__":
    sys.exit(main())
