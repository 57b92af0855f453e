"""Heads that are replaced, layers that leave, parameters that are thawed: the optimizer and the average follow."""

import pytest
import torch
from growing import Net, bits, ema_of, train
from torch import nn

import auxin as ax

torch.set_num_threads(1)


def ready(frozen=()):
    torch.manual_seed(0)
    model = Net()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 0.1, "lr": 1e-2}, {"params": rest, "weight_decay": 0.0, "lr": 2e-2}]
    optimizer = torch.optim.AdamW(groups)
    ema = ema_of(model, 0.9)
    train(model, optimizer, 3)
    ema.update_parameters(model)
    return model, optimizer, ema


def states(model, optimizer):
    return {n: {k: bits(v) for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}


def homes(model, optimizer):
    places = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    return {name: places.get(id(p)) for name, p in model.named_parameters()}


def test_a_replaced_head_joins_the_groups_of_the_old_one():
    model, optimizer, ema = ready()
    before = states(model, optimizer)
    old = list(model.head.parameters())
    with ax.surgery(model, optimizer, ema) as done:
        model.head = nn.Linear(8, 3)
    assert homes(model, optimizer)["head.weight"] == 0 and homes(model, optimizer)["head.bias"] == 1
    assert not any(p in optimizer.state for p in (*old, *model.head.parameters()))
    assert len([p for g in optimizer.param_groups for p in g["params"]]) == len(list(model.parameters()))
    after = states(model, optimizer)
    assert {n: s for n, s in after.items() if "head" not in n} == {n: s for n, s in before.items() if "head" not in n}
    assert bits(ema.module.head.weight) == bits(model.head.weight) and ema.module.head is not model.head
    assert "head" in str(done.change)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    ema.update_parameters(model)


def test_classes_added_to_a_head_keep_the_rows_and_moments_of_the_old_ones():
    """The usual recipe: a wider Linear, old rows copied."""
    model, optimizer, ema = ready()
    old, moments = model.head.weight.detach().clone(), optimizer.state[model.head.weight]["exp_avg"].clone()
    averaged = ema.module.head.weight.detach().clone()
    with ax.surgery(model, optimizer, ema):
        wider = nn.Linear(8, 3)
        with torch.no_grad():
            wider.weight[:1], wider.bias[:1] = model.head.weight, model.head.bias
        model.head = wider
    state = optimizer.state[model.head.weight]
    assert bits(model.head.weight[:1]) == bits(old) and bits(state["exp_avg"][:1]) == bits(moments)
    assert state["exp_avg"].shape == (3, 8) and not state["exp_avg"][1:].any()
    assert ema.module.head.weight.shape == (3, 8) and bits(ema.module.head.weight[:1]) == bits(averaged)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()


def test_a_removed_layer_leaves_the_optimizer_and_the_average():
    model, optimizer, ema = ready()
    before = states(model, optimizer)
    gone = list(model.blocks[0].parameters())
    with ax.surgery(model, optimizer, ema, probe=torch.randn(4, 5)) as done:
        del model.blocks[0]
    assert len(model.blocks) == len(ema.module.blocks) == 1
    assert not any(p in optimizer.state for p in gone)
    after = states(model, optimizer)
    kept = {n.replace("blocks.1", "blocks.0"): s for n, s in before.items() if "blocks.0" not in n}
    assert after == kept and done.change.added_parameters == -sum(p.numel() for p in gone)
    ax.verify(model, optimizer, ema)
    train(model, optimizer, 1)


def test_by_hand_a_removed_layer_stays_in_the_optimizer():
    model, optimizer, ema = ready()
    gone = list(model.blocks[0].parameters())
    del model.blocks[0]
    assert all(p in optimizer.state for p in gone)
    with pytest.raises(ax.GrowthError, match=r"AveragedModel has blocks\.1\.up\.weight"):
        ax.verify(model, ema)


@pytest.mark.parametrize("frozen", [("blocks.1",), ("stem",), ("blocks.0", "head")])
def test_a_layer_that_is_thawed_joins_its_groups_in_model_order(frozen):
    model, optimizer, ema = ready(frozen)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    thawed = [p for name in frozen for p in model.get_submodule(name).parameters()]
    assert not any(id(p) in held for p in thawed)
    with ax.surgery(model, optimizer, ema):
        for name in frozen:
            model.get_submodule(name).requires_grad_(True)
    assert all(
        group == (0 if p.dim() > 1 else 1)
        for p, group in zip(model.parameters(), homes(model, optimizer).values(), strict=True)
    )
    order = {id(p): i for i, p in enumerate(model.parameters())}
    for group in optimizer.param_groups:
        places = [order[id(p)] for p in group["params"]]
        assert places == sorted(places)
    start = [bits(p) for p in thawed]
    train(model, optimizer, 1)
    assert all(bits(p) != s for p, s in zip(thawed, start, strict=True))


def test_a_layer_that_is_frozen_stays_where_it_is():
    model, optimizer, ema = ready()
    before = homes(model, optimizer)
    with ax.surgery(model, optimizer, ema):
        model.stem.requires_grad_(False)
    assert homes(model, optimizer) == before
    start = bits(model.stem.weight)
    train(model, optimizer, 2)
    assert bits(model.stem.weight) == start


def test_a_layer_that_no_group_suits_is_refused_and_takes_the_group_that_is_named():
    torch.manual_seed(0)
    model = Net()
    weights = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": rest, "weight_decay": 0.0}])
    with pytest.raises(
        ax.GrowthError, match=r"filter\.weight \(4, 4, 3\): no trained parameter of the same role.*group="
    ):
        with ax.surgery(model, optimizer):
            model.filter = nn.Conv1d(4, 4, 3)
    assert not hasattr(model, "filter")
    with ax.surgery(model, optimizer, group=0):
        model.filter = nn.Conv1d(4, 4, 3)
    assert homes(model, optimizer)["filter.weight"] == 0


class Reused(nn.Module):
    """A module that stands at two places."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared = nn.Linear(5, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList([self.shared, nn.Linear(8, 8), self.shared])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_layer_between_two_uses_of_one_module():
    torch.manual_seed(0)
    model = Reused()
    optimizer, ema = torch.optim.Adam(model.parameters()), ema_of(model)
    with ax.surgery(model, optimizer, ema, probe=torch.randn(4, 5)):
        model.layers.insert(1, nn.Linear(8, 8))
        model.layers.append(model.layers[1])
    twin = ema.module
    assert twin.layers[0] is twin.layers[3] is twin.shared and twin.layers[1] is twin.layers[4]
    assert len(list(model.parameters())) == len(optimizer.param_groups[0]["params"]) == 8
