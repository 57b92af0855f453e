"""What the pages take for granted that show a few lines of a run: a network, its companions, and some classes."""

import functools
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dim: int = 32, depth: int = 2):
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(8, dim), nn.LayerNorm(dim), nn.Linear(dim, 2)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


class MySchedule:
    """A schedule that is no ``LRScheduler`` and keeps a factor for each group."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.base_lrs = self._last_lr = [group["lr"] for group in optimizer.param_groups]
        self.factors = [1.0 for _ in self.base_lrs]


def names() -> dict[str, Any]:
    """A network, an optimizer, a schedule, an average and a batch, as most pages name them."""
    model, batch = Net(), torch.randn(16, 8)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return {
        "torch": torch,
        "nn": nn,
        "functools": functools,
        "ax": ax,
        "Block": Block,
        "MyBlock": Block,
        "MySchedule": MySchedule,
        "model": model,
        "opt": opt,
        "optimizer": opt,
        "sched": torch.optim.lr_scheduler.StepLR(opt, 10_000),
        "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99)),
        "batch": batch,
        "target": torch.randn(16, 2),
        "edit": ax.Duplicate("blocks", by=1),
    }
