"""A small character transformer on the text of Python's standard library, with plain DistributedDataParallel.

Every rank draws its batches from a generator seeded by (step, rank), so the checkpoint needs only the step to go on
exactly: a run that was interrupted ends with the same loss as one that was not.
"""

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jobsched import context
from jobsched.train import ddp
from jobsched.train.checkpoint import Checkpointer

CONTEXT = 64
SYMBOLS = 128  # ASCII; the rest becomes '?'


class CharTransformer(nn.Module):
    """Two causal layers over one-character tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(SYMBOLS, width)
        self.place = nn.Parameter(torch.zeros(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, SYMBOLS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(self.token(tokens) + self.place, mask=self.mask, is_causal=True))


def load_text(limit: int) -> torch.Tensor:
    """The first `limit` characters of the standard library's modules, in alphabetical order, as numbers below 128."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text("utf-8", "replace").encode("ascii", "replace")
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def draw(text: torch.Tensor, step: int, rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (count, CONTEXT) of this rank for this step; the same whenever it is asked."""
    generator = torch.Generator().manual_seed(step * 1_000 + rank)
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    window = text[starts + torch.arange(CONTEXT + 1)].long()
    return window[:, :-1], window[:, 1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="sequences per rank")
    parser.add_argument("--loss", type=float, default=2.7, help="fail above this")
    parser.add_argument("--checkpoint-s", type=float, help="default: the interval in job.yaml")
    options = parser.parse_args()

    rank, world = ddp.init()
    where = ddp.device()
    text = load_text(1_000_000)
    torch.manual_seed(0)
    model = CharTransformer().to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    checkpoints = Checkpointer(name="lm", shared=True)
    start, mean = 0, 5.0
    if found := checkpoints.load(map_location=where):
        state, start = found
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        mean = state["mean"]
        print(f"rank {rank}: goes on at step {start} of attempt {context.attempt}", flush=True)
    if rank == 0:
        checkpoints.take_over()
    parallel = DistributedDataParallel(model) if world > 1 else model

    saved_at, every_s = time.monotonic(), options.checkpoint_s or context.checkpoint_every_s(otherwise=3)
    for step in range(start, options.steps):
        inputs, targets = (t.to(where) for t in draw(text, step, rank, options.batch))
        loss = nn.functional.cross_entropy(parallel(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean += 0.05 * (loss.item() - mean)
        context.report(step=step + 1, total=options.steps, loss=mean, world=world)
        asked = ddp.anyone(context.should_checkpoint())  # all ranks save or none, at the same step
        last = step + 1 == options.steps
        if rank == 0 and (asked or last or time.monotonic() - saved_at > every_s):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean}
            context.checkpoint_saved(checkpoints.save(state, step + 1), step + 1)
            saved_at = time.monotonic()
        if asked:
            ddp.anyone(False)  # rank 0 has written it once everybody is here
            if rank > 0:
                context.checkpoint_saved(checkpoints.directory, step + 1)

    print(f"rank {rank}: loss {mean:.6f} after {options.steps} steps", flush=True)
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still needs it,
        del parallel  # and nothing holds on to the group: gloo's threads could not be joined at exit
        dist.destroy_process_group()
    return 0 if mean <= options.loss else 1


if __name__ == "__main__":
    sys.exit(main())
