"""A run as two jobs have it: what its program builds, and some steps of it."""

import functools
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax

PROBE = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.up, self.drop, self.down = (
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * dim),
            nn.Dropout(0.1),
            nn.Linear(2 * dim, dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.drop(torch.relu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, dim: int = 24, depth: int = 2):
        super().__init__()
        self.inp, self.stat, self.out = nn.Linear(4, dim), nn.BatchNorm1d(dim), nn.Linear(dim, 1)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.mask = torch.empty(4, 4).fill_(1.0).triu_(1)  # no buffer: only the constructor knows it
        self.register_buffer("table", torch.arange(4.0 * dim).reshape(4, dim), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stat(self.inp(x @ self.mask) + 1e-3 * x @ self.table)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def build(optimizer: str = "AdamW", dim: int = 24, **words: Any) -> ax.Grower:
    torch.manual_seed(0)
    net = Net(dim)
    opt = {
        "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2),
        "SGD": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
        "Adafactor": functools.partial(torch.optim.Adafactor, lr=1e-2),
    }[optimizer](net.parameters())
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 100)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    given = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.plateau(patience=3), "probe": PROBE, "rewarm": 5}
    return ax.Grower(net, opt, sched, ema, *words.pop("more", ()), **{**given, **words})


def train(grower: ax.Grower, steps: range) -> list[str]:
    """Losses in hexadecimal, which hides no bit."""
    losses = []
    opt, sched, ema = grower.companions[:3]
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(grower.model(x), x.sin().sum(1, keepdim=True))
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        ema.update_parameters(grower.model)
        losses.append(loss.item().hex())
    return losses
