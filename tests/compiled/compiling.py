"""Networks to compile, and a backend that counts its graphs."""

import torch
from torch import nn

import auxin as ax


class Block(nn.Module):
    def __init__(self, dim=16, hidden=32):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Net(nn.Module):
    def __init__(self, dim=16, depth=2):
        super().__init__()
        self.inp, self.out = nn.Linear(8, dim), nn.Linear(dim, 1)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Graphs:
    """A backend that runs graphs as they are, and notes for each whether it was made for training."""

    def __init__(self, name=None):
        self.training, self.name = [], name

    def __call__(self, graph, inputs):
        self.training.append(torch.is_grad_enabled())
        return torch._dynamo.lookup_backend(self.name)(graph, inputs) if self.name else graph.forward

    def __len__(self):
        return len(self.training)


def batch(rows=4, seed=7):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def step(call, optimizer, x=None):
    """One step of training; its loss."""
    optimizer.zero_grad()
    loss = (call(batch() if x is None else x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def as_written(model, x):
    """The output without compiled code."""
    with torch.compiler.set_stance("force_eager"):
        return model(x)


def grow(model, optimizer, *more, edit=None, **keywords):
    return ax.grow(model, edit or ax.Duplicate("blocks", by=1), optimizer, *more, probe=batch(), **keywords)
