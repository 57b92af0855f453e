"""``block.compile()``, and each block as ``torch.compile(block)``: a block of known code costs no new graph."""

from functools import partial

import pytest
import torch
from compiling import Block, Graphs, Net, as_written, batch, grow, step
from torch import nn

import auxin as ax
from auxin import dynamo

GROWTHS = 12


def in_place(model, backend, **options):
    for block in model.blocks:
        block.compile(backend=backend, **options)


def wrapped(model, backend, **options):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend=backend, **options)


def trained(compile_blocks, rounds, fullgraph=False):
    """Losses of a run that grows, and the graphs after each growth; None for ``compile_blocks``: as written."""
    torch.manual_seed(1)
    model, graphs = Net(), Graphs("aot_eager")
    if compile_blocks is not None:
        compile_blocks(model, graphs, fullgraph=fullgraph)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, counts = [step(model, optimizer) for _ in range(2)], [len(graphs)]
    for _ in range(rounds):
        optimizer.zero_grad()
        grow(model, optimizer)
        losses += [step(model, optimizer) for _ in range(2)]
        counts.append(len(graphs))
    return losses, counts, model, graphs


@pytest.mark.parametrize("compile_blocks, rounds", [(in_place, GROWTHS), (wrapped, 4)])
def test_twelve_growths_cost_no_graph_and_are_those_of_a_run_that_is_not_compiled(compile_blocks, rounds, warned):
    expected, _, twin, _ = trained(None, rounds)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        losses, counts, model, graphs = trained(compile_blocks, rounds, fullgraph=True)
    assert counts == [1] * (rounds + 1) and graphs.training == [True]
    assert not any("limit" in line for line in warned)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(dynamo.compiler_of(block) is not None for block in model.blocks)


@pytest.mark.parametrize("compile_blocks", [in_place, wrapped])
def test_a_copy_is_compiled_by_the_compiler_of_its_source(compile_blocks):
    model = Net()
    compile_blocks(model, Graphs())
    grow(model, torch.optim.SGD(model.parameters(), lr=0.1))
    compilers = [dynamo.compiler_of(block) for block in model.blocks]
    assert compilers[1] is not compilers[0]
    assert compilers[2] is compilers[1]


def test_only_what_was_compiled_is_compiled_in_the_copy():
    model, graphs = Net(), Graphs()
    model.blocks[1].up.compile(backend=graphs)
    grow(model, torch.optim.SGD(model.parameters(), lr=0.1))
    new = model.blocks[2]
    assert dynamo.compiler_of(new) is None and dynamo.compiler_of(new.down) is None
    assert dynamo.compiler_of(new.up) is dynamo.compiler_of(model.blocks[1].up)


def test_a_fresh_block_of_the_same_class_is_compiled_as_those_beside_it():
    model, graphs = Net(), Graphs()
    in_place(model, graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    optimizer.zero_grad()
    grow(model, optimizer, edit=ax.Insert("blocks", partial(Block, 16), index=1))
    step(model, optimizer)
    assert dynamo.compiler_of(model.blocks[1]) is not None and graphs.training == [True]


def test_a_layer_of_another_class_among_compiled_blocks_runs_as_written():
    model, graphs = Net(), Graphs()
    in_place(model, graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    optimizer.zero_grad()
    grow(model, optimizer, edit=ax.Insert("blocks", partial(nn.Linear, 16, 16), init="default"))
    assert torch.equal(model(batch()), as_written(model, batch())) and graphs.training == [True]


def test_what_replaces_a_compiled_block_and_what_wakes_in_one_is_compiled():
    model, graphs = Net(), Graphs()
    model.blocks.append(ax.Dormant(Block()))
    in_place(model, graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ax.grow(model, ax.Replace("blocks.0", partial(Block, 16, 48)), optimizer, probe=batch())
    ax.grow(model, ax.Wake("blocks.2"), optimizer, probe=batch())
    assert all(dynamo.compiler_of(block) is not None for block in model.blocks)
    assert torch.equal(model(batch()), as_written(model, batch()))


def test_a_refused_growth_leaves_a_sleeping_layer_as_it_was():
    model = Net()
    model.blocks.append(ax.Dormant(Block()))
    in_place(model, Graphs())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ax.grow(model, ax.Wake("blocks.2"), optimizer, probe=batch(), dry_run=True)
    assert dynamo.compiler_of(model.blocks[2]) is not None
    assert dynamo.compiler_of(model.blocks[2].layer) is None


@pytest.mark.parametrize("options", [{}, {"recompile_limit": 3}], ids=["limit of torch", "limit of its own"])
def test_blocks_of_twelve_widths_stay_compiled(options, warned):
    """The graphs belong to the code, which all widths share: torch gives up after eight of them."""
    model, graphs = Net(depth=1), Graphs()
    in_place(model, graphs, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    growths = options.get("recompile_limit", 12)
    for i in range(growths):
        optimizer.zero_grad()
        grow(model, optimizer, edit=ax.Insert("blocks", partial(Block, 16, 33 + i)))
        step(model, optimizer)
    assert len(graphs) == growths + 1 and not any("limit" in line for line in warned)
    x = batch()
    assert torch.equal(model(x), as_written(model, x)) and len(graphs) == growths + 1


def test_surgery_compiles_new_blocks_of_a_compiled_kind():
    model, graphs = Net(), Graphs()
    in_place(model, graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    optimizer.zero_grad()
    with ax.surgery(model, optimizer, probe=batch()):
        model.blocks.append(Block())
    step(model, optimizer)
    assert dynamo.compiler_of(model.blocks[2]) is not None and graphs.training == [True]


def test_the_change_says_nothing_of_compiling_where_nothing_is_compiled_again():
    model, graphs = Net(), Graphs()
    in_place(model, graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    optimizer.zero_grad()
    change = grow(model, optimizer)
    assert change.compiling is None and "compile" not in str(change)
