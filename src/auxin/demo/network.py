"""The demo's network: an ordinary residual network, with nothing of auxin in it."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block: two linear layers whose output is added to what came in.

    Args:
        dim: width of the stream that blocks add to.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.up = nn.Linear(dim, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim) -> (batch, dim)."""
        return x + self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    """Forecasts all months ahead at once from the months before.

    Args:
        lookback: values that go in.
        horizon: values that come out.
        dim: width.
        depth: number of blocks to begin with.
    """

    def __init__(self, lookback: int, horizon: int, dim: int, depth: int):
        super().__init__()
        self.embed = nn.Linear(lookback, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, horizon)

    def forward(self, past: Tensor) -> Tensor:
        """(batch, lookback) -> (batch, horizon), both relative to the level of the series."""
        x = torch.relu(self.embed(past))
        for block in self.blocks:
            x = block(x)
        return self.head(x)
