"""What plain torch lets go wrong around averages, names, schedules and randomness: by hand, then with auxin."""

import functools

import pytest
import torch
from growing import Block, Net, batch, bits, ema_of, train
from torch import nn
from torch.optim import lr_scheduler

import auxin as ax

torch.set_num_threads(1)


def seeded(*args, seed=0, **options):
    torch.manual_seed(seed)
    return Net(*args, **options)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def three(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))


def inputs():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


LAYER = functools.partial(nn.Linear, 6, 6)


def test_an_average_mixes_a_new_middle_layer_into_an_old_one():
    """AveragedModel pairs parameters by position and drops what is left over."""
    model = three()
    ema = ema_of(model, decay=0.9)
    ema.update_parameters(model)
    old = ema.module[1]
    own, new = old.weight.detach().clone(), LAYER()
    model.insert(1, new)
    ema.update_parameters(model)
    assert torch.allclose(old.weight, 0.9 * own + 0.1 * new.weight) and not torch.allclose(old.weight, own)

    model = three()
    ema = ema_of(model, decay=0.9)
    ema.update_parameters(model)
    old = ema.module[1]
    own = old.weight.detach().clone()
    ax.grow(model, ax.Insert("", LAYER, index=1, init="identity"), ema, probe=inputs())
    with torch.no_grad():
        model[1].weight.add_(1.0)
    ema.update_parameters(model)
    assert ema.module[2] is old and bits(old.weight) == bits(own)
    assert torch.allclose(ema.module[1].weight, torch.eye(6) + 0.1)
    assert [n for n, _ in ema.module.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_an_average_lacks_a_layer_appended_at_the_end():
    model = three()
    ema = ema_of(model)
    ema.update_parameters(model)
    model.append(LAYER())
    ema.update_parameters(model)
    assert len(ema.module) == 3 < len(model)
    with pytest.raises(ax.GrowthError, match=r"AveragedModel lacks 3\.weight \(6, 6\): it would not be averaged"):
        ax.verify(model, ema)

    model = three()
    ema = ema_of(model)
    ema.update_parameters(model)
    ax.grow(model, ax.Insert("", LAYER, init="identity"), ema, probe=inputs())
    ema.update_parameters(model)
    assert len(ema.module) == 4
    ax.verify(model, ema)


SILENT = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.1),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=20),
}


@pytest.mark.parametrize("name", SILENT)
def test_a_group_added_under_a_schedule_runs_on_another_curve(name):
    def ready():
        model = seeded()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = SILENT[name](optimizer)
        for step in range(6):
            train(model, optimizer, seed=step)
            schedule.step()
        return model, optimizer, schedule

    model, optimizer, schedule = ready()
    new = Block()
    model.blocks.append(new)
    optimizer.add_param_group({"params": list(new.parameters())})
    for _ in range(4):
        optimizer.step()
        schedule.step()
    old, own = (group["lr"] for group in optimizer.param_groups)
    assert own > 1.2 * old

    model, optimizer, schedule = ready()
    ax.grow(model, ax.Insert("blocks", functools.partial(Block, 8)), optimizer, schedule, probe=batch()[0])
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [old]
    assert all(any(p is q for q in optimizer.param_groups[0]["params"]) for p in model.blocks[2].parameters())


def test_an_old_checkpoint_puts_weights_into_wrong_layers_after_an_insertion():
    x, old = inputs(), three()
    state, expected = {k: v.clone() for k, v in old.state_dict().items()}, old(x)

    model = three()
    model.insert(1, LAYER())
    with torch.no_grad():
        nn.init.eye_(model[1].weight), nn.init.zeros_(model[1].bias)
    assert torch.equal(model(x), expected)
    report = model.load_state_dict(state, strict=False)
    assert report.unexpected_keys == [] and not torch.allclose(model(x), expected)
    assert torch.equal(model[1].weight, state["1.weight"])  # what was layer 1 is layer 2 now
    wrong = torch.func.functional_call(model, state, (x,))
    assert not torch.allclose(wrong, expected)

    model = three()
    change = ax.grow(model, ax.Insert("", LAYER, index=1, init="identity"), probe=x)
    assert change.renamed == {"1": "2", "2": "3"}
    renamed = {}
    for name, value in state.items():
        module, _, leaf = name.partition(".")
        renamed[f"{change.renamed.get(module, module)}.{leaf}"] = value
    with torch.no_grad():
        for p in (*model[0].parameters(), *model[2].parameters(), *model[3].parameters()):
            p.normal_()
    report = model.load_state_dict(renamed, strict=False)
    assert report.missing_keys == ["1.weight", "1.bias"] and report.unexpected_keys == []
    assert torch.equal(model(x), expected)


def test_the_journal_holds_the_old_names_and_replay_refuses_another_network():
    model = three()
    grower = ax.Grower(
        model,
        edits=ax.Insert("", LAYER, index=1, init="identity"),
        when=ax.when.every(1),
        probe=inputs(),
    )
    grower.step()
    assert grower.journal.entries[0].renamed == {"1": "2", "2": "3"}
    wider = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 7), nn.Linear(7, 6))
    with pytest.raises(ax.GrowthError, match="gives another structure here than it gave then"):
        ax.replay(wider, grower.journal.to_json())
    assert len(wider) == 3


def test_building_a_layer_moves_the_order_of_the_data():
    torch.manual_seed(0)
    expected = torch.randperm(100)
    torch.manual_seed(0)
    Block()
    assert not torch.equal(torch.randperm(100), expected)

    for edit in (
        ax.Insert("blocks", functools.partial(Block, 8)),
        ax.Insert("blocks", functools.partial(Block, 8), init="kaiming"),
        ax.Duplicate("blocks", by=1, content="fresh"),
    ):
        model = seeded()
        torch.manual_seed(0)
        ax.grow(model, edit, adam(model), probe=batch()[0])
        assert torch.equal(torch.randperm(100), expected)
    model = seeded()
    torch.manual_seed(0)
    with ax.surgery(model, adam(model)):
        model.blocks.append(Block())
        torch.randn(5)
    assert torch.equal(torch.randperm(100), expected)


class Tied(nn.Module):
    def __init__(self, vocabulary=7, dim=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList([Block(dim), Block(dim)])
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_assigning_a_new_parameter_loses_hooks_ties_and_the_optimizer():
    def ready():
        torch.manual_seed(0)
        model = Tied()
        fired = []
        model.embed.weight.register_hook(lambda grad: fired.append("tied"))
        model.blocks[1].up.weight.register_hook(lambda grad: fired.append("block"))
        return model, adam(model), fired

    tokens = torch.arange(7)[None]
    model, optimizer, fired = ready()
    for module in (model.head, model.blocks[1].up):
        module.weight = nn.Parameter(module.weight.detach().clone())
    model(tokens).sum().backward()
    assert fired == ["tied"] and model.head.weight is not model.embed.weight
    start = model.blocks[1].up.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.blocks[1].up.weight, start)  # the optimizer steps the old one

    model, optimizer, fired = ready()
    old = dict(model.named_parameters())
    ax.grow(model, ax.Duplicate("blocks", by=1, order="stack"), optimizer, probe=tokens)
    assert all(any(p is q for q in model.parameters()) for p in old.values())
    model(tokens).sum().backward()
    assert sorted(fired) == ["block", "tied"] and model.head.weight is model.embed.weight
    start = model.blocks[1].up.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.blocks[1].up.weight, start)


def test_surgery_carries_a_newly_assigned_parameter_on_and_refuses_to_lose_its_hook():
    torch.manual_seed(0)
    model = Tied()
    optimizer = adam(model)
    model(torch.arange(7)[None]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    moment = optimizer.state[model.blocks[1].up.weight]["exp_avg"].clone()
    with ax.surgery(model, optimizer):
        model.blocks[1].up.weight = nn.Parameter(model.blocks[1].up.weight.detach().clone())
    new = model.blocks[1].up.weight
    assert any(p is new for p in optimizer.param_groups[0]["params"])
    assert bits(optimizer.state[new]["exp_avg"]) == bits(moment)

    new.register_hook(lambda grad: None)
    with pytest.raises(ax.GrowthError, match=r"blocks\.1\.up\.weight.*hook"), ax.surgery(model, optimizer):
        model.blocks[1].up.weight = nn.Parameter(model.blocks[1].up.weight.detach().clone())
    assert model.blocks[1].up.weight is new


def test_surgery_says_that_a_tie_was_broken():
    model = Tied()
    with ax.surgery(model, adam(model)) as untied:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert "embed.weight and head.weight are no longer tied" in str(untied.change)

    model = Tied()
    with ax.surgery(model, adam(model)) as kept:
        model.embed.weight = model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert "tied" not in str(kept.change)
