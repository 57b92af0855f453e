"""Every start that promises to keep the function keeps it, and its new weights learn."""

import functools

import pytest
import torch
from growing import Block, Net, batch
from torch import nn

import auxin as ax

torch.set_num_threads(1)


class ConvBlock(nn.Module):
    """A residual block with batch norms."""

    def __init__(self, channels=4):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.last(self.second(torch.relu(self.norm(self.first(x)))))


class AttentionBlock(nn.Module):
    """Pre-norm attention and feed-forward, as in a language model."""

    def __init__(self, dim=8):
        super().__init__()
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.up, self.down = nn.Linear(dim, 16), nn.Linear(16, dim)

    def forward(self, x):
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Rectified(nn.Module):
    """A residual block that ends in a ReLU: with its Linear at zero no gradient ever comes through."""

    def __init__(self, dim=8):
        super().__init__()
        self.inner = nn.Linear(dim, dim)

    def forward(self, x):
        return x + torch.relu(self.inner(x))


def linear_relu():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU())


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def cnn():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), ConvBlock(), ConvBlock(), nn.Conv2d(4, 2, 1))


def attentive():
    return nn.Sequential(nn.Linear(5, 8), AttentionBlock(), AttentionBlock(), nn.Linear(8, 1))


IMAGES, SEQUENCES, ROWS = (8, 2, 6, 6), (4, 7, 5), (16, 5)
PRESERVING = {
    "a residual block, writers zero": (Net, ROWS, ax.Insert("blocks", functools.partial(Block, 8))),
    "a residual block in the middle": (Net, ROWS, ax.Insert("blocks", functools.partial(Block, 8), index=1)),
    "a copy": (Net, ROWS, ax.Duplicate("blocks", by=1)),
    "twice as deep": (Net, ROWS, ax.Duplicate("blocks", order="stack")),
    "fresh blocks": (Net, ROWS, ax.Duplicate("blocks", content="fresh")),
    "a convolutional block": (cnn, IMAGES, ax.Insert("", ConvBlock, index=3)),
    "an attention block": (attentive, SEQUENCES, ax.Insert("", AttentionBlock, index=2)),
    "a Linear in a chain": (mlp, ROWS, ax.Insert("", functools.partial(nn.Linear, 8, 8), index=3)),
    "a Linear and its ReLU": (mlp, ROWS, ax.Insert("", linear_relu, index=2)),
    "a convolution": (cnn, IMAGES, ax.Insert("", functools.partial(nn.Conv2d, 4, 4, 3, padding=1), index=4)),
}


def ready(make, shape):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(3):
        backward(model, inputs(shape, seed))
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, inputs(shape, 7)


def inputs(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def backward(model, x):
    out = model(x)
    (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).square().mean().backward()


def output(model, x):
    model.eval()
    with torch.no_grad():
        out = model(x)
    model.train()
    return out


@pytest.mark.parametrize("name", PRESERVING)
def test_the_function_stays_and_the_new_weights_learn(name):
    make, shape, edit = PRESERVING[name]
    model, optimizer, x = ready(make, shape)
    before = output(model, x)
    change = ax.grow(model, edit, optimizer, probe=x)
    assert change.preserves and change.max_difference <= 1e-5
    assert (output(model, x) - before).abs().max() <= 1e-5
    if change.how == "last writers zero":
        assert torch.equal(output(model, x), before)

    new = dict(change.after)
    born = {move.name for move in change.moves if move.added}
    reached: list[set[str]] = []
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, x)
        reached.append({name for name in born if new[name].grad is not None and new[name].grad.any()})
        optimizer.step()
    assert reached[0] >= set(change.writers) != set()
    assert not born - set().union(*reached)


def test_an_identity_that_was_asked_for_is_printed_as_measured():
    model, optimizer, x = ready(mlp, ROWS)
    layer = functools.partial(nn.Linear, 8, 8)
    change = ax.grow(model, ax.Insert("", layer, index=2, init="identity"), optimizer, probe=x)
    assert change.max_difference == 0.0 and "function unchanged (max |d| = 0)" in str(change)
    change = ax.grow(model, ax.Insert("", layer, index=2, init="kaiming"), optimizer, probe=x)
    assert change.max_difference > 0.0 and "function changed (max |d| = " in str(change)


def test_by_hand_a_new_block_changes_the_function():
    model, _, x = ready(Net, ROWS)
    before = output(model, x)
    model.blocks.append(Block())
    assert (output(model, x) - before).abs().max() > 1e-2


@pytest.mark.parametrize("block", [Block, Rectified])
def test_by_hand_zeroing_a_whole_block_keeps_the_function_and_never_learns(block):
    model, _, x = ready(Net, ROWS)
    before = output(model, x)
    model.blocks.append(block())
    ax.init.zero(model.blocks[2])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.05)
    assert torch.equal(output(model, x), before)
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, inputs(ROWS, seed))
        optimizer.step()
    weights = [p for p in model.blocks[2].parameters() if p.dim() > 1]
    assert not any(p.any() for p in weights) and not any(p.grad.any() for p in weights)


@pytest.mark.parametrize("init", ["preserve", "zero"])
def test_with_auxin_a_block_that_could_never_learn_is_refused(init):
    model, optimizer, x = ready(Net, ROWS)
    edit = ax.Insert("blocks", Rectified, init=init, fade=0)
    with pytest.raises(ax.GrowthError, match="no gradient reaches"):
        ax.grow(model, edit, optimizer, probe=x)
    assert len(model.blocks) == 2


def test_exactly_nothing_changes_in_any_precision_nor_in_train_mode_without_dropout():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        model = Net(depth=2).to(dtype)
        x = batch()[0].to(dtype)
        before = model(x)
        for edit in (ax.Duplicate("blocks"), ax.Insert("blocks", functools.partial(Block, 8), index=1)):
            change = ax.grow(model, edit, probe=x)
            assert change.max_difference == 0.0 and torch.equal(model(x), before) and model.training
