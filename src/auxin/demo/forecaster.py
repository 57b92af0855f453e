"""The forecaster of the demo's first part: an ordinary TCN, with nothing of auxin in it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class Dilated(nn.Module):
    """A residual block: a causal convolution of 3 taps, ``dilation`` apart, ReLU, and a mix of the channels.

    Args:
        dim: width of the stream that blocks add to.
        dilation: half-hours between the taps.
    """

    def __init__(self, dim: int, dilation: int):
        super().__init__()
        self.before = 2 * dilation
        self.look, self.mix = nn.Conv1d(dim, dim, 3, dilation=dilation), nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, dim, time) -> (batch, dim, time)."""
        return x + self.mix(torch.relu(self.look(pad(x, (self.before, 0)))))


class Forecaster(nn.Module):
    """Forecasts the next day at every half-hour, from what it can look back to: 2 (2 ** depth - 1) half-hours.

    Args:
        dim: width.
        depth: number of blocks to begin with; their dilations are 1, 2, 4 ...
        inputs: series that go in.
        horizon: values that come out.
    """

    def __init__(self, dim: int, depth: int, inputs: int = 3, horizon: int = 48):
        super().__init__()
        self.embed, self.head = nn.Conv1d(inputs, dim, 1), nn.Conv1d(dim, horizon, 1)
        self.blocks = nn.ModuleList(Dilated(dim, 2**place) for place in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, time) -> (batch, horizon, time)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(x))
