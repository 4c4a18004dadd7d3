"""Linear regression with DistributedDataParallel: plain PyTorch, nothing of jobsched in it."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    cuda = torch.cuda.is_available()
    where = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    slope = torch.tensor([[2.0], [-3.0]], device=where)
    model = DistributedDataParallel(torch.nn.Linear(2, 1).to(where))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(200):
        inputs = torch.randn(32, 2, device=where)
        loss = torch.nn.functional.mse_loss(model(inputs), inputs @ slope)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"rank {rank} of {dist.get_world_size()}: step {step + 1}, loss {loss.item():.6f}", flush=True)
    dist.barrier()
    del model  # it holds on to the group, whose threads could not be joined at exit
    dist.destroy_process_group()
    assert loss.item() < 1e-3


if __name__ == "__main__":
    main()
