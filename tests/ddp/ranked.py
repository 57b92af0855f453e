"""A small network, a stream of data and a training loop that every rank can run, or one process alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

BATCH = 8  # of all ranks together


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dim: int = 8, depth: int = 1):
        super().__init__()
        self.inp, self.out = nn.Linear(4, dim), nn.Linear(dim, 1)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of one step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, 4, generator=generator)
    return x, x.sin().sum(1, keepdim=True)


def share(step: int, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """A rank's part of it."""
    x, y = batch(step)
    return x[rank::size], y[rank::size]


def train_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, accumulate: int = 1) -> float:
    """One optimizer step, over `accumulate` parts of which only the last is synchronised."""
    optimizer.zero_grad()
    total = 0.0
    parts = list(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True))
    for number, (a, b) in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                total += _backward(model, a, b, accumulate)
        else:
            total += _backward(model, a, b, accumulate)
    optimizer.step()
    return total


def _backward(model: nn.Module, x: Tensor, y: Tensor, parts: int) -> float:
    loss = nn.functional.mse_loss(model(x), y) / parts
    loss.backward()
    return loss.item()


def wrapped(rank: int, build: Callable[[], nn.Module] = Net, **options: Any) -> DistributedDataParallel:
    """A network of this rank's own random numbers, in a DDP that makes all ranks alike."""
    torch.manual_seed(rank)
    return DistributedDataParallel(build(), **options)


def values(*tensors: Tensor) -> Tensor:
    """All of them in one vector."""
    return torch.cat([t.detach().double().flatten() for t in tensors])


def assert_ranks_equal(model: nn.Module, where: Any = "") -> None:
    """Every parameter holds the same bits on all ranks."""
    ours = torch.cat([p.detach().flatten() for p in model.parameters()]).view(torch.int32)
    theirs = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, ours)
    different = [rank for rank, t in enumerate(theirs) if not torch.equal(t, theirs[0])]
    assert not different, f"{where}: ranks {different} differ from rank 0"
