"""A wider network in one line: tensors of repeated blocks together, and never more than fit."""

import torch
from torch import nn

import auxin as ax

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, hidden), nn.Linear(6, hidden), nn.Linear(hidden, 6)

    def forward(self, x):
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class Net(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, sizes))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def phrases(sizes, edit):
    torch.manual_seed(0)
    return str(ax.grow(Net(sizes), edit, probe=torch.randn(4, 6))).split(" · ")


def test_repeated_blocks_are_one_phrase():
    said = phrases([5] * 12, ax.Widen("blocks.*.up", by=3))
    assert said[:6] == [
        "Widen('blocks.*.up')",
        "blocks.0-11.gate.weight (5, 6) -> (8, 6)",
        "blocks.0-11.gate.bias (5,) -> (8,)",
        "blocks.0-11.up.weight (5, 6) -> (8, 6)",
        "blocks.0-11.up.bias (5,) -> (8,)",
        "blocks.0-11.down.weight (6, 5) -> (6, 8)",
    ]
    assert said[6].startswith("+") and any("blocks.0-11.{gate,up}.weight" in note for note in said)


def test_blocks_of_another_size_are_told_apart():
    said = phrases([5, 7, 5, 5], ax.Widen("blocks.*.up", by=3))
    assert said[1] == "blocks.0,2-3.gate.weight (5, 6) -> (8, 6)"
    assert said[7] == "and 4 more tensors" and len([p for p in said if "->" in p]) == 6


def test_copies_that_stand_elsewhere_in_each_block_are_one_phrase_too():
    said = phrases([5] * 4, ax.Widen("blocks.*.up", by=3, init="split"))
    assert said[1] == "blocks.0-3.gate.weight (5, 6) -> (8, 6) (each in places of its own)"
    assert len([p for p in said if "->" in p]) == 5
    assert "axis 0: 0-4," in phrases([5], ax.Widen("blocks.0.up", by=3, init="split"))[1]
