"""Hooks that come after compiling: compiled code does not look whether a module that it knows has new ones."""

from functools import partial

import pytest
import torch
from compiling import Block, Graphs, Net, as_written, batch, grow, step
from torch import nn

import auxin as ax

FADE = 6
BEHIND = ax.After("blocks.0.up", partial(nn.Linear, 32, 32), init="default", as_hook=True)


def outer(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def block_wise(model, backend):
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def function(model, backend):
    return torch.compile(lambda x: model(x), backend=backend)


EVERY_WAY = pytest.mark.parametrize("compiled", [outer, in_place, block_wise, function])


def same(call, model):
    return torch.equal(call(batch()), as_written(model, batch()))


def test_by_hand_a_late_hook_never_fires():
    """Trap 14."""
    model = Net()
    call = torch.compile(model, backend="eager")
    call(batch())
    model.blocks[0].up.register_forward_hook(lambda module, args, output: output + 1)
    assert not same(call, model)


@EVERY_WAY
def test_a_layer_behind_an_inner_module_runs_and_is_gone_after_undo(compiled):
    model = Net()
    call = compiled(model, "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = ax.Grower(model, optimizer, edits=BEHIND, when=ax.when.at([1]), probe=batch())
    before = call(batch())
    grower.step()
    assert all(same(call, model) for _ in range(3)) and not torch.equal(call(batch()), before)
    grower.undo()
    assert torch.equal(call(batch()), before)


@EVERY_WAY
def test_a_hook_that_comes_back_after_a_trial_fires_again(compiled):
    model = Net()
    call = compiled(model, "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = ax.Grower(model, optimizer, edits=BEHIND, when=ax.when.at([1]), probe=batch())
    grower.step()
    with_it = call(batch())
    with grower.trial(ax.Remove("blocks.0.up._grown.0")):
        assert same(call, model) and not torch.equal(call(batch()), with_it)
    assert torch.equal(call(batch()), with_it)


def test_a_hook_of_a_users_own_comes_back_after_a_trial():
    model = Net()
    handle = model.blocks[0].up.register_forward_hook(lambda module, args, output: output + 1)
    call = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = ax.Grower(model, optimizer, edits=BEHIND, when=ax.when.at([1]), probe=batch())
    before = call(batch())
    with grower.trial(None):
        handle.remove()
        assert same(call, model)
    assert torch.equal(call(batch()), before)


def test_a_snapshot_brings_a_removed_layer_back_into_compiled_code():
    model = Net()
    call = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ax.grow(model, BEHIND, optimizer, probe=batch())
    taken_out = ax.Remove("blocks.0.up._grown.0")
    grower = ax.Grower(model, optimizer, edits=taken_out, when=ax.when.at([1]), probe=batch(), keep=True)
    before = call(batch())
    grower.step()
    step(call, optimizer)
    optimizer.zero_grad()
    grower.undo()
    assert torch.equal(call(batch()), before)


def test_by_hand_all_blocks_of_one_code_run_what_was_compiled_last():
    """Where one of them has a hook, also if everything is compiled anew."""
    model = Net()
    model.blocks[0].up.register_forward_hook(lambda module, args, output: output + 1)
    block_wise(model, "eager")
    assert same(model, model) and not same(model, model)


def test_two_networks_of_one_class_of_which_one_grows_a_hook():
    grown, left = Net(), Net()
    calls = torch.compile(grown, backend="eager"), torch.compile(left, backend="eager")
    assert all(same(call, call._orig_mod) for call in calls)
    ax.grow(grown, BEHIND, probe=batch())
    for _ in range(3):
        assert all(same(call, call._orig_mod) for call in calls)


@EVERY_WAY
def test_with_another_torch_that_hides_its_graphs(compiled, monkeypatch):
    torch._dynamo.config.recompile_limit = 3
    model = Net()
    call = compiled(model, "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call(batch())
    monkeypatch.delattr(torch._dynamo.eval_frame, "_debug_get_cache_entry_list")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(4):
            change = grow(model, optimizer)
            assert same(call, model) and change.compiling is None
    ax.grow(model, BEHIND, optimizer, probe=batch())
    assert all(same(call, model) for _ in range(2))


def test_growing_without_hooks_leaves_that_setting_alone():
    model = Net()
    grow(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch._dynamo.config.skip_nnmodule_hook_guards


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_gate_inside_of_one_of_two_compiled_stages():
    """The graph of a stage of that depth without a gate is there already."""
    model = nn.Sequential(nn.Linear(8, 16), Stage(), Stage())
    layer = partial(nn.TransformerEncoderLayer, 16, 2, 16, dropout=0.0)
    model[1].layers.append(layer())
    for stage in model[1:]:
        stage.compile(backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step(model, optimizer)
    optimizer.zero_grad()
    ax.grow(model, ax.Insert("2.layers", layer, fade=FADE), optimizer, probe=batch())
    for _ in range(FADE + 1):
        assert same(model, model) and same(model, model)
        step(model, optimizer)


class Other(nn.Module):
    """Compiled beside the network that grows, and of no class that it has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.weight


def test_only_functions_that_run_through_such_a_module_are_compiled_again():
    model, mine, other, theirs = Net(), Graphs(), Other(), Graphs()
    call, beside = torch.compile(model, backend=mine), torch.compile(other, backend=theirs)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    run = torch.compile(optimizer.step, backend=theirs)
    sine = torch.compile(lambda x: x.sin(), backend=theirs)
    call(batch()).sum().backward()
    run(), beside(batch()), sine(batch())
    optimizer.zero_grad()
    before = len(theirs)
    ax.grow(model, BEHIND, probe=batch())
    call(batch()).sum().backward()
    beside(batch()), sine(batch())
    assert len(theirs) == before and len(mine) == 2


@pytest.mark.parametrize("compiled", [outer, in_place, block_wise])
def test_a_gate_is_no_constant_and_costs_two_graphs(compiled):
    """One with the gate and one without it; none while it opens."""
    model, graphs = Net(), Graphs()
    call = compiled(model, graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step(call, optimizer)
    optimizer.zero_grad()
    layer = partial(nn.TransformerEncoderLayer, 16, 2, 16, dropout=0.0)
    grow(model, optimizer, edit=ax.Insert("blocks", layer, fade=FADE))
    counts, gates = [len(graphs)], []
    for _ in range(FADE):
        assert same(call, model)
        gates += [float(buffer) for _, buffer in model.named_buffers()]
        step(call, optimizer)
        counts.append(len(graphs))
    assert same(call, model) and not list(model.named_buffers())
    assert gates == pytest.approx([k / FADE for k in range(FADE)])
    assert len(set(counts[1:])) == 1
    assert len(graphs) - counts[0] == (0 if compiled is block_wise else 2)


@EVERY_WAY
def test_a_gate_that_was_folded_in_a_trial_is_applied_again(compiled):
    model = Net()
    call = compiled(model, "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    edit = ax.Insert("blocks", partial(nn.TransformerEncoderLayer, 16, 2, 16, dropout=0.0), fade=FADE)
    grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.at([1]), probe=batch())
    grower.step()
    step(call, optimizer)
    before = call(batch())
    with grower.trial(None):
        for _ in range(FADE):
            step(call, optimizer)
        assert not list(model.named_buffers()) and same(call, model)
    assert list(model.named_buffers()) and torch.equal(call(batch()), before)


def test_a_layer_behind_a_compiled_block_keeps_its_graph():
    model, graphs = Net(), Graphs()
    block_wise(model, graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    optimizer.zero_grad()
    ax.grow(model, ax.After("blocks.0", partial(Block, 16)), optimizer, probe=batch())
    step(model, optimizer)
    assert same(model, model) and graphs.training == [True]
