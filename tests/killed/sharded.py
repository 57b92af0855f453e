"""A run under FSDP2 that saves and grows as it goes; torchrun starts it again, with the same call, when it was killed.

``torchrun --nproc-per-node 2 --max-restarts 100 sharded.py FOLDER``
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from shuffled import Block
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax

STEPS, SAVE_EVERY, GROWTHS = 30, 3, [4, 9, 14, 19, 24]
EDITS = [
    ax.Duplicate("blocks", by=1),
    ax.Widen("blocks.0.up", by=5),
    ax.Duplicate("blocks", by=1, output="keep", state="copy"),
    ax.Widen("blocks.*.up", by=3),
    ax.Remove("blocks.0"),
]


class Net(nn.Module):
    def __init__(self, dim: int = 8):
        super().__init__()
        self.entry, self.exit = nn.Linear(5, dim), nn.Linear(dim, 1)
        self.blocks = nn.ModuleList([Block(dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return self.exit(x)


def built() -> Net:
    torch.manual_seed(0)
    model = Net()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = built()
    average = AveragedModel(Net(), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for block in average.module.blocks:
        fully_shard(block)
    fully_shard(average.module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=2 * STEPS)
    words = {"edits": EDITS, "when": ax.when.at(GROWTHS), "choose": ax.choose.cycle(), "probe": torch.ones(2, 5)}
    grower = ax.Grower(model, optimizer, schedule, average, rewarm=3, **words)
    torch.manual_seed(rank)  # for the batches and the dropout masks of this rank
    first = 0
    if any(Path(folder).glob("checkpoint-*")):
        first = ax.load(folder, grower)["steps"]
        if rank == 0:
            print(f"resumed at {first}", flush=True)
    for step in range(first, STEPS):
        x = torch.randn(8, 5)
        loss = nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        told = loss.detach().clone()
        dist.all_reduce(told)
        if rank == 0:
            print(0, step, told.item().hex(), len(model.blocks), flush=True)
        grower.step(loss.item())
        if (step + 1) % SAVE_EVERY == 0:
            ax.save(grower, folder, extra={"steps": step + 1})
    ax.verify(model, optimizer, schedule, average)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
