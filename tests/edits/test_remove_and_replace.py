"""Taking a module out, and putting another in its place."""

import functools
import json

import pytest
import torch
from torch import nn

import auxin as ax


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.norm, self.extra = nn.LayerNorm(8), nn.Identity()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)})

    def forward(self, x):
        x = self.extra(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return sum(head(x) for head in self.heads.values())


@pytest.fixture
def run():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    x = torch.randn(16, 8)
    train(model, optimizer, average, x, 3)
    return model, optimizer, average, x


def train(model, optimizer, average, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    optimizer.zero_grad()


def test_a_block_is_taken_out_and_those_behind_move_up(run):
    model, optimizer, average, x = run
    blocks, state = list(model.blocks), optimizer.state[model.blocks[2].up.weight]
    change = ax.grow(model, ax.Remove("blocks.1"), optimizer, average, probe=x)
    assert list(model.blocks) == [blocks[0], blocks[2]] and list(model.blocks._modules) == ["0", "1"]
    assert optimizer.state[model.blocks[1].up.weight] is state
    assert str(change).startswith("Remove('blocks.1') · -280 parameters") and change.max_difference > 0
    ax.verify(model, optimizer, average)
    train(model, optimizer, average, x, 2)


def test_a_copy_that_was_added_and_removed_leaves_the_same_function(run):
    model, optimizer, average, x = run
    before = model(x)
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, average, probe=x)
    change = ax.grow(model, ax.Remove("blocks.3"), optimizer, average, probe=x)
    assert torch.equal(model(x), before) and "function unchanged" in str(change)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_a_named_child_is_taken_out(run):
    model, optimizer, average, x = run
    ax.grow(model, ax.Remove("heads.a"), optimizer, average, probe=x)
    assert list(model.heads) == ["b"]
    ax.verify(model, optimizer, average)


def test_an_identity_becomes_a_block_that_starts_as_one(run):
    model, optimizer, average, x = run
    before = model(x)
    change = ax.grow(model, ax.Replace("extra", Block, init="preserve"), optimizer, average, probe=x)
    assert torch.equal(model(x), before) and change.preserves and change.max_difference == 0
    ax.verify(model, optimizer, average)
    weight = model.extra.down.weight.clone()
    train(model, optimizer, average, x, 2)
    assert not torch.equal(model.extra.down.weight, weight)


def test_tensors_that_fit_are_kept_with_their_state(run):
    model, optimizer, average, x = run
    gain, state = model.norm.weight, optimizer.state[model.norm.weight]
    averaged = average.module.norm.weight.clone()
    change = ax.grow(model, ax.Replace("norm", functools.partial(nn.RMSNorm, 8)), optimizer, average, probe=x)
    assert model.norm.weight is gain and optimizer.state[gain] is state and "1 tensors kept" in str(change)
    assert torch.equal(average.module.norm.weight, averaged) and type(average.module.norm) is nn.RMSNorm
    ax.verify(model, optimizer, average)
    train(model, optimizer, average, x, 2)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (ax.Remove("norm"), "attribute of a Net.*Replace\\('norm', torch.nn.Identity\\)"),
        (ax.Remove(""), "the model itself"),
        (ax.Remove("blocks.9"), "no child '9'"),
        (ax.Replace("nope", nn.GELU), "no child 'nope'"),
        (ax.Replace("norm", functools.partial(nn.Linear, 8, 9)), "does not run on the probe"),
        (ax.Replace("norm", functools.partial(nn.Linear, 8, 9), init="preserve"), "cannot leave the function"),
    ],
)
def test_refusals(run, edit, words):
    model, optimizer, average, x = run
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(model, edit, optimizer, average, probe=x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ax.verify(model, optimizer, average)


def test_hooks_are_not_lost_without_a_word(run):
    model, optimizer, _, x = run
    handle = model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ax.GrowthError, match="hooks, which would never fire again"):
        ax.grow(model, ax.Replace("norm", functools.partial(nn.RMSNorm, 8)), optimizer, probe=x)
    with pytest.raises(ax.GrowthError, match="norm was replaced, and the hooks"), ax.surgery(model, optimizer):
        model.norm = nn.RMSNorm(8)
    handle.remove()
    ax.grow(model, ax.Replace("norm", functools.partial(nn.RMSNorm, 8)), optimizer, probe=x)


def test_both_replay_and_load(run, tmp_path):
    model, optimizer, average, x = run
    edits = [ax.Remove("blocks.0"), ax.Replace("norm", functools.partial(nn.RMSNorm, 8))]
    grower = ax.Grower(model, optimizer, average, edits=edits, when=ax.when.every(1), probe=x)
    for edit in edits:
        grower.grow(edit)
    train(model, optimizer, average, x, 2)
    fresh = ax.replay(Net(), json.loads(json.dumps(grower.journal.to_json())))
    assert [(n, p.shape) for n, p in fresh.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    ax.save(grower, tmp_path / "run")
    again = Net()
    optimizer_2 = torch.optim.AdamW(again.parameters(), lr=1e-2)
    average_2 = torch.optim.swa_utils.AveragedModel(again)
    grower_2 = ax.Grower(again, optimizer_2, average_2, edits=edits, when=ax.when.every(1), probe=x)
    ax.load(tmp_path / "run", grower_2)
    train(model, optimizer, average, x, 3)
    train(again, optimizer_2, average_2, x, 3)
    assert torch.equal(model(x), again(x)) and torch.equal(average(x), average_2(x))


def test_a_growth_whose_callback_raises_is_taken_back(run):
    model, optimizer, average, x = run

    def refuse(change):
        raise ZeroDivisionError

    grower = ax.Grower(model, optimizer, average, edits=[], when=ax.when.every(1), probe=x, on_growth=refuse)
    with pytest.raises(ZeroDivisionError):
        grower.grow(ax.Duplicate("blocks", by=1))
    assert len(model.blocks) == 3 and len(grower.journal) == 0
    grower.verify()
