"""Several edits in one call: one transaction, one proof, one change, one entry of the journal."""

import copy
import functools
import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import auxin as ax
from auxin import engine, typed
from auxin.edits.several import Several
from auxin.journal import Journal, replay
from auxin.refs import Allowed

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Net(nn.Module):
    """Two lists of blocks, a Sequential around all of one side."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.left = nn.ModuleList(Block() for _ in range(2))
        self.right = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in (*self.left, *self.right):
            x = block(x)
        return self.head(x)


def relu_layer():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU())


def breaks():
    return nn.Linear(8, 5)


LINEAR = functools.partial(nn.Linear, 8, 8)
THREE = [
    ax.Duplicate("left", by=1),
    ax.Insert("stem", LINEAR, init="preserve"),
    ax.After("right.0.fc"),
    ax.Duplicate("right", order=[0, 0, 1]),
]


def build():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    train(model, optimizer, average, 3)
    return model, optimizer, average


def train(model, optimizer, average, steps=1):
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)


def state(model, optimizer, average):
    values = [*model.state_dict().items(), *average.state_dict().items()]
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    return [(name, value.clone()) for name, value in values], held, list(map(id, optimizer.state))


def same(a, b):
    (values, *rest), (others, *more) = a, b
    names = [name for name, _ in values] == [name for name, _ in others]
    return names and rest == more and all(torch.equal(x, y) for (_, x), (_, y) in zip(values, others, strict=True))


def test_several_edits_are_one_change_with_one_proof(monkeypatch):
    model, optimizer, average = build()
    before, averaged = model(X), average(X)
    proofs = []
    prove = engine.prove
    monkeypatch.setattr(engine, "prove", lambda *args: proofs.append(1) or prove(*args))
    change = ax.grow(model, THREE, optimizer, average, probe=X)
    assert len(proofs) == 1
    assert torch.equal(model(X), before) and change.max_difference == 0 and change.preserves
    assert torch.allclose(average(X), averaged, atol=1e-6)
    assert [path for path, _ in change.added] == ["left.2", "stem.2", "right.0.fc._grown", "right.1"]
    assert len(model.left) == 3 and len(model.stem) == 3 and len(model.right) == 3
    # The copy of right.0 was planned on what After had left there.
    assert isinstance(model.right[1].fc._grown[0], nn.Module)
    text = str(change)
    assert "\n" not in text
    for part in ("left.2 <- copy of left.1", "stem.2 <- Linear", "right.0.fc._grown.0", "right.1 <- copy of right.0"):
        assert part in text
    born = [p for p in model.parameters() if all(p is not old for old in change.before.parameters.values())]
    assert {id(p) for p in change.parameters} == {id(p) for p in born}
    assert change.added_parameters == sum(p.numel() for p in born)
    ax.verify(model, optimizer, average)
    train(model, optimizer, average, 3)
    assert all(p.grad is None or torch.isfinite(p).all() for p in model.parameters())


def test_the_change_names_each_resized_tensor_once():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    text = str(ax.grow(net, [ax.Widen("0", by=4), ax.Widen("2", by=2)], probe=torch.randn(6, 4)))
    for part in ("Widen('0') · 0.weight (8, 4) -> (12, 4)", "Widen('2') · 2.weight (8, 12) -> (10, 12)"):
        assert text.count(part) == 1, text
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)))
    edits = [ax.Widen("*.0", by=4), ax.Duplicate("", by=1, output="keep")]
    text = str(ax.grow(blocks, edits, probe=torch.randn(6, 4)))
    assert text.count(" -> (12, 4)") == text.count("<- copy of") == text.count("Widen('*.0')") == 1, text


def test_what_a_later_edit_moves_has_its_last_name_in_the_change():
    model, optimizer, average = build()
    edits = [ax.Duplicate("left", order=[0, 1, 1]), ax.Duplicate("left", order=[0, 0, 1, 2])]
    change = ax.grow(model, edits, optimizer, average, probe=X)
    assert [path for path, _ in change.added] == ["left.3", "left.1"]
    assert change.renamed == {"left.1": "left.2"}
    assert [new.source for _, new in change.added] == ["left.1", "left.0"]
    assert {m.name for m in change.moves} == {f"left.{i}.fc.{leaf}" for i in (1, 3) for leaf in ("weight", "bias")}
    assert "left.3 <- copy of left.2" in str(change) and "left.1 <- copy of left.0" in str(change)


def test_a_copy_of_a_copy_in_one_call():
    model, optimizer, average = build()
    averaged = average(X)
    edits = [ax.Duplicate("left", order=[0, 1, 1]), ax.Duplicate("left", order=[0, 1, 2, 2])]
    change = ax.grow(model, edits, optimizer, average, probe=X)
    assert [(path, new.source) for path, new in change.added] == [("left.2", "left.1"), ("left.3", "left.1")]
    assert torch.allclose(average(X), averaged, atol=1e-6)


@pytest.mark.parametrize(
    "bad", [ax.Insert("stem", breaks), ax.Insert("nowhere", LINEAR), ax.Insert("left.2.fc", LINEAR)]
)
def test_one_that_is_refused_takes_all_back(bad):
    model, optimizer, average = build()
    before = state(model, optimizer, average)
    edits = [ax.Duplicate("left", by=1), ax.After("head"), bad, ax.Duplicate("right")]
    with pytest.raises(ax.GrowthError, match="edit 3 of 4: Insert.*None of them is kept"):
        ax.grow(model, edits, optimizer, average, probe=X)
    assert same(before, state(model, optimizer, average))
    train(model, optimizer, average)


def test_a_proof_that_fails_takes_all_back():
    model, optimizer, average = build()
    before = state(model, optimizer, average)
    edits = [ax.Duplicate("left", by=1), ax.Replace("head", functools.partial(nn.Linear, 8, 7))]
    with pytest.raises(ax.GrowthError, match="output would change from"):
        ax.grow(model, edits, optimizer, average, probe=X)
    assert same(before, state(model, optimizer, average))


def test_one_edit_whose_weights_would_never_learn_is_found_beside_one_that_learns():
    model, optimizer, average = build()
    before = state(model, optimizer, average)
    dead = ax.Insert("right", Dead, init="default")
    with pytest.raises(ax.GrowthError, match="no gradient reaches"):
        ax.grow(model, [ax.Duplicate("left", by=1), dead], optimizer, average, probe=X)
    assert same(before, state(model, optimizer, average))


class Dead(Block):
    def forward(self, x):
        return x + torch.relu(self.fc(x.detach()) * 0 - 1)


def test_dry_run_undo_and_trial_take_all_of_it_back():
    model, optimizer, average = build()
    before = state(model, optimizer, average)
    change = ax.grow(model, THREE, optimizer, average, probe=X, dry_run=True)
    assert len(change.added) == 4 and same(before, state(model, optimizer, average))
    grower = ax.Grower(model, optimizer, average, edits=[THREE], when=ax.when.every(1), probe=X)
    with grower.trial(THREE) as tried:
        assert tried is not None and len(model.left) == 3
        train(model, optimizer, average)
    assert same(before, state(model, optimizer, average))
    assert grower.step(1.0) is not None and len(grower.journal) == 1 and len(model.right) == 3
    grower.undo()
    assert same(before, state(model, optimizer, average)) and len(grower.journal) == 0


def test_undo_after_training_with_a_snapshot():
    model, optimizer, average = build()
    before = state(model, optimizer, average)
    grower = ax.Grower(model, optimizer, average, edits=[THREE], when=ax.when.every(1), probe=X, keep=True)
    grower.grow(THREE)
    train(model, optimizer, average, 2)
    grower.undo()
    assert same(before, state(model, optimizer, average))


def test_save_and_load_go_on_to_the_bit(tmp_path):
    model, optimizer, average = build()
    grower = ax.Grower(model, optimizer, average, edits=[THREE], when=ax.when.at([1]), probe=X)
    grower.step(1.0)
    train(model, optimizer, average, 2)
    ax.save(grower, tmp_path / "run")
    twin, other, mean = build()
    again = ax.Grower(twin, other, mean, edits=[THREE], when=ax.when.at([1]), probe=X)
    ax.load(tmp_path / "run", again)
    assert repr(again.journal.entries[0].edit) == repr(grower.journal.entries[0].edit)
    train(model, optimizer, average, 3)
    train(twin, other, mean, 3)
    for (name, p), (name_too, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == name_too and torch.equal(p, q)


def test_the_journal_is_data_and_replays_on_the_meta_device():
    model, optimizer, average = build()
    grower = ax.Grower(model, optimizer, average, edits=[THREE], when=ax.when.every(1), probe=X)
    grower.grow(THREE)
    (entry,) = grower.journal
    assert isinstance(entry.edit, Several) and [type(e).__name__ for e in entry.edit.edits] == [
        "Duplicate", "Insert", "After", "Duplicate"
    ]  # fmt: skip
    data = json.loads(json.dumps(grower.journal.to_json()))
    journal = Journal.from_json(data, Allowed.of(model))
    assert repr(journal.entries[0].edit) == repr(entry.edit) and journal.to_json() == grower.journal.to_json()
    assert [item["path"] for item in entry.added] == ["left.2", "stem.2", "right.0.fc._grown", "right.1"]
    with torch.device("meta"):
        twin = Net()
    replay(twin, journal)
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    assert [(name, p.shape) for name, p in twin.named_parameters()] == shapes
    # Onto a model with an optimizer and an average of its own.
    fresh = Net()
    own = torch.optim.AdamW(fresh.parameters()), AveragedModel(fresh)
    replay(fresh, data, *own)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    ax.verify(fresh, *own)


def test_two_like_layers_in_one_call_draw_other_weights_and_a_seed_draws_them_again():
    edits = [ax.Insert("stem", LINEAR, init="default"), ax.Insert("stem", LINEAR, init="default")]
    made = []
    for seed in (7, 7, 8):
        model, optimizer, _ = build()
        ax.grow(model, edits, optimizer, probe=X, seed=seed)
        made.append((model.stem[2].weight.clone(), model.stem[3].weight.clone()))
    assert not torch.equal(*made[0])
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not torch.equal(made[0][1], made[2][1])


def test_layers_that_fade_in_beside_one_that_does_not():
    model, optimizer, average = build()
    before = model(X)
    edits = [ax.Duplicate("left", by=1), ax.Insert("right", Normed, index=1, fade=3)]
    change = ax.grow(model, edits, optimizer, average, probe=X, rewarm=2)
    assert torch.equal(model(X), before) and change.gates == ("right.1",) and change.fade == 3
    assert "fades in over 3" in str(change) and "warms up over 2" in str(change)
    train(model, optimizer, average, 5)
    assert "auxin_gate" not in dict(model.right[1].named_buffers())


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.fc(x))


def test_what_is_no_list_of_edits_is_refused_by_name():
    model, optimizer, _ = build()
    with pytest.raises(ax.GrowthError, match="a list of edits holds nothing"):
        ax.grow(model, [], optimizer)
    with pytest.raises(ax.GrowthError, match="a list of edits holds str"):
        ax.grow(model, [ax.Duplicate("left"), "right"], optimizer)
    with pytest.raises(ax.GrowthError, match="a list of edits holds Several"):
        ax.grow(model, [Several((ax.Duplicate("left"),))], optimizer)
    with pytest.raises(ax.GrowthError, match="planned one after the other"):
        Several((ax.Duplicate("left"),)).plan(model, None)
    with pytest.raises(ax.GrowthError, match="is not an edit"):
        bad = {"$": "edit", "type": "torch.nn.modules.linear:Linear", "v": {}}
        typed.decode(bad, Allowed.of(model).resolve)


def test_one_edit_in_a_list_does_what_it_does_alone():
    model, optimizer, _ = build()
    twin = copy.deepcopy(model)
    ax.grow(model, [ax.Duplicate("left", by=1)], optimizer, probe=X)
    ax.grow(twin, ax.Duplicate("left", by=1), probe=X)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in twin.named_parameters()]
