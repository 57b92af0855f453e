"""``torch.compile(model)`` and ``model.compile()``: compiled again after each growth, and never given up."""

from functools import partial

import pytest
import torch
from compiling import Graphs, Net, as_written, batch, grow, step

import auxin as ax

GROWTHS = 12


def outer(model, backend, **options):
    return torch.compile(model, backend=backend, **options)


def in_place(model, backend, **options):
    model.compile(backend=backend, **options)
    return model


def function(model, backend, **options):
    return torch.compile(lambda x: model(x), backend=backend, **options)


@pytest.mark.parametrize(
    "compiled, growths, limit",
    [(outer, GROWTHS, 8), (in_place, 5, 3), (function, 5, 3)],
    ids=["outer", "in place", "f"],
)
def test_still_compiled_after_twelve_growths(compiled, growths, limit, warned):
    torch._dynamo.config.recompile_limit = limit
    torch.manual_seed(1)
    model, graphs = Net(), Graphs()
    call = compiled(model, graphs)
    given = call if isinstance(call, torch.nn.Module) else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, counts = [step(call, optimizer)], [len(graphs)]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(growths):
            optimizer.zero_grad()
            change = grow(given, optimizer)
            losses += [step(call, optimizer) for _ in range(2)]
            counts.append(len(graphs))
    assert counts == list(range(1, growths + 2)) and all(graphs.training)
    assert not any("limit" in line for line in warned)
    assert losses == not_compiled(growths)
    assert change.compiling.seconds > 0 and "compiled again in" in str(change)


def not_compiled(growths):
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [step(model, optimizer)]
    for _ in range(growths):
        optimizer.zero_grad()
        grow(model, optimizer)
        losses += [step(model, optimizer) for _ in range(2)]
    return losses


def test_without_us_torch_gives_up_after_eight(warned):
    """What is avoided above: trap 13."""
    model, graphs = Net(), Graphs()
    call = torch.compile(model, backend=graphs)
    for _ in range(GROWTHS):
        call(batch())
        model.blocks.append(torch.nn.Linear(16, 16))
    call(batch())
    assert len(graphs) == 8 and any("recompile_limit" in line for line in warned)


def test_a_graph_for_training_and_one_for_validation_after_each_growth(warned):
    torch._dynamo.config.recompile_limit = 4
    model, graphs = Net(), Graphs()
    call = torch.compile(model, backend=graphs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        step(call, optimizer)
        with torch.no_grad():
            call.eval()(batch())
        call.train()
        optimizer.zero_grad()
        grow(model, optimizer)
    assert graphs.training == [True, False] * 3 and not warned


def test_a_limit_of_its_own_is_raised_too():
    model, graphs = Net(), Graphs()
    model.compile(backend=graphs, recompile_limit=2, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        grow(model, optimizer)
        step(model, optimizer)
    assert len(graphs) == 5


def test_the_limits_rise_only_by_what_is_used():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    call, config = torch.compile(model, backend="eager"), torch._dynamo.config
    for _ in range(3):
        step(call, optimizer)
        optimizer.zero_grad()
        grow(model, optimizer)
    assert (config.recompile_limit, config.accumulated_recompile_limit) == (3 + 8, 256)


def test_the_probe_is_run_as_written_and_costs_no_graph():
    model, graphs = Net(), Graphs()
    model.compile(backend=graphs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        model.eval()(batch())  # so there is a graph that the probe could run, in which no hook fires
    model.train()
    step(model, optimizer)
    optimizer.zero_grad()
    grower = ax.Grower(model, optimizer, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(1), probe=batch())
    assert {site.calls for site in ax.sites(model, batch()) if site.at == "blocks.0"} == {1}
    change = grower.step()
    assert change.gradient_ratio > 0 and graphs.training == [False, True]


def test_seconds_of_compiling_stop_at_the_next_growth():
    model = Net()
    call = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    changes = []
    for _ in range(3):
        step(call, optimizer)
        optimizer.zero_grad()
        changes.append(grow(model, optimizer))
    first, second, last = (change.compiling.seconds for change in changes)
    assert first > 0 and second > 0 and last == 0
    assert "compiles at its next call what is new to it" in str(changes[-1])
    step(call, optimizer)
    assert [changes[0].compiling.seconds, changes[1].compiling.seconds] == [first, second]
    assert changes[2].compiling.seconds > 0


def test_what_is_taken_back_does_not_end_the_count_of_the_growth_before():
    model = Net()
    call = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = ax.Grower(model, optimizer, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(1), probe=batch())
    step(call, optimizer)
    change = grower.step()
    optimizer.zero_grad()
    grow(model, optimizer, dry_run=True)
    assert change.compiling.seconds == 0
    step(call, optimizer)
    counted = change.compiling.seconds
    assert counted > 0
    grower.step()
    grower.undo()
    with torch.no_grad():
        call(batch())
    assert change.compiling.seconds > counted


def test_the_wrapper_stays_the_same_and_runs_what_has_grown():
    model = Net()
    call = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(call.parameters(), lr=1e-2)
    grower = ax.Grower(call, optimizer, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(1), probe=batch())
    step(call, optimizer)
    grower.step()
    assert grower.model is model is call._orig_mod and len(call.blocks) == 3
    assert torch.equal(call(batch()), as_written(model, batch()))
    assert list(call.state_dict()) == [f"_orig_mod.{name}" for name in model.state_dict()]


def test_code_around_a_graph_break_is_seen_to():
    class Broken(Net):
        def forward(self, x):
            x = self.inp(x)
            torch._dynamo.graph_break()
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    torch._dynamo.config.recompile_limit = 3
    model, graphs = Broken(), Graphs()
    call = torch.compile(model, backend=graphs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(call, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        grow(model, optimizer)
        step(call, optimizer)
    assert len(graphs) == 2 + 4  # what stands in front of the break is not compiled again
    assert torch.equal(call(batch()), as_written(model, batch()))


@pytest.mark.parametrize("name", ["skip_guard_on_all_nn_modules_unsafe", "skip_guard_on_inbuilt_nn_modules_unsafe"])
@pytest.mark.parametrize("network", [Net, partial(torch.nn.Sequential, torch.nn.Linear(8, 8))])
def test_code_that_was_told_not_to_look_at_modules_sees_the_growth(name, network):
    model = network()
    call = torch.compile(model, backend="eager", options={"guard_filter_fn": getattr(torch.compiler, name)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call(batch())
    layer = ax.Insert("", torch.nn.GELU, init="default")
    edit = ax.Duplicate("blocks", by=1, output="keep") if isinstance(model, Net) else layer
    ax.grow(model, edit, optimizer, probe=batch())
    assert torch.equal(call(batch()), as_written(model, batch()))


def test_where_compiled_code_is_told_to_look_at_nothing_growing_waits():
    model = Net()
    call = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = ax.Grower(call, optimizer, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(1), probe=batch())
    call(batch())
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        assert grower.step() is None and "skip_guard_eval_unsafe" in grower.waiting_for
        with pytest.raises(ax.GrowthError, match="keeps compiled code from seeing a growth"):
            grow(model, optimizer)
    assert grower.step() is not None
    assert torch.equal(call(batch()), as_written(model, batch()))
