"""Pruning: the block whose removal changes the outputs least."""

import warnings

import pytest
import torch
from torch import nn

import auxin as ax


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        with torch.no_grad():
            self.inner.weight.copy_(size * torch.eye(8)), self.inner.bias.zero_()

    def forward(self, x):
        return x + self.inner(x)


class Net(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for size in sizes)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def removals(model):
    return [ax.Remove(f"blocks.{i}") for i in range(len(model.blocks))]


def build(sizes, edits=removals, **words):
    torch.manual_seed(0)
    model = Net(sizes)
    optimizer = torch.optim.Adam(model.parameters())
    options = {"when": ax.when.every(1), "choose": ax.choose.least_change(), "probe": torch.randn(4, 8), **words}
    return model, optimizer, ax.Grower(model, optimizer, edits=edits, **options)


def everything(model, optimizer):
    tensors = [(n, id(p), p.detach().clone().numpy().tobytes()) for n, p in model.named_parameters()]
    return tensors, [id(p) for p in optimizer.param_groups[0]["params"]], torch.random.get_rng_state().tolist()


def test_it_takes_the_block_that_changes_the_outputs_least():
    model, optimizer, grower = build([0.9, 0.01, 0.5, 0.1])
    blocks, before = list(model.blocks), everything(model, optimizer)
    assert grower.choose(grower.edits(), grower) == ax.Remove("blocks.1")
    assert everything(model, optimizer) == before
    sizes = [size for _, size in grower.choose.results]
    assert sorted(sizes) == [sizes[1], sizes[3], sizes[2], sizes[0]]
    assert [grower.step().edit.at for _ in range(3)] == ["blocks.1", "blocks.2", "blocks.1"]
    assert list(model.blocks) == [blocks[0]]
    grower.verify()


def test_the_measure_is_what_the_change_prints():
    model, _, grower = build([0.9, 0.01, 0.5])
    change = grower.step()
    assert change.max_difference == min(size for _, size in grower.choose.results) > 0


def test_of_equals_the_last_goes():
    model, _, grower = build([0.3, 0.0, 0.0])
    change = grower.step()
    assert change.edit == ax.Remove("blocks.2") and change.max_difference == 0


def test_gradients_that_a_step_has_used_do_not_stand_in_the_way():
    model, optimizer, grower = build([0.9, 0.01])
    model(torch.randn(4, 8)).sum().backward()
    assert grower.step() is None and "no optimizer step has used" in grower.waiting_for
    optimizer.step()
    assert grower.step().edit == ax.Remove("blocks.1")


def test_what_is_refused_is_passed_over_and_named_where_there_is_nothing_else():
    def edits(model):
        return [ax.Remove("blocks.0.inner"), *removals(model)[1:]]

    model, _, grower = build([0.9, 0.01, 0.5], edits=edits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [grower.step().edit.at for _ in range(2)] == ["blocks.1", "blocks.1"]
    with pytest.warns(UserWarning, match=r"least_change\(\) chose nothing.*\n.*Remove\(at='blocks\.0\.inner'"):
        assert grower.step() is None
    assert len(model.blocks) == 1


def test_of_a_block_that_runs_twice_one_pass_is_taken_out():
    model, _, _ = build([0.9, 0.01, 0.5])
    model.blocks[1] = model.blocks[0]
    optimizer = torch.optim.Adam(model.parameters())
    words = {"when": ax.when.every(1), "choose": ax.choose.least_change(), "probe": torch.randn(4, 8)}
    grower = ax.Grower(model, optimizer, edits=lambda model: [ax.Remove("blocks.1")], **words)
    kept = model.blocks[0]
    assert grower.step().edit == ax.Remove("blocks.1") and model.blocks[0] is kept and len(model.blocks) == 2


def test_without_a_probe_it_says_so():
    model, _, grower = build([0.9, 0.01], probe=None)
    with pytest.raises(ax.GrowthError, match=r"least_change\(\) compares outputs on a batch.*probe=batch"):
        grower.step()


def test_nothing_to_choose_from_is_none():
    model, _, grower = build([0.9], edits=lambda model: [])
    assert grower.choose([], grower) is None and grower.choose.results == []
    assert repr(ax.choose.least_change()) == "least_change()"


def test_what_changes_the_output_shape_is_not_compared():
    class Head(Net):
        def __init__(self):
            super().__init__([0.5])
            self.blocks.append(nn.Linear(8, 3))
            self.head = nn.Identity()

    model = Head()
    edits = [ax.Remove("blocks.1", outputs=True), ax.Remove("blocks.0")]
    grower = ax.Grower(
        model, edits=edits, when=ax.when.every(1), choose=ax.choose.least_change(), probe=torch.randn(4, 8)
    )
    assert grower.choose(edits, grower) == edits[1]
    assert grower.choose.results[0][1] == "the shape of the output would change"
