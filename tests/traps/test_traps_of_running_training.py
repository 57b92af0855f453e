"""What plain torch lets go wrong around hooks, autocast and steps in the backward pass: by hand, then with auxin."""

import functools

import pytest
import torch
from growing import Net, batch
from torch import nn

import auxin as ax

torch.set_num_threads(1)


def test_a_swapped_tensor_loses_its_hook():
    """`swap_tensors` moves the contents, hooks included, to the other object."""
    fired = []
    layer = nn.Linear(4, 2)
    layer.weight.register_hook(lambda grad: fired.append(tuple(grad.shape)))
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(3, 4)))
    nn.functional.linear(torch.randn(5, 4), layer.weight).sum().backward()
    assert fired == []

    layer = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.weight.register_hook(lambda grad: fired.append(tuple(grad.shape)))
    with ax.surgery(layer, optimizer):
        layer.weight.data = torch.cat([layer.weight.data, torch.randn(1, 4)])
        layer.bias.data = torch.cat([layer.bias.data, torch.zeros(1)])
    layer(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert fired == [(3, 4)]


def test_a_weight_edited_under_autocast_does_nothing():
    """Autocast keeps the cast weight from before the edit."""
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        layer.weight.data.zero_()
        layer.bias.data.zero_()
        assert torch.equal(layer(x), before)
    assert not layer(x).any()

    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    x, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        with pytest.raises(ax.GrowthError, match="inside autocast"):
            ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=x)
        with pytest.raises(ax.GrowthError, match="inside autocast"), ax.surgery(model, optimizer):
            pass
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=x)


def test_a_replaced_module_loses_its_hooks():
    """Hooks hang on the module object, which is gone."""
    fired = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].register_forward_hook(lambda *_: fired.append(1))
    model[1] = nn.GELU()
    model(torch.randn(2, 4))
    assert fired == []

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model[1].register_forward_hook(lambda *_: fired.append(1))
    with pytest.raises(ax.GrowthError, match="would never fire again"):
        ax.grow(model, ax.Replace("1", nn.GELU), optimizer, probe=torch.randn(2, 4))
    with pytest.raises(ax.GrowthError, match="would never fire again"), ax.surgery(model, optimizer):
        model[1] = nn.GELU()
    assert type(model[1]) is nn.ReLU
    with ax.surgery(model, optimizer):
        model[1] = nn.GELU()
        model[1].register_forward_hook(lambda *_: fired.append(1))
    fired.clear()  # the probe of the refused growth ran the old one
    model(torch.randn(2, 4))
    assert fired == [1]


def stepping(parameter, optimizers):
    """An optimizer that steps as soon as the parameter's gradient is there."""
    optimizers[parameter] = torch.optim.SGD([parameter], 0.1)

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    parameter.register_post_accumulate_grad_hook(step)


def test_a_new_layer_beside_steps_in_the_backward_pass_never_trains():
    """Nothing steps the new parameters, and their gradients pile up."""

    def run():
        torch.manual_seed(0)
        model, optimizers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {}
        for p in model.parameters():
            stepping(p, optimizers)
        return model, optimizers, torch.randn(8, 4)

    model, _, x = run()
    model.insert(1, nn.Linear(4, 4))
    before, old = model[1].weight.clone(), model[0].weight.clone()
    for _ in range(3):
        model(x).square().mean().backward()
    assert torch.equal(model[1].weight, before) and not torch.equal(model[0].weight, old)
    assert model[1].weight.grad is not None and model[0].weight.grad is None

    model, optimizers, x = run()
    edit = ax.Insert("", functools.partial(nn.Linear, 4, 4), index=1, init="default")
    for companions in ((), tuple(optimizers.values())):
        with pytest.raises(ax.GrowthError, match="would never train, and its gradient would pile up"):
            ax.grow(model, edit, *companions, probe=x)
    assert len(model) == 2
    with ax.surgery(model, probe=x):
        model.insert(1, nn.Linear(4, 4))
        for p in model[1].parameters():
            stepping(p, optimizers)
    ax.verify(model, *list(optimizers.values())[:4])
    before = model[1].weight.clone()
    model(x).square().mean().backward()
    assert not torch.equal(model[1].weight, before) and model[1].weight.grad is None
