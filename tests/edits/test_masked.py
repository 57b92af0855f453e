"""Masked (autoregressive) networks: a layer that mixes what the masks keep apart is refused by name."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import auxin as ax

D, HIDDEN = 4, 12
X = torch.randn(16, D, generator=torch.Generator().manual_seed(3))


class MaskedLinear(nn.Linear):
    def __init__(self, degrees_in, degrees_out, strict=False):
        super().__init__(len(degrees_in), len(degrees_out))
        given, made = torch.tensor(degrees_in), torch.tensor(degrees_out)
        mask = made[:, None] > given[None] if strict else made[:, None] >= given[None]
        self.register_buffer("mask", mask.float())

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


INPUTS, UNITS = list(range(1, D + 1)), [1 + i % (D - 1) for i in range(HIDDEN)]


class MaskedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = MaskedLinear(UNITS, UNITS), MaskedLinear(UNITS, UNITS)
        self.act = nn.ELU()

    def forward(self, x):
        return x + self.second(self.act(self.first(x)))


class Made(nn.Module):
    """Output i depends on inputs before i only; a context that every output may depend on."""

    def __init__(self):
        super().__init__()
        self.context = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, HIDDEN))
        self.inp, self.act = MaskedLinear(INPUTS, UNITS), nn.ELU()
        self.blocks = nn.ModuleList([MaskedBlock(), MaskedBlock()])
        self.out = MaskedLinear(UNITS, INPUTS, strict=True)

    def forward(self, x, context=None):
        x = self.inp(x)
        if context is not None:
            x = x + self.context(context)
        for block in self.blocks:
            x = block(x)
        return self.out(self.act(x))


def masked_layer():
    return MaskedLinear(UNITS, UNITS)


def order(model):
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), X).abs().sum(1)
    return bool((jacobian.triu() == 0).all())


def build():
    torch.manual_seed(0)
    model = Made()
    assert order(model)
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def train(model, optimizer):
    for _ in range(5):
        (model(X) - X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


LINEAR = functools.partial(nn.Linear, HIDDEN, HIDDEN)


@pytest.mark.parametrize(
    "edit",
    [
        ax.After("act"),
        ax.After("inp"),
        ax.After("blocks.0"),
        ax.After("blocks.0.act"),
        ax.After("out"),
        ax.After("blocks.1.first", LINEAR, init="identity"),
        ax.Insert("blocks", LINEAR, init="identity", index=1),
        ax.Replace("blocks.0.first", LINEAR),
        [ax.Duplicate("blocks", by=1), ax.After("act")],
    ],
)
def test_what_would_lose_the_order_is_refused_by_name_and_nothing_is_changed(edit):
    model, optimizer = build()
    names = list(model.state_dict())
    with pytest.raises(ax.GrowthError, match=r"inp \(MaskedLinear\) masks its weight.*masked as those beside it"):
        ax.grow(model, edit, optimizer, probe=X)
    assert list(model.state_dict()) == names and order(model)


@pytest.mark.parametrize(
    "edit",
    [
        ax.After("act", masked_layer, init="default"),
        ax.After("blocks.0.first", masked_layer, init="kaiming"),
        ax.Insert("blocks", MaskedBlock),
        ax.Duplicate("blocks", by=1),
        ax.Duplicate("blocks", by=2, output="keep"),
    ],
)
def test_masked_layers_and_blocks_grow_and_keep_the_order(edit):
    model, optimizer = build()
    ax.grow(model, edit, optimizer, probe=X)
    train(model, optimizer)
    assert order(model)


def test_beside_the_masks_anything_grows():
    model, optimizer = build()
    probe = (X, torch.randn(16, 3))
    ax.grow(model, ax.After("context.1"), optimizer, probe=probe)
    ax.grow(model, ax.Insert("context", LINEAR), optimizer, probe=probe)
    assert order(model)


def test_an_unmasked_block_that_fades_in_is_refused_too():
    model, optimizer = build()
    with pytest.raises(ax.GrowthError, match="masks its weight"):
        ax.grow(model, ax.Insert("blocks", normed, index=1), optimizer, probe=X)


def normed():
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN))


class Pixels(nn.Conv2d):
    """Masked in space only: the channels are mixed freely."""

    def __init__(self, width_in, width, strict=False):
        super().__init__(width_in, width, 3, padding=1)
        mask = torch.ones_like(self.weight)
        mask[:, :, 2], mask[:, :, 1, 1 + (not strict) :] = 0, 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * self.mask, self.bias, padding=1)


def test_a_pointwise_layer_keeps_an_order_in_space_and_a_wider_kernel_does_not():
    torch.manual_seed(0)
    model = nn.Sequential(Pixels(1, 6, strict=True), nn.ELU(), Pixels(6, 6), nn.ELU(), nn.Conv2d(6, 2, 1))
    image = torch.randn(4, 1, 5, 5)
    ax.grow(model, ax.After("1"), probe=image)
    with pytest.raises(ax.GrowthError, match=r"0 \(Pixels\) masks its weight"):
        ax.grow(model, ax.After("1", functools.partial(nn.Conv2d, 6, 6, 3, padding=1), init="default"), probe=image)


def test_pruned_networks_are_no_matter_and_what_cannot_be_looked_at_is_said():
    model = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 2))
    prune.l1_unstructured(model[0], "weight", amount=0.9)
    assert ax.grow(model, ax.After("1"), probe=X).notes == ()
    words = nn.Sequential(nn.Embedding(5, HIDDEN), MaskedLinear(UNITS, UNITS))
    change = ax.grow(words, ax.After("1"), probe=torch.randint(5, (3, 4)))
    assert "1 (MaskedLinear) masks its weight; what the masks keep apart could not be looked at" in str(change)


# ---- surgery


def unmasked_layer_inside(model):
    layer = LINEAR()
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    model.blocks[0].act = nn.Sequential(nn.ELU(), layer)


def unmasked_in_place(model):
    """Zeros stand where the mask was, and would train."""
    old = model.blocks[0].first
    model.blocks[0].first = LINEAR()
    model.blocks[0].first.weight.data, model.blocks[0].first.bias.data = old.weight.data * old.mask, old.bias.data


def units_without_masks(model):
    """Two more units, of which the masks know nothing."""
    block = model.blocks[0]
    for layer, axis in ((block.first, 0), (block.second, 1)):
        size = [2, HIDDEN] if axis == 0 else [HIDDEN, 2]
        layer.weight.data = torch.cat([layer.weight.data, torch.randn(size)], axis)
        layer.mask = torch.cat([layer.mask, torch.ones(size)], axis)
    block.first.bias.data = torch.cat([block.first.bias.data, torch.zeros(2)])


@pytest.mark.parametrize("change", [unmasked_layer_inside, unmasked_in_place, units_without_masks])
def test_surgery_that_loses_the_order_warns(change):
    model, optimizer = build()
    with pytest.warns(UserWarning, match=r"inp \(MaskedLinear\) masks its weight, and now outputs depend"):
        with ax.surgery(model, optimizer, probe=X) as done:
            change(model)
    assert "the order of an autoregressive network is lost" in str(done.change)
    train(model, optimizer)
    assert not order(model)


def masked_block(model):
    model.blocks.append(MaskedBlock())


def masked_units(model):
    """One more unit of the first degree in the first block."""
    block, degrees = model.blocks[0], [*UNITS, 1]
    for layer, axis, masks in ((block.first, 0, (UNITS, degrees)), (block.second, 1, (degrees, UNITS))):
        size = [1, HIDDEN] if axis == 0 else [HIDDEN, 1]
        layer.weight.data = torch.cat([layer.weight.data, 0.1 * torch.ones(size)], axis)
        layer.mask = MaskedLinear(*masks).mask
    block.first.bias.data = torch.cat([block.first.bias.data, torch.zeros(1)])


@pytest.mark.parametrize("change", [masked_block, masked_units])
def test_surgery_that_keeps_the_order_is_silent(change, recwarn):
    model, optimizer = build()
    with ax.surgery(model, optimizer, probe=X) as done:
        change(model)
    assert "masks its weight" not in str(done.change) and not len(recwarn)
    train(model, optimizer)
    assert order(model)


def test_surgery_without_a_probe_says_that_nobody_has_looked():
    model, optimizer = build()
    with ax.surgery(model, optimizer) as done:
        masked_block(model)
    assert "without a probe nothing tells whether the masks still keep apart" in str(done.change)
