"""What a user's program holds: factories for ``auxin grow --model train_for_grow:build``."""

import torch
from jobs import PROBE, Block, Net, build
from torch import nn

import auxin as ax

__all__ = ["build"]


class Deeper(Net):
    def __init__(self):
        super().__init__()
        self.more = Block(24)


def of_another() -> ax.Grower:
    net = Deeper()
    opt = torch.optim.AdamW(net.parameters())
    return ax.Grower(net, opt, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(9), probe=PROBE)


def without_average() -> ax.Grower:
    net = Net()
    opt = torch.optim.AdamW(net.parameters())
    return ax.Grower(net, opt, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(9), probe=PROBE)


def without_grower() -> tuple[nn.Module, torch.Tensor]:
    return Net(), PROBE


def elsewhere() -> ax.Grower:
    with torch.device("meta"):
        net = Net()
    return ax.Grower(net, edits=ax.Duplicate("blocks", by=1, output="keep"), when=ax.when.every(9))


def raises() -> None:
    raise RuntimeError("no data here")
