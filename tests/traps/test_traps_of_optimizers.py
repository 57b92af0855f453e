"""What plain torch lets go wrong around the optimizer without a word: shown by hand, then with auxin."""

import functools

import pytest
import torch
from growing import Block, Net, batch, bits, train
from torch import nn

import auxin as ax

torch.set_num_threads(1)


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), lr=1e-2, **options)


def seeded(cls=Net, *args, seed=0, **options):
    torch.manual_seed(seed)
    return cls(*args, **options)


def moved(module, before):
    return all(not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def copies(module):
    return [p.detach().clone() for p in module.parameters()]


def test_a_layer_inserted_without_the_optimizer_never_trains():
    model = seeded()
    optimizer = adam(model)
    train(model, optimizer, 2)
    model.blocks.append(Block())
    start = copies(model.blocks[2])
    train(model, optimizer, 5)
    assert not any(not torch.equal(p, b) for p, b in zip(model.blocks[2].parameters(), start, strict=True))
    with pytest.raises(ax.GrowthError, match=r"blocks\.2\.up\.weight \(16, 8\) is in no optimizer: it would never"):
        ax.verify(model, optimizer)

    model = seeded()
    optimizer = adam(model)
    train(model, optimizer, 2)
    ax.grow(model, ax.Insert("blocks", functools.partial(Block, 8)), optimizer, probe=batch()[0])
    start = copies(model.blocks[2])
    train(model, optimizer, 2)
    assert moved(model.blocks[2], start)


def test_a_replaced_layer_stays_alive_in_the_optimizer():
    model = seeded()
    optimizer = adam(model)
    train(model, optimizer, 2)
    old = model.head.weight
    model.head = nn.Linear(8, 1)
    assert any(p is old for p in optimizer.param_groups[0]["params"]) and old in optimizer.state
    with pytest.raises(ax.GrowthError, match=r"holds a tensor \(1, 8\), which the model does not have"):
        ax.verify(model, optimizer)

    model = seeded()
    optimizer = adam(model)
    train(model, optimizer, 2)
    old = model.head.weight
    with ax.surgery(model, optimizer):
        model.head = nn.Linear(8, 1)
    assert not any(p is old for p in optimizer.param_groups[0]["params"]) and old not in optimizer.state
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def moments_by_name(model, optimizer):
    return {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}


def test_moments_land_on_wrong_tensors_after_an_append_and_a_plain_resume():
    """Three Linear(6, 6) in a row: every shape fits, so nothing is said."""

    def stack(depth):
        return nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)), nn.Linear(6, 1))

    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))

    def steps(model, optimizer, count=3):
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()

    def resumed(model, optimizer):
        """A new process: the deeper network written by hand, and the stock loaders."""
        other = stack(3)
        other.load_state_dict(model.state_dict())
        fresh = adam(other)
        fresh.load_state_dict(optimizer.state_dict())
        return moments_by_name(other, fresh)

    torch.manual_seed(0)
    model = stack(2)
    optimizer = adam(model)
    steps(model, optimizer)
    model.insert(1, nn.Linear(6, 6))
    optimizer.param_groups[0]["params"] += list(model[1].parameters())
    steps(model, optimizer)
    live, loaded = moments_by_name(model, optimizer), resumed(model, optimizer)
    wrong = [name for name in live if live[name].shape != loaded[name].shape or not live[name].equal(loaded[name])]
    assert len(wrong) == 6 and wrong[0] == "1.weight"  # all behind the insertion, the head's (1, 6) among them
    assert loaded["3.weight"].shape == (6, 6)  # shapes are not checked either

    torch.manual_seed(0)
    model = stack(2)
    optimizer = adam(model)
    steps(model, optimizer)
    layer = functools.partial(nn.Linear, 6, 6)
    ax.grow(model, ax.Insert("", layer, index=1, init="identity"), optimizer, probe=x)
    steps(model, optimizer)
    live, loaded = moments_by_name(model, optimizer), resumed(model, optimizer)
    assert all(bits(live[name]) == bits(loaded[name]) for name in live) and len(live) == 8


def test_a_parameter_appended_twice_is_stepped_twice():
    p = nn.Parameter(torch.zeros(1))
    twice = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.1)
    twice.param_groups[0]["params"] += [p, p]
    p.grad = torch.ones(1)
    twice.step()
    assert p.item() == pytest.approx(-0.2, abs=1e-3) and float(twice.state[p]["step"]) == 2

    model = seeded()
    optimizer = adam(model)
    optimizer.param_groups[0]["params"].append(model.head.bias)
    with pytest.raises(ax.GrowthError, match=r"head\.bias is held 2 times: it would be stepped 2 times"):
        ax.verify(model, optimizer)
    with pytest.raises(ax.GrowthError, match=r"head\.bias is held 2 times"):
        ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=batch()[0])
    del optimizer.param_groups[0]["params"][-1]
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=batch()[0])
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in model.parameters()] and len(set(held)) == len(held)
    train(model, optimizer, 1)
    assert {float(optimizer.state[p]["step"]) for p in model.blocks[2].parameters()} == {1.0}


def test_lbfgs_given_a_new_list_never_trains_the_new_layer():
    def lbfgs(model):
        return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    model = seeded()
    optimizer = lbfgs(model)
    train(model, optimizer, 2)
    model.blocks.append(Block())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    start = copies(model.blocks[2])
    train(model, optimizer, 3)
    assert not any(not torch.equal(p, b) for p, b in zip(model.blocks[2].parameters(), start, strict=True))

    model = seeded()
    optimizer = lbfgs(model)
    before = train(model, optimizer, 2)[-1]
    ax.grow(model, ax.Insert("blocks", functools.partial(Block, 8)), optimizer, probe=batch()[0])
    start = copies(model.blocks[2])
    losses = train(model, optimizer, 5)
    assert moved(model.blocks[2], start)
    assert losses[-1] < before


def test_a_list_of_parameters_taken_before_leaves_the_new_layer_unclipped():
    def huge(model, parameters):
        """The norm that the last block's gradient has after clipping to 1."""
        (1e4 * model(batch()[0]).square().sum()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        return float(nn.utils.get_total_norm([p.grad for p in model.blocks[-1].parameters()]))

    model = seeded()
    parameters = list(model.parameters())
    model.blocks.append(Block())
    assert huge(model, parameters) > 100

    model = seeded()
    optimizer = adam(model)
    parameters = list(model.parameters())
    grower = ax.Grower(
        model,
        optimizer,
        edits=ax.Duplicate("blocks", by=1),
        when=ax.when.every(1),
        probe=batch()[0],
        on_growth=lambda change: parameters.extend(change.parameters),
    )
    grower.step()
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
    assert huge(model, parameters) <= 1.0


def test_a_new_layer_inherits_nothing_by_itself():
    """It arrives in float32, in train mode, trainable, and under the optimizer's default weight decay."""

    def frozen():
        model = seeded().double()
        for block in model.blocks:
            block.norm.requires_grad_(False)
        model.eval()
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() == 1 and p.requires_grad]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return model, torch.optim.AdamW(groups, lr=1e-3)

    model, optimizer = frozen()
    new = Block()
    model.blocks.append(new)
    optimizer.add_param_group({"params": list(new.parameters())})
    assert new.training and new.norm.weight.requires_grad and new.up.weight.dtype is torch.float32
    assert optimizer.param_groups[-1]["weight_decay"] == 0.01
    with pytest.raises(RuntimeError, match="dtype|Double"):
        model(batch()[0].double())

    for edit in (ax.Duplicate("blocks", by=1), ax.Insert("blocks", functools.partial(Block, 8))):
        model, optimizer = frozen()
        ax.grow(model, edit, optimizer, probe=batch()[0].double())
        new = model.blocks[2]
        assert not any(m.training for m in new.modules())
        assert not new.norm.weight.requires_grad and new.up.weight.requires_grad
        assert {p.dtype for p in new.parameters()} == {torch.float64}
        decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert decay[id(new.up.weight)] == decay[id(new.down.weight)] == 0.1
        assert decay[id(new.up.bias)] == decay[id(new.down.bias)] == 0.0
        assert id(new.norm.weight) not in decay
        assert len(optimizer.param_groups) == 2
