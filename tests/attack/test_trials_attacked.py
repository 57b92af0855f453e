"""Trials, undo and snapshots under all that a user may do inside or between them: afterwards all is as before."""

import collections
import functools
import random

import pytest
import torch
from attacked import Block, Run, assert_same, differences, picture, silent
from torch import nn

import auxin as ax

torch.set_num_threads(1)
ONE, TWO = ax.Duplicate("blocks", by=1), ax.Duplicate("blocks", by=2)
LINEAR = functools.partial(nn.Linear, 6, 6)


def ready(**options):
    run = Run(**options)
    run.steps(5)
    return run


@pytest.fixture(scope="module")
def expected():
    return ready().steps(10)


def clear(run):
    for optimizer in (run.adam, run.sgd):
        optimizer.zero_grad()


def hooks_added(run):
    model = run.model
    model.register_forward_hook(silent)
    model.blocks[0].up.register_full_backward_hook(silent)
    model.blocks[0].up.weight.register_hook(silent)
    model.blocks[0].up.bias.register_post_accumulate_grad_hook(silent)
    model.blocks[1].up.weight._backward_hooks.clear()
    model.blocks[0]._forward_hooks.clear()
    run.steps(2)


def layer_and_group_added(run):
    run.model.extra = nn.Linear(6, 6)
    group = {"params": list(run.model.extra.named_parameters()), "initial_lr": 0.1, "max_lr": 0.1, "min_lr": 0.1}
    run.adam.add_param_group({**group, "max_momentum": 0.9, "base_momentum": 0.8})
    run.sgd.step()


def frozen_and_thawed(run):
    run.model.embed.weight.requires_grad_(False)
    run.model.side.requires_grad_(True)
    run.steps(2)


def gradients_zeroed(run):
    clear(run)
    run.adam.zero_grad(set_to_none=False)
    run.steps(2)
    run.adam.zero_grad(set_to_none=False)


def attributes_set(run):
    run.model.eval()
    run.model.note = "mine"
    run.model.seen.append(7)
    del run.model.blocks[0].drop.p
    run.model.side.register_buffer("mask", torch.ones(2))


def options_changed(run):
    run.adam.param_groups[0].update(lr=5.0, betas=(0.5, 0.5))
    run.adam.defaults["lr"] = 3.0
    run.steps(2)


def storage_swapped(run):
    run.model.blocks[0].up.weight.data = torch.zeros(8, 6)
    run.model.blocks[0].up.bias.data = torch.zeros(3)
    run.sgd.step()


def average_written(run):
    run.ema.module.blocks[0].up.weight.data.zero_()
    run.ema.n_averaged += 5
    run.steps(1)


def states_cleared(run):
    run.adam.state.clear()
    run.sgd.state.clear()


def operated(run):
    clear(run)
    with ax.surgery(run.model, *run.companions):
        run.model.tail.append(nn.Linear(6, 6))
    run.steps(2)


def tried_further(run):
    run.steps(1)
    before = run.picture()
    with run.grower.trial(TWO):
        run.steps(2)
        with pytest.raises(ZeroDivisionError), run.grower.trial(None):
            run.steps(1)
            _ = 1 / 0
        run.steps(1)
    assert_same(before, run.picture())
    run.steps(1)


def grown_inside(run):
    run.grower.grow(ax.Insert("blocks", Block, index=0))
    run.steps(2)


def grown_and_undone_inside(run):
    run.grower.grow(ax.Insert("blocks", Block, index=0))
    run.grower.undo()
    run.steps(2)


def refused_inside(run):
    clear(run)
    with pytest.raises(ax.GrowthError):
        run.grower.grow(ax.Duplicate("nowhere"))
    run.steps(1)


DEEDS = [hooks_added, layer_and_group_added, frozen_and_thawed, gradients_zeroed, attributes_set, options_changed]
DEEDS += [storage_swapped, average_written, states_cleared, operated, tried_further, grown_inside]
DEEDS += [grown_and_undone_inside, refused_inside]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("edit", [ONE, None], ids=["grown", "not grown"])
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_nothing_done_in_a_trial_is_there_afterwards(deed, edit, keep, expected):
    run = ready(keep=keep)
    before = run.picture()
    with run.grower.trial(edit):
        deed(run)
    assert_same(before, run.picture())
    run.grower.verify()
    assert run.steps(10) == expected


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_whatever_a_trial_raises_passes_on(kind, expected):
    run = ready()
    before = run.picture()
    with pytest.raises(kind), run.grower.trial(ONE):
        run.steps(2)
        raise kind
    assert_same(before, run.picture())
    assert run.steps(10) == expected


def test_a_trial_that_is_dropped_half_way_is_taken_back(expected):
    run = ready()
    before = run.picture()
    trial = run.grower.trial(ONE)
    trial.__enter__()
    run.steps(2)
    del trial
    assert_same(before, run.picture())
    assert run.steps(10) == expected


@pytest.mark.parametrize("edit", [ax.Duplicate("nowhere"), ax.Insert("tail", functools.partial(nn.Linear, 6, 5))])
def test_a_refused_edit_is_no_trial(edit, expected):
    run = ready()
    before = run.picture()
    with pytest.raises(ax.GrowthError), run.grower.trial(edit):
        pass
    assert_same(before, run.picture())
    assert run.steps(10) == expected


def test_a_growth_that_is_held_outlives_a_trial(expected):
    run = ready()
    before = run.picture()
    run.grower.grow(ONE)
    with run.grower.trial(TWO):
        run.steps(3)
    run.grower.undo()
    assert_same(before, run.picture())
    assert run.steps(10) == expected


@pytest.mark.parametrize("keep", [False, True])
def test_a_growth_while_another_is_held_keeps_the_first(keep):
    run = ready(keep=keep)
    run.grower.grow(ONE)
    between = run.picture()
    run.grower.grow(ax.Insert("tail", LINEAR, init="identity"))
    run.grower.undo()
    assert_same(between, run.picture())
    assert len(run.model.blocks) == 3 and len(run.grower.journal) == 1
    with pytest.raises(ax.GrowthError, match="no growth that could be taken back.*not reach past a surgery"):
        run.grower.undo()


@pytest.mark.parametrize("keep", [True, "disk", "pinned"])
def test_a_refused_growth_does_not_cost_the_way_back(keep, expected):
    """The snapshot of the growth before it used to be overwritten by the attempt."""
    run = ready(keep=keep)
    before = run.picture()
    run.grower.grow(ONE)
    run.steps(3)
    clear(run)
    with pytest.raises(ax.GrowthError):
        run.grower.grow(ax.Duplicate("nowhere"))
    run.grower.undo()
    assert_same(before, run.picture())
    assert run.steps(10) == expected


@pytest.mark.parametrize("keep", [False, True])
def test_undo_behind_the_growers_back(keep, expected):
    """Other code has changed the network since: refused, or with a snapshot exact. Never half of each."""
    run = ready(keep=keep)
    before = run.picture()
    run.grower.grow(ONE)
    clear(run)
    with ax.surgery(run.model, *run.companions, probe=run.probe):
        run.model.tail.append(nn.Linear(6, 6))
    if keep:
        run.grower.undo()
        assert_same(before, run.picture())
        assert run.steps(10) == expected
    else:
        with pytest.raises(ax.GrowthError, match="have been changed since the growth, by other code"):
            run.grower.undo()
        run.grower.verify()
        assert len(run.model.blocks) == 3 and len(run.model.tail) == 3
        run.steps(2)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, ax.GrowthError])
def test_a_callback_that_raises_takes_the_growth_back(kind, expected):
    def refuse(change):
        raise kind("no")

    run = ready(on_growth=refuse)
    before = run.picture()
    with pytest.raises(kind, match="no"):
        run.grower.grow(ONE)
    assert_same(before, run.picture())
    assert run.steps(10) == expected


def test_a_callback_may_undo(expected):
    run = ready()
    before = run.picture()
    run.grower.on_growth = lambda change: run.grower.undo()
    run.grower.grow(ONE)
    run.grower.on_growth = None
    assert_same(before, run.picture())
    assert run.steps(10) == expected


def test_an_undo_whose_callback_raises_is_done(expected):
    run = ready()
    before = run.picture()
    run.grower.grow(ONE)
    run.grower.on_undo = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.grower.undo()
    run.grower.on_undo = None
    assert_same(before, run.picture())
    assert run.steps(10) == expected


class Own(nn.Module):
    """It holds a generator, a tensor that is no buffer, a deque and a list in a dict, and writes into all of them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.noise, self.dice = torch.Generator().manual_seed(1), random.Random(3)
        self.seen, self.last, self.kept = torch.zeros(2), collections.deque(maxlen=3), {"all": [1]}

    def forward(self, x):
        self.seen += 1
        self.last.append(float(x.detach().sum()))
        self.kept["all"].append(self.dice.random())
        return x + self.linear(x) + 0.01 * torch.randn(x.shape, generator=self.noise)


@pytest.mark.parametrize("way", ["trial", "dry run", "refused", "undo", "undo after steps", "surgery"])
def test_state_of_a_modules_own_comes_back_too(way):
    """A probe runs the network: what its forward writes beside the buffers used to stay."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Own(), Own()), torch.randn(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    edit = ax.Insert("", functools.partial(nn.Linear, 4, 4), init="kaiming")
    grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.every(10**6), probe=x, keep=way == "undo after steps")
    before = picture(model, optimizer)
    if way == "trial":
        with grower.trial(edit):
            step()
    elif way == "dry run":
        ax.grow(model, edit, optimizer, probe=x, dry_run=True)
    elif way == "refused":
        with pytest.raises(ax.GrowthError):
            grower.grow(ax.Insert("", functools.partial(nn.Linear, 4, 3)))
    elif way == "surgery":
        with pytest.raises(ZeroDivisionError), ax.surgery(model, optimizer, probe=x):
            model(x)
            _ = 1 / 0
    else:
        grower.grow(edit)
        if "steps" in way:
            step()
        grower.undo()
    assert not differences(before, picture(model, optimizer))


BUILDS = {
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3, history_size=3, line_search_fn="strong_wolfe"),
    "foreign": lambda ps: torch.optim.Adam([*ps, nn.Parameter(torch.ones(3))], lr=0.01),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "tensor lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.01), amsgrad=True),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.01, t0=1),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "fused": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("name", BUILDS)
def test_any_optimizer_comes_back(name):
    def train(count):
        losses = []
        for number in range(count):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))

            def closure(x=x):
                optimizer.zero_grad()
                loss = (model(x) - x.flip(1)).square().mean()
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        optimizer.zero_grad()
        return losses

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval()
    optimizer = BUILDS[name](list(model.parameters()))
    train(3)
    edit = ax.Duplicate("", by=1)
    grower = ax.Grower(
        model, optimizer, edits=edit, when=ax.when.every(10**6), probe=torch.randn(4, 6), keep=True, group=0
    )
    before = picture(model, optimizer)
    with grower.trial(edit):
        train(3)
    assert not differences(before, picture(model, optimizer))
    grower.grow(edit)
    first = train(3)
    grower.undo()
    assert not differences(before, picture(model, optimizer))
    grower.grow(edit)
    assert train(3) == first
