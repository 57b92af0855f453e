"""Waking a layer: the same tensors under their own names, followed by all that keeps step."""

import copy
import json
import textwrap
from pathlib import Path

import pytest
import torch
from sleepers import PLACES, InSequential, Plain, awake_twin, bits, inputs, train, whole
from test_dormant import KINDS, OPTIMIZERS, build
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anew
import auxin as ax


def run(network=Plain, trainable_only=True, **words):
    torch.manual_seed(0)
    model = network(**words)
    held = [(n, p) for n, p in model.named_parameters() if p.requires_grad or not trainable_only]
    optimizer = torch.optim.AdamW(held, lr=1e-2, weight_decay=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return model, optimizer, average


@pytest.mark.parametrize("trainable_only", [True, False])
@pytest.mark.parametrize("network", PLACES)
def test_it_wakes_in_every_kind_of_place(network, trainable_only):
    model, optimizer, average = run(network, trainable_only)
    train(model, optimizer, 3, average)
    at, x = PLACES[network], inputs()
    layer, modules = model.get_submodule(at).layer, list(model.modules())
    tensors = {id(p): bits(p) for p in model.parameters()}
    state = {id(p): repr(s) for p, s in optimizer.state.items()}
    averaged = [bits(p) for p in average.module.parameters()]
    twin, twin_average = awake_twin(model, at), awake_twin(average.module, at)

    change = ax.grow(model, ax.Wake(at), optimizer, average, probe=x)

    assert model.get_submodule(at) is layer and [m for m in modules if not isinstance(m, ax.Dormant)] == list(
        model.modules()
    )
    assert {id(p): bits(p) for p in model.parameters()} == tensors
    assert torch.equal(model(x), twin(x)) and torch.equal(average(x), twin_average(x))
    assert list(model.state_dict()) == list(twin.state_dict()) and all(p.requires_grad for p in model.parameters())
    assert {id(p): repr(s) for p, s in optimizer.state.items()} == state
    group = optimizer.param_groups[0]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert group["param_names"] == [n for n, _ in model.named_parameters()]
    assert [bits(p) for p in average.module.parameters()] == averaged
    assert all(p.requires_grad for p in average.module.parameters())
    assert str(change).startswith(f"{at} wakes: Linear · function changed (max |d| = 0.")
    assert "420 parameters begin to train" in str(change) and change.added_parameters == 0
    assert {id(p) for p in change.parameters} == {id(p) for p in layer.parameters()}
    before = bits(layer.weight)
    train(model, optimizer, 2, average)
    assert bits(layer.weight) != before
    ax.verify(model, optimizer, average)


@pytest.mark.parametrize("trainable_only", [False, True])
@pytest.mark.parametrize(("kind", "mode"), OPTIMIZERS)
def test_every_optimizer_trains_it_from_then_on_as_if_it_were_new(kind, mode, trainable_only):
    """The twin: the awake network, the old state, and no state for the layer that wakes."""
    model, optimizer = build(kind, mode, trainable_only)
    train(model, optimizer, 5)
    twin = awake_twin(model, "extra")
    other = type(optimizer)(twin.parameters(), **KINDS[kind], **({} if mode == "plain" else {mode: True}))
    if kind != "LBFGS":  # whose history starts afresh
        for (_, old), new in zip(model.named_parameters(), twin.parameters(), strict=True):
            if old in optimizer.state:
                other.state[new] = copy.deepcopy(optimizer.state[old])
            elif (kind, mode) == ("SGD", "fused"):  # whose kernel cannot mix tensors with and without a buffer
                other.state[new] = {"momentum_buffer": torch.zeros_like(new)}
    ax.grow(model, ax.Wake("extra"), optimizer, probe=inputs())
    train(model, optimizer, 5)
    train(twin, other, 5)
    assert {n: bits(p) for n, p in model.named_parameters()} == {n: bits(p) for n, p in twin.named_parameters()}
    ax.verify(model, optimizer)


def test_its_tensors_join_the_groups_of_their_siblings():
    """Of two optimizers, and of the groups with and without weight decay, though neither was given the layer."""
    model = Plain()
    trained = [p for p in model.parameters() if p.requires_grad]
    muon = torch.optim.Muon([p for p in trained if p.dim() == 2], lr=1e-2)
    biases = [p for p in trained if p.dim() < 2]
    adam = torch.optim.AdamW(
        [{"params": biases[:1], "weight_decay": 0.0}, {"params": biases[1:], "weight_decay": 0.1, "lr": 1e-4}]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, [0.1, 0.2], total_steps=20)
    ax.grow(model, ax.Wake("extra"), muon, adam, schedule, probe=inputs())
    assert [id(p) for p in muon.param_groups[0]["params"]] == [
        id(m.weight) for m in (model.first, model.extra, model.head)
    ]
    assert [id(p) for p in adam.param_groups[0]["params"]] == [id(model.first.bias), id(model.extra.bias)]
    ax.verify(model, muon, adam, schedule)


def test_where_no_sibling_shows_the_group_that_is_asked_for():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.extra = nn.Linear(10, 8), ax.Dormant(nn.PReLU(8))
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.extra(self.first(x)))

    model = Odd()
    optimizer = torch.optim.SGD([{"params": model.first.parameters()}, {"params": model.head.parameters()}], lr=0.1)
    before = whole(model, optimizer)
    with pytest.raises(ax.GrowthError, match=r"extra\.weight \(8,\): .*Pass group=<index>"):
        ax.grow(model, ax.Wake("extra"), optimizer, probe=inputs())
    assert whole(model, optimizer) == before
    ax.grow(model, ax.Wake("extra"), optimizer, probe=inputs(), group=1)
    assert any(p is model.extra.weight for p in optimizer.param_groups[1]["params"])


def test_where_the_output_changes_its_shape_that_must_be_asked_for():
    class Grows(nn.Module):  # 10 -> 20, and 20 -> 40 once it is awake
        def __init__(self):
            super().__init__()
            self.first, self.extra = nn.Linear(10, 20), ax.Dormant(nn.Linear(20, 40))

        def forward(self, x):
            return self.extra(self.first(x))

    model = Grows()
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    before = whole(model, optimizer)
    with pytest.raises(ax.GrowthError, match=r"output would change from \(8, 20\) to \(8, 40\).*pass outputs=True"):
        ax.grow(model, ax.Wake("extra"), optimizer, probe=inputs())
    assert whole(model, optimizer) == before
    change = ax.grow(model, ax.Wake("extra", outputs=True), optimizer, probe=inputs())
    assert model(inputs()).shape == (8, 40) and "output shape changed" in str(change)


def test_a_layer_that_returns_its_input_leaves_the_function_as_it_is():
    model, optimizer, average = run()
    nn.init.eye_(model.extra.layer.weight), nn.init.zeros_(model.extra.layer.bias)
    change = ax.grow(model, ax.Wake("extra"), optimizer, average, probe=inputs())
    assert change.max_difference == 0 and "function unchanged (max |d| = 0)" in str(change)


def test_without_a_probe_it_wakes_too():
    model, optimizer, average = run()
    assert "not probed" in str(ax.grow(model, ax.Wake("extra"), optimizer, average))
    ax.verify(model, optimizer, average)


def test_what_was_frozen_before_stays_frozen():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
            layer[0].requires_grad_(False)
            self.extra, self.head = ax.Dormant(layer), nn.Linear(10, 2)

        def forward(self, x):
            return self.head(self.extra(x))

    model = Half()
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    change = ax.grow(model, ax.Wake("extra"), optimizer, probe=inputs())
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["extra.0.weight", "extra.0.bias"] and "110 parameters begin to train" in str(change)
    ax.verify(model, optimizer)

    model = Half()
    model.extra = ax.Dormant(model.extra.layer)  # by now all of it is frozen
    change = ax.grow(model, ax.Wake("extra"), probe=inputs())
    assert "all of it was frozen before, and stays so" in str(change)
    assert not any(p.requires_grad for p in model.extra.parameters())


def test_one_inside_another_wakes_after_it():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            inner = nn.Sequential(nn.Linear(10, 10), ax.Dormant(nn.Linear(10, 10)))
            self.extra, self.head = ax.Dormant(inner), nn.Linear(10, 2)

        def forward(self, x):
            return self.head(self.extra(x))

    model = Nested()
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(ax.GrowthError, match=r"inside 'extra', which sleeps itself\. Wake\('extra'\) comes first"):
        ax.grow(model, ax.Wake("extra.layer.1"), optimizer, probe=inputs())
    ax.grow(model, ax.Wake("extra"), optimizer, probe=inputs())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "extra.1.layer.weight",
        "extra.1.layer.bias",
    ]
    ax.verify(model, optimizer)
    ax.grow(model, ax.Wake("extra.1"), optimizer, probe=inputs())
    assert all(p.requires_grad for p in model.parameters())
    ax.verify(model, optimizer)


class Shared(nn.Module):
    """One sleeping layer under three names, two of them in one module."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(10, 10), ax.Dormant(nn.Linear(10, 10)))
        self.b = nn.ModuleDict({"x": self.a[1], "y": self.a[1]})

    def forward(self, x):
        return self.b["y"](self.b["x"](self.a(x)))


def test_a_layer_under_several_names_wakes_under_all_of_them():
    model, optimizer, average = run(Shared)
    layer, x = model.a[1].layer, inputs()
    change = ax.grow(model, ax.Wake("b.x"), optimizer, average, probe=x)
    assert model.a[1] is layer and model.b["x"] is layer and model.b["y"] is layer
    assert average.module.b["x"] is average.module.a[1] and "a.1 wakes" in str(change) and "b.y wakes" in str(change)
    assert "110 parameters begin to train" in str(change)
    ax.verify(model, optimizer, average)
    train(model, optimizer, 2, average)


def test_plain_lists_of_the_children_follow_and_others_are_named():
    class Listed(InSequential):
        def __init__(self):
            super().__init__()
            self.again = list(self.net)

        def forward(self, x):
            for layer in self.again:
                x = layer(x)
            return x

    model, optimizer, average = run(Listed)
    ax.grow(model, ax.Wake("net.2"), optimizer, average, probe=inputs())
    assert model.again[2] is model.net[2] and average.module.again[2] is average.module.net[2]

    model, optimizer, average = run(Listed)
    model.again.pop()
    model.by_name = {"extra": model.net[2]}
    before = whole(model, optimizer, average)
    with pytest.raises(ax.GrowthError, match="again, by_name refers to the Dormant layer as well"):
        ax.grow(model, ax.Wake("net.2"), optimizer, average, probe=inputs())
    assert whole(model, optimizer, average) == before


def test_a_grower_wakes_it_once_and_goes_on(tmp_path):
    def build(edits):
        model, optimizer, average = run(InSequential)
        return model, ax.Grower(model, optimizer, average, edits=edits, when=ax.when.every(1), probe=inputs())

    more = ax.Insert("net", nn.Tanh, index=-1, init="default")
    model, grower = build([ax.Wake("net.2"), more])
    assert grower.step().edit == ax.Wake("net.2") and not grower.done
    ax.save(grower, tmp_path)
    grower.undo()
    assert grower.step().edit == ax.Wake("net.2")
    model, again = build([ax.Wake("net.2"), more])
    ax.load(tmp_path, again)
    for one in (grower, again):
        assert type(one.step().edit) is ax.Insert

    model, grower = build(ax.Wake("net.2"))
    assert not grower.done and grower.step() is not None and grower.done and grower.step() is None
    model, grower = build(ax.Wake("net.0"))  # a mistake, which is not passed over
    with pytest.raises(ax.GrowthError, match="'net.0' is a Linear, not a Dormant layer"):
        grower.step()


def test_undo_and_trial_put_it_back_to_sleep():
    model, optimizer, average = run()
    grower = ax.Grower(
        model, optimizer, average, edits=ax.Wake("extra"), when=ax.when.every(1), probe=inputs(), keep=True
    )
    train(model, optimizer, 3, average)
    before = whole(model, optimizer, average)
    with grower.trial(ax.Wake("extra")):
        assert model.extra.weight.requires_grad
        train(model, optimizer, 2, average)
    assert whole(model, optimizer, average) == before
    for steps in (0, 3):
        assert grower.step() is not None
        train(model, optimizer, steps, average)
        grower.undo()
        assert whole(model, optimizer, average) == before and isinstance(model.extra, ax.Dormant)
    ax.grow(model, ax.Wake("extra"), optimizer, average, probe=inputs(), dry_run=True)
    assert whole(model, optimizer, average) == before


def test_the_journal_replays_it_on_any_device():
    model, optimizer, average = run()
    grower = ax.Grower(model, optimizer, average, edits=ax.Wake("extra"), when=ax.when.every(1), probe=inputs())
    grower.step()
    data = json.loads(json.dumps(grower.journal.to_json()))
    assert data[0]["edit"] == {"type": "auxin.edits.wake:Wake", "at": "extra", "fade": 0, "outputs": False}
    with torch.device("meta"):
        empty = Plain()
    for fresh in (Plain(), empty):
        ax.replay(fresh, data)
        layout = [(n, p.shape, p.requires_grad) for n, p in fresh.named_parameters()]
        assert layout == [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()]


@pytest.mark.parametrize("trainable_only", [True, False])
def test_a_run_is_resumed_in_a_new_process_to_the_bit(tmp_path, trainable_only):
    model, optimizer, average = run(Plain, trainable_only)
    grower = ax.Grower(model, optimizer, average, edits=ax.Wake("extra"), when=ax.when.every(1), probe=inputs())
    train(model, optimizer, 3, average)
    grower.step()
    train(model, optimizer, 3, average)
    ax.save(grower, tmp_path / "run")
    train(model, optimizer, 3, average)
    script = f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        torch.set_num_threads(1)
        import auxin as ax
        from sleepers import Plain, inputs, train, bits
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        model = Plain()
        held = [(n, p) for n, p in model.named_parameters() if p.requires_grad or not {trainable_only}]
        optimizer = torch.optim.AdamW(held, lr=1e-2, weight_decay=0.1)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        grower = ax.Grower(model, optimizer, average, edits=ax.Wake("extra"), when=ax.when.every(1), probe=inputs())
        ax.load({str(tmp_path / "run")!r}, grower)
        train(model, optimizer, 3, average)
        print("".join(bits(p).hex() for p in (*model.parameters(), *average.module.parameters())))
    """
    done = anew.run("-c", textwrap.dedent(script))
    expected = "".join(bits(p).hex() for p in (*model.parameters(), *average.module.parameters()))
    assert done.stdout.strip() == expected, done.stderr
    bare = Plain()
    ax.load(tmp_path / "run", bare)
    assert not isinstance(bare.extra, ax.Dormant)


def test_a_run_is_saved_and_resumed_while_it_sleeps(tmp_path):
    def grower_of(model, optimizer, average):
        return ax.Grower(model, optimizer, average, edits=ax.Wake("extra"), when=ax.when.at([9]), probe=inputs())

    model, optimizer, average = run()
    train(model, optimizer, 3, average)
    ax.save(grower_of(model, optimizer, average), tmp_path)
    other = run()
    again = grower_of(*other)
    ax.load(tmp_path, again)
    assert bits(other[0].extra.layer.weight) == bits(model.extra.layer.weight)
    again.grow(ax.Wake("extra"))
    assert all(p.requires_grad for p in other[0].parameters())


def test_a_surgery_puts_a_layer_to_sleep_and_wake_is_its_inverse():
    model, optimizer, average = run()
    grower = ax.Grower(model, optimizer, average, edits=ax.Wake("extra"), when=ax.when.every(1), probe=inputs())
    grower.step()
    train(model, optimizer, 3, average)
    function, layer, state = model(inputs()), model.extra, repr(optimizer.state[model.extra.weight])
    with grower.surgery():
        model.extra = ax.Dormant(model.extra)
    before = bits(layer.weight)
    train(model, optimizer, 3, average)
    assert bits(layer.weight) == before and average.module.extra.trainable == ("weight", "bias")
    assert not average.module.extra.layer.weight.requires_grad
    model.load_state_dict({**model.state_dict()})
    grower.grow(ax.Wake("extra"))
    assert model.extra is layer and repr(optimizer.state[layer.weight]) == state
    grower.verify()
    fresh = ax.replay(Plain(), json.loads(json.dumps(grower.journal.to_json())))
    assert list(fresh.state_dict()) == list(model.state_dict()) and function.shape == model(inputs()).shape


def test_an_interrupted_surgery_leaves_the_layer_awake():
    model, optimizer, average = run()
    ax.grow(model, ax.Wake("extra"), optimizer, average)
    train(model, optimizer, 2, average)
    before = whole(model, optimizer, average)
    with pytest.raises(ZeroDivisionError), ax.surgery(model, optimizer, average):
        model.extra = ax.Dormant(model.extra)
        raise ZeroDivisionError
    assert whole(model, optimizer, average) == before


def test_a_compiled_network_runs_the_woken_layer():
    model, optimizer, average = run()
    compiled = torch.compile(model, backend="eager")
    x = inputs()
    compiled(x)
    ax.grow(compiled, ax.Wake("extra"), optimizer, average, probe=x)
    assert torch.equal(compiled(x), awake_twin_output(model, x))


def awake_twin_output(model, x):
    return model.head(
        torch.tanh(nn.functional.linear(torch.tanh(model.first(x)), model.extra.weight, model.extra.bias))
    )


def test_a_layer_that_no_gradient_reaches_is_refused():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.extra, self.head = nn.Linear(10, 10), ax.Dormant(nn.Linear(10, 10)), nn.Linear(10, 2)

        def forward(self, x):
            x = self.first(x)
            return self.head(x + self.extra(x).detach())

    model = Cut()
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    before = whole(model, optimizer)
    with pytest.raises(ax.GrowthError, match=r"extra\.weight, extra\.bias: no gradient reaches"):
        ax.grow(model, ax.Wake("extra"), optimizer, probe=inputs())
    assert whole(model, optimizer) == before


def test_a_layer_that_never_runs_is_refused():
    model, optimizer, average = run()
    model.unused = ax.Dormant(nn.Linear(3, 3))
    average = AveragedModel(model)
    with pytest.raises(ax.GrowthError, match="unused: the network's forward never calls it"):
        ax.grow(model, ax.Wake("unused"), optimizer, average, probe=inputs())


def test_beside_layers_that_step_in_the_backward_pass_it_is_refused():
    model = Plain()
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ax.GrowthError, match=r"extra\.weight: \w+\.weight has a hook"):
        ax.grow(model, ax.Wake("extra"), probe=inputs())
    assert not model.extra.layer.weight.requires_grad


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            ax.Wake("head"),
            r"Wake\(at='head'\): 'head' is a Linear, not a Dormant layer\. Asleep in this model: 'extra'",
        ),
        (ax.Wake("extra.layer"), r"that is inside 'extra', which sleeps itself\. Wake\('extra'\) comes first"),
        (ax.Wake("nope"), "the model .* has no child 'nope'; its children: 'first', 'extra', 'head'"),
        (ax.Wake(""), "the model itself; name a Dormant layer inside it"),
    ],
)
def test_refusals(edit, words):
    model, optimizer, average = run()
    train(model, optimizer, 2, average)
    before = whole(model, optimizer, average)
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(model, edit, optimizer, average, probe=inputs())
    assert whole(model, optimizer, average) == before


def test_what_is_awake_or_was_never_built_in_is_named():
    model, optimizer, average = run()
    ax.grow(model, ax.Wake("extra"), optimizer, average, probe=inputs())
    with pytest.raises(ax.GrowthError, match=r"No layer of this model sleeps: build one in as auxin\.Dormant\(layer\)"):
        ax.grow(model, ax.Wake("extra"), optimizer, average, probe=inputs())
    with pytest.raises(
        ax.GrowthError, match="'net' is a Sequential, not a Dormant layer. Asleep in this model: 'net.2'"
    ):
        ax.grow(InSequential(), ax.Wake("net"), probe=inputs())
    with pytest.raises(ax.GrowthError, match="the model itself"):
        ax.grow(ax.Dormant(nn.Linear(2, 2)), ax.Wake(""))


def test_hooks_on_the_sleeping_place_are_not_lost_without_a_word():
    model, optimizer, average = run()
    handle = model.extra.register_forward_hook(lambda *_: None)
    with pytest.raises(ax.GrowthError, match=r"hooks are registered on the Dormant itself.*model\.extra\.layer"):
        ax.grow(model, ax.Wake("extra"), optimizer, average, probe=inputs())
    handle.remove()
    fired = []
    model.extra.layer.register_forward_hook(lambda *_: fired.append(1))
    ax.grow(model, ax.Wake("extra"), optimizer, average)
    model(inputs())
    assert fired == [1]


@pytest.mark.parametrize("fade", [-1, 1.5])
def test_a_fade_that_means_nothing_is_refused_where_it_is_written(fade):
    with pytest.raises(ax.GrowthError, match=f"fade={fade}; pass a whole number"):
        ax.Wake("extra", fade=fade)
