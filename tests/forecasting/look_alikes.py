"""Networks built as forecasting libraries build theirs, in our own words: what one block leaves over the next one gets,
and all their forecasts are added; forward runs over plain lists beside the ModuleLists.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PAST, AHEAD = 12, 4


class Block(nn.Module):
    """Returns what it explains of the past, and what it adds to the forecast."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.hidden_list = [nn.Linear(PAST, width), nn.Linear(width, width)]
        self.hidden = nn.ModuleList(self.hidden_list)
        self.backcast, self.forecast = nn.Linear(width, PAST), nn.Linear(width, AHEAD)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.hidden_list:
            x = torch.relu(layer(x))
        return self.backcast(x), self.forecast(x)


class BasisBlock(nn.Module):
    """One Linear gives the coefficients of fixed curves, which do not train."""

    def __init__(self, width: int = 8, degree: int = 3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(PAST, width), nn.ReLU(), nn.Linear(width, 2 * degree))
        curves = torch.linspace(-1, 1, PAST + AHEAD)[None, :] ** torch.arange(degree)[:, None]
        self.past = nn.Parameter(curves[:, :PAST], requires_grad=False)
        self.ahead = nn.Parameter(curves[:, PAST:], requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        past, ahead = self.layers(x).chunk(2, dim=-1)
        return past @ self.past, ahead @ self.ahead


class Flat(nn.Module):
    """All blocks in one ModuleList, of several kinds; masked, as in NeuralForecast."""

    def __init__(self, *kinds: type[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for kind in kinds or (Block, BasisBlock, Block))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        left, mask = batch["y"].flip(-1), batch["mask"].flip(-1)
        forecast = batch["y"][:, -1:]
        for block in self.blocks:
            past, ahead = block(x=left)
            left = (left - past) * mask
            forecast = forecast + ahead
        return forecast


class Stack(nn.Module):
    """Some blocks; returns what they leave over, and their forecast."""

    def __init__(self, blocks: int, shared: bool = False):
        super().__init__()
        self.blocks_list = [Block()] * blocks if shared else [Block() for _ in range(blocks)]
        self.blocks = nn.ModuleList(self.blocks_list)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        forecast = torch.zeros(len(x), AHEAD)
        for block in self.blocks_list:
            past, ahead = block(x)
            forecast = forecast + ahead
            x = x - past
        return x, forecast


class Stacks(nn.Module):
    """Stacks of blocks, as in Darts; the last backcast, on which nothing depends, does not train there."""

    def __init__(self, stacks: int = 2, blocks: int = 2, shared: bool = False, frozen: bool = True):
        super().__init__()
        self.stacks_list = [Stack(blocks, shared) for _ in range(stacks)]
        self.stacks = nn.ModuleList(self.stacks_list)
        if frozen:
            self.stacks_list[-1].blocks[-1].backcast.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        forecast = x[:, -1:]
        for stack in self.stacks_list:
            x, ahead = stack(x)
            forecast = forecast + ahead
        return forecast


class Convolutions(nn.Module):
    """Residual blocks that look back twice as far each, in a plain list too."""

    def __init__(self, depth: int = 3, width: int = 6):
        super().__init__()
        self.inp, self.out = nn.Conv1d(1, width, 1), nn.Linear(width, AHEAD)
        self.res_blocks_list = []
        for i in range(depth):
            self.res_blocks_list += [Convolution(width, 2**i)]
        self.res_blocks = nn.ModuleList(self.res_blocks_list)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x[:, None])
        for block in self.res_blocks_list:
            x = block(x)
        return self.out(x[..., -1])


class Convolution(nn.Module):
    """Causal: padded on the left."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.first, self.second = (nn.Conv1d(width, width, 3, dilation=dilation) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in (self.first, self.second):
            y = torch.relu(layer(nn.functional.pad(y, (2 * self.dilation, 0))))
        return x + y


def past(seed: int = 0) -> Tensor:
    """Sixteen windows of noisy sines."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6 * torch.rand(16, 1, generator=generator)
    return torch.sin(0.7 * torch.arange(PAST) + phase) + 0.1 * torch.randn(16, PAST, generator=generator)


def masked(seed: int = 0) -> dict[str, Tensor]:
    """The same with a mask, in which the first two values of some windows are missing."""
    y, mask = past(seed), torch.ones(16, PAST)
    mask[::3, :2] = 0
    return {"y": y * mask, "mask": mask}
