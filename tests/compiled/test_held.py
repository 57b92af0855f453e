"""What people hold around a compiled network: averages, copies, state dicts, trials, a compiled optimizer step."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from compiling import Graphs, Net, as_written, batch, grow, step
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anew
import auxin as ax
from auxin import dynamo


@pytest.mark.parametrize("block_wise", [False, True], ids=["whole", "blocks"])
def test_the_average_of_a_compiled_network_grows_with_it(block_wise):
    model, graphs = Net(), Graphs()
    call = model if block_wise else torch.compile(model, backend=graphs)
    for block in model.blocks if block_wise else ():
        block.compile(backend=graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = AveragedModel(call, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    step(call, optimizer)
    average.update_parameters(call)
    olds = [p.clone() for p in average.module.parameters()]
    optimizer.zero_grad()
    grow(call, optimizer, average)
    names = list(average.module.state_dict())
    assert len(average.module.blocks) == 3 and names == list(call.state_dict())
    step(call, optimizer)
    average.update_parameters(call)
    plain = average.module if block_wise else average.module._orig_mod
    x = batch()
    assert torch.equal(average(x), as_written(plain, x))
    kept = dict(zip([n for n, _ in average.module.named_parameters() if "blocks.2" not in n], olds, strict=True))
    now, live = dict(average.module.named_parameters()), dict(call.named_parameters())
    for name, old in kept.items():
        assert torch.allclose(now[name], 0.9 * old + 0.1 * live[name], atol=1e-6)


def test_compiled_blocks_of_an_average_get_compiled_copies():
    model, graphs = Net(), Graphs()
    optimizer, average = torch.optim.SGD(model.parameters(), lr=0.1), AveragedModel(model)
    for block in average.module.blocks:
        block.compile(backend=graphs)
    grow(model, optimizer, average)
    assert dynamo.compiler_of(model.blocks[2]) is None
    assert dynamo.compiler_of(average.module.blocks[2]) is dynamo.compiler_of(average.module.blocks[1])


@pytest.mark.parametrize("make", [copy.deepcopy, lambda call: pickle.loads(pickle.dumps(call))], ids=["copy", "pickle"])
def test_a_grown_compiled_network_copies_and_pickles(make):
    model = Net()
    for block in model.blocks:
        block.compile(backend="eager")
    call = torch.compile(model, backend="eager")
    grow(call, torch.optim.SGD(model.parameters(), lr=0.1))
    twin, x = make(call), batch()
    assert torch.equal(twin(x), call(x)) and list(twin.state_dict()) == list(call.state_dict())


def test_the_state_dict_loads_into_a_hand_written_deeper_network():
    model = Net()
    call = torch.compile(model, backend="eager")
    grow(call, torch.optim.SGD(model.parameters(), lr=0.1))
    deeper = torch.compile(Net(depth=3), backend="eager")
    deeper.load_state_dict(call.state_dict())
    assert torch.equal(deeper(batch()), call(batch()))


def test_a_trial_and_an_undo_come_back_to_the_graph_from_before():
    model, graphs = Net(), Graphs()
    call = torch.compile(model, backend=graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edit = ax.Duplicate("blocks", by=1)
    grower = ax.Grower(call, optimizer, edits=edit, when=ax.when.every(1), probe=batch())
    step(call, optimizer)
    before = call(batch())
    torch._dynamo.config.recompile_limit = 2
    for _ in range(4):
        with grower.trial(edit):
            step(call, optimizer)
        grower.grow(edit)
        call(batch())
        grower.undo()
        assert torch.equal(call(batch()), before)
    assert len(graphs) == 2


def test_a_compiled_optimizer_step_costs_one_graph_per_growth_and_is_never_given_up():
    torch._dynamo.config.recompile_limit = 2
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model, graphs = Net(depth=1), Graphs()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        run = torch.compile(optimizer.step, backend=graphs) if compiled else optimizer.step
        edit = ax.Duplicate("blocks", by=1)
        grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.at([]), probe=batch(), rewarm=2)
        losses[compiled] = []
        for i in range(8):
            optimizer.zero_grad()
            loss = (model(batch()) - 1).square().mean()
            loss.backward()
            run()
            losses[compiled].append(loss.item())
            if i % 2 and i < 6:
                grower.grow(edit)
        assert grower.optimizer_steps == 8
        assert len(graphs) == (4 if compiled else 0)
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)


def test_a_wrapper_among_the_companions_is_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call = torch.compile(model, backend="eager")
    with pytest.raises(ax.GrowthError, match=r"needs no following.*auxin.grow\(compiled, edit, optimizer\)"):
        grow(model, optimizer, call)


SCRIPT = """
import sys
sys.path[:0] = [{here!r}]
import torch
torch.set_num_threads(1)
from compiling import Net, batch, step
import auxin as ax

torch.manual_seed(0)
model = Net()
for block in model.blocks if {block_wise} else ():
    block.compile(backend="eager")
call = model if {block_wise} else torch.compile(model, backend="eager")
optimizer = torch.optim.AdamW(call.parameters(), lr=1e-2)
grower = ax.Grower(call, optimizer, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(2), probe=batch())
if {resumed}:
    ax.load({path!r}, grower)
losses = []
for i in range(6 if not {resumed} else 3):
    losses.append(step(call, optimizer))
    grower.step()
    if i == 2 and not {resumed}:
        ax.save(grower, {path!r})
print(losses[-3:], len(model.blocks))
bare = torch.compile(Net(), backend="eager")
ax.load({path!r}, bare)
print(list(bare.state_dict())[0], len(bare.blocks))
"""


@pytest.mark.parametrize("block_wise", [pytest.param(False, marks=pytest.mark.long), True], ids=["whole", "blocks"])
def test_resumed_in_a_new_process(tmp_path, block_wise):
    def run(resumed):
        here, path = str(Path(__file__).parent), str(tmp_path / "run")
        code = SCRIPT.format(here=here, path=path, block_wise=block_wise, resumed=resumed)
        done = anew.run("-c", code)
        assert not done.returncode, done.stderr[-2000:]
        return done.stdout.splitlines()

    first, resumed = run(False), run(True)
    assert first == resumed and first[0].endswith("] 5") and first[1] == "_orig_mod.inp.weight 3"
