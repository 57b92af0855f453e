"""How much a forward pads is no length of the axis that it pads, nor of another one of the same size."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import auxin as ax

X = torch.randn(3, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Causal(nn.Module):
    """As in temporal networks: padded to the left by as many entries as there are channels, by chance."""

    def __init__(self, channels=4):
        super().__init__()
        self.kernel_size, self.dilation = 3, 2
        self.first, self.second = (nn.Conv1d(channels, channels, 3, dilation=2) for _ in range(2))
        self.out = nn.Conv1d(channels, 2, 1)

    def forward(self, x):
        for conv in (self.first, self.second):
            x = torch.relu(conv(functional.pad(x, (self.dilation * (self.kernel_size - 1), 0))))
        return self.out(x)


class Shortcut(nn.Module):
    """A residual block whose shortcut is filled up with channels of zeros."""

    def __init__(self, channels=4, more=2):
        super().__init__()
        self.more = more
        self.stem = nn.Conv1d(4, channels, 1)
        self.body = nn.Conv1d(channels, channels + 2 * more, 1)
        self.out = nn.Conv1d(channels + 2 * more, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.out(torch.relu(self.body(x)) + functional.pad(x, (0, 0, self.more, self.more)))


@pytest.mark.parametrize("at", ["first", "second"])
def test_padding_as_wide_as_the_channels_stays(at):
    torch.manual_seed(0)
    model = Causal().double()
    before = model(X)
    ax.grow(model, ax.Widen(at, by=4), probe=X)
    assert (model.kernel_size, model.dilation) == (3, 2)
    assert torch.allclose(model(X), before, rtol=0, atol=1e-13)


def test_channels_that_are_padded_follow_what_is_added_to_them():
    torch.manual_seed(0)
    model = Shortcut().double()
    before = model(X)
    ax.grow(model, ax.Widen("stem", by=3), probe=X)
    assert model.stem.out_channels == 7 and model.body.out_channels == 11 and model.more == 2
    assert torch.allclose(model(X), before, rtol=0, atol=1e-13)
