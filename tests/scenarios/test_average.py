"""A layer between three of the same shape: the average keeps every old layer's own history, and gets a new entry."""

import functools

import pytest
import torch
from growing import bits, ema_of
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import auxin as ax

torch.set_num_threads(1)
DECAY, LAYER = 0.999, functools.partial(nn.Linear, 6, 6)


class Shadows:
    """The slow twin: one average for each parameter object, by torch's own rule, blind to names and positions."""

    def __init__(self, model):
        self.values = {p: p.detach().clone() for p in model.parameters()}
        self.rule, self.seen = get_ema_multi_avg_fn(DECAY), 0

    def update(self):
        live = [p.detach() for p in self.values]
        if self.seen:
            self.rule(list(self.values.values()), live, self.seen)
        else:
            for value, p in zip(self.values.values(), live, strict=True):
                value.copy_(p)
        self.seen += 1


def run(grow, steps=30):
    """Train, grow in the middle, train on; the average, and what it should hold for the old layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(LAYER() for _ in range(3)))
    old = list(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ema, shadows = ema_of(model, DECAY), Shadows(model)
    for step in range(2 * steps):
        if step == steps:
            grow(model, optimizer, ema)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        ema.update_parameters(model)
        shadows.update()
    names = [[name for name, module in model.named_modules() if module is layer][0] for layer in old]
    averaged = [dict(ema.module.named_modules())[name] for name in names if hasattr(ema.module, name)]
    own = [(bits(m.weight), bits(m.bias)) for m in averaged]
    return model, ema, own, [(bits(shadows.values[m.weight]), bits(shadows.values[m.bias])) for m in old]


def test_by_hand_the_old_averages_are_mixed_with_other_layers():
    def grow(model, optimizer, ema):
        model.insert(1, LAYER())
        optimizer.add_param_group({"params": list(model[1].parameters())})

    model, ema, averaged, expected = run(grow)
    assert len(model) == 4 and len(ema.module) == 3
    assert averaged[0] == expected[0] and averaged[1] not in expected


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_with_auxin_the_old_averages_are_those_of_a_run_that_never_grew(index):
    def grow(model, optimizer, ema):
        optimizer.zero_grad()
        ax.grow(model, ax.Insert("", LAYER, index=index, init="default"), optimizer, ema, probe=torch.randn(4, 6))

    model, ema, averaged, expected = run(grow)
    assert averaged == expected
    assert [n for n, _ in ema.module.named_parameters()] == [n for n, _ in model.named_parameters()]
    new, live = ema.module[index].weight, model[index].weight
    assert new is not live and not torch.equal(new, live) and torch.allclose(new, live, atol=0.5)
    assert int(ema.n_averaged) == 60
