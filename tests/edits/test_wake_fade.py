"""A layer that wakes over several optimizer steps: nothing changes at first, and it is the plain layer at the end."""

import pytest
import torch
from sleepers import PLACES, Plain, bits, inputs, train, whole
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax
from auxin.gate import gated
from auxin.ramp import ramps_on

FADE = 4


def run(network=Plain, trainable_only=True):
    torch.manual_seed(0)
    model = network()
    held = [p for p in model.parameters() if p.requires_grad or not trainable_only]
    optimizer = torch.optim.AdamW(held, lr=1e-2, weight_decay=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, optimizer, 3, average)
    return model, optimizer, average


def shares(model):
    return [round(float(block.auxin_gate), 4) for _, block in gated(model)]


@pytest.mark.parametrize("trainable_only", [True, False])
@pytest.mark.parametrize("network", PLACES)
def test_nothing_changes_at_first_and_nothing_is_left_at_the_end(network, trainable_only):
    model, optimizer, average = run(network, trainable_only)
    at, x = PLACES[network], inputs(9)
    before, averaged, start = model(x), average(x), bits(model.get_submodule(at).layer.weight)
    change = ax.grow(model, ax.Wake(at, fade=FADE), optimizer, average, probe=x)
    assert change.max_difference == 0 and change.preserves and f"fades in over {FADE} optimizer steps" in str(change)
    assert torch.equal(model(x), before) and torch.equal(average(x), averaged)
    seen = []
    for _ in range(FADE):
        seen.append(shares(model))
        assert shares(average.module) == seen[-1]
        train(model, optimizer, 1, average)
    assert seen == [[0.0], [0.25], [0.5], [0.75]] and not shares(model) and not shares(average.module)
    assert ramps_on(optimizer) is None and not model.get_submodule(at)._forward_hooks
    assert bits(model.get_submodule(at).weight) != start
    ax.verify(model, optimizer, average)
    train(model, optimizer, 2, average)


def test_taken_back_it_sleeps_without_a_gate():
    model, optimizer, average = run()
    grower = ax.Grower(
        model, optimizer, average, edits=lambda model: [], when=ax.when.every(9), probe=inputs(), keep=True
    )
    before = whole(model, optimizer, average)
    with grower.trial(ax.Wake("extra", fade=FADE)):
        train(model, optimizer, 2, average)
        assert shares(model) == [0.5]
    for steps in (0, 2, FADE + 1):
        grower.grow(ax.Wake("extra", fade=FADE))
        train(model, optimizer, steps, average)
        grower.undo()
        assert whole(model, optimizer, average) == before and ramps_on(optimizer) is None
        for network in (model, average.module):
            assert not list(gated(network)) and not network.extra.layer._forward_hooks
    ax.grow(model, ax.Wake("extra", fade=FADE), optimizer, average, probe=inputs(), dry_run=True)
    assert whole(model, optimizer, average) == before and not list(gated(average.module))


def test_a_companion_that_fails_leaves_no_gate_anywhere():
    class Stubborn:
        pass

    @ax.follow(Stubborn)
    def refuse(companion, change):
        yield
        raise ZeroDivisionError

    model, optimizer, average = run()
    before = whole(model, optimizer, average)
    with pytest.raises(ZeroDivisionError):
        ax.grow(model, ax.Wake("extra", fade=FADE), optimizer, average, Stubborn(), probe=inputs())
    assert whole(model, optimizer, average) == before
    assert not list(gated(model)) and not list(gated(average.module)) and ramps_on(optimizer) is None


@pytest.mark.parametrize("steps", [0, 2, FADE])
def test_a_run_is_resumed_in_mid_fade_to_the_bit(tmp_path, steps):
    def grower_of(parts):
        return ax.Grower(*parts, edits=ax.Wake("extra", fade=FADE), when=ax.when.every(1), probe=inputs())

    parts = run()
    grower = grower_of(parts)
    grower.step()
    train(parts[0], parts[1], steps, parts[2])
    ax.save(grower, tmp_path)
    train(parts[0], parts[1], 5, parts[2])
    other = run()
    again = grower_of(other)
    ax.load(tmp_path, again)
    assert len(shares(other[0])) == (steps < FADE)
    train(other[0], other[1], 5, other[2])
    for a, b in ((parts[0], other[0]), (parts[2].module, other[2].module)):
        assert {k: bits(v) for k, v in a.state_dict().items()} == {k: bits(v) for k, v in b.state_dict().items()}
    replayed = ax.replay(Plain(), grower.journal)
    assert not list(gated(replayed)) and list(replayed.state_dict()) == list(parts[0].state_dict())


class Wider(Plain):
    def __init__(self):
        super().__init__(out=40)

    def forward(self, x):
        return self.extra(self.first(x))


@pytest.mark.parametrize(
    ("network", "words", "probe"),
    [
        (Wider, r"turns \(8, 20\) -> \(8, 40\), and a fade-in mixes.*fade=0 \(and outputs=True", True),
        (Plain, r"Wake\(at='extra', fade=4\): a fade-in needs one batch.*pass probe=batch, or fade=0", False),
    ],
)
def test_refusals(network, words, probe):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    before = whole(model, optimizer)
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(model, ax.Wake("extra", fade=FADE), optimizer, probe=inputs() if probe else None)
    assert whole(model, optimizer) == before


def test_without_an_optimizer_nothing_would_open_the_gate():
    model = Plain()
    with pytest.raises(ax.GrowthError, match="no optimizer was given"):
        ax.grow(model, ax.Wake("extra", fade=FADE), probe=inputs())
    assert isinstance(model.extra, ax.Dormant) and not list(gated(model))


def test_under_several_names_it_has_one_gate():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(10, 10), ax.Dormant(nn.Linear(10, 10)))
            self.b = nn.ModuleList([self.a[1]])

        def forward(self, x):
            return self.b[0](self.a(x))

    model, optimizer, average = run(Shared)
    x = inputs(9)
    before = model(x)
    ax.grow(model, ax.Wake("b.0", fade=FADE), optimizer, average, probe=x)
    assert torch.equal(model(x), before) and len(model.a[1]._forward_hooks) == 1
    train(model, optimizer, FADE, average)
    assert not list(gated(model)) and not list(gated(average.module))


def test_what_cannot_fade_in_says_why():
    model = nn.Sequential(nn.Linear(4, 4), ax.Dormant(nn.ReLU()), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ax.GrowthError, match="a ReLU cannot fade in: it has no weights that would train"):
        ax.grow(model, ax.Wake("1", fade=3), optimizer, probe=torch.randn(3, 4))
    assert isinstance(model[1], ax.Dormant) and not optimizer._optimizer_step_post_hooks
