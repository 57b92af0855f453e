"""An average of the user's own, registered in one statement: it grows, is verified, saved, loaded and resumed."""

import contextlib
import copy
import functools

import pytest
import torch
from growing import Block, Net, assert_same, batch, picture, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

import auxin as ax
from auxin.anatomy.wrappers import networks_of
from auxin.companion import registered
from auxin.gate import gated
from auxin.testing import check

EDIT = ax.Duplicate("blocks", by=1)


class ByNames(nn.Module):
    """Holds the network and its average, counts in buffers, and goes by the names of all parameters."""

    def __init__(self, model):
        super().__init__()
        self.online_model, self.ema_model = model, copy.deepcopy(model)
        self.parameter_names = {name for name, _ in model.named_parameters()}
        self.left_out = {"blocks.1.norm.bias", "head.bias"}
        self.register_buffer("updates", torch.tensor(0))

    @torch.no_grad()
    def update(self):
        self.updates += 1
        live = dict(self.online_model.named_parameters())
        for name, p in self.ema_model.named_parameters():
            if name in self.parameter_names and name not in self.left_out:
                p.lerp_(live[name], 1 - min(0.9, float(self.updates) / 10))

    copies = property(lambda self: [self.ema_model])


class Plain:
    """No module: a copy, a list of names, and a count that decides how fast it goes."""

    def __init__(self, model):
        self.model, self.ema, self.updates = model, copy.deepcopy(model).eval(), 0
        self.names = [name for name, _ in model.named_parameters()]

    @torch.no_grad()
    def update(self):
        self.updates += 1
        for name in self.names:
            rate = 1 / (1 + self.updates)
            self.ema.get_parameter(name).lerp_(self.model.get_parameter(name), rate)

    copies = property(lambda self: [self.ema])


class Two(Plain):
    """A fast and a slow copy."""

    def __init__(self, model):
        super().__init__(model)
        self.slow = copy.deepcopy(model)

    @torch.no_grad()
    def update(self):
        super().update()
        for p, live in zip(self.slow.parameters(), self.model.parameters(), strict=True):
            p.lerp_(live, 0.01)

    copies = property(lambda self: [self.ema, self.slow])


def listed(average):
    return [copy.copy(held) for held in vars(average).values() if isinstance(held, (list, set))]


KINDS = [ByNames, Plain, Two]


def run(kind):
    torch.manual_seed(0)
    model = Net()
    optimizer, average = torch.optim.AdamW(model.parameters(), lr=1e-2), kind(model)
    grower = ax.Grower(model, optimizer, average, edits=EDIT, when=ax.when.every(10**9), probe=batch()[0])
    return model, optimizer, average, grower


def go_on(model, optimizer, average, steps):
    for _ in range(steps):
        train(model, optimizer, 1)
        average.update()


def values(average):
    return [value.clone() for one in average.copies for value in one.state_dict().values()]


@pytest.mark.parametrize("kind", KINDS)
def test_grows_is_verified_saved_loaded_and_resumed(kind, tmp_path):
    ax.follow(kind, like=AveragedModel, wraps=lambda average: average.copies)
    model, optimizer, average, grower = run(kind)
    go_on(model, optimizer, average, 3)
    old = [dict(one.named_parameters()) for one in average.copies]
    kept = [{name: p.detach().clone() for name, p in held.items()} for held in old]
    grower.grow(EDIT)
    for one, held, before in zip(average.copies, old, kept, strict=True):
        now = dict(one.named_parameters())
        assert len(now) > len(held) and all(now[name] is p for name, p in held.items())
        assert all(torch.equal(now[name], value) for name, value in before.items())
        assert torch.equal(one.get_parameter("blocks.2.up.weight"), before["blocks.1.up.weight"])
    ax.verify(model, optimizer, average)
    born = [one.get_parameter("blocks.2.up.weight").detach().clone() for one in average.copies]
    go_on(model, optimizer, average, 3)
    new = [one.get_parameter("blocks.2.up.weight") for one in average.copies]
    assert not any(torch.equal(a, b) for a, b in zip(born, new, strict=True))
    ax.save(grower, tmp_path)
    model_2, optimizer_2, average_2, grower_2 = run(kind)
    ax.load(tmp_path, grower_2)
    go_on(model, optimizer, average, 3)
    go_on(model_2, optimizer_2, average_2, 3)
    assert all(torch.equal(a, b) for a, b in zip(values(average), values(average_2), strict=True))
    assert int(average.updates) == int(average_2.updates) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_growth_taken_back_leaves_no_trace(kind):
    ax.follow(kind, like=AveragedModel, wraps=lambda average: average.copies)
    model, optimizer, average, grower = run(kind)
    go_on(model, optimizer, average, 2)
    before = picture(model, optimizer, *average.copies)
    names = listed(average)
    ax.grow(model, EDIT, optimizer, average, probe=batch()[0], dry_run=True)
    grower.grow(EDIT)
    grower.undo()
    with grower.trial(EDIT):
        assert all(len(one.blocks) == 3 for one in average.copies)
    assert_same(before, picture(model, optimizer, *average.copies))
    assert names == listed(average)


def test_names_of_some_follow_their_tensors_and_get_no_new_ones():
    ax.follow(ByNames, like=AveragedModel, wraps=lambda average: average.copies)
    model, optimizer, average, grower = run(ByNames)
    ax.grow(model, ax.Insert("blocks", functools.partial(Block, 8), index=1), optimizer, average, probe=batch()[0])
    assert average.parameter_names == {name for name, _ in model.named_parameters()}
    assert average.left_out == {"blocks.2.norm.bias", "head.bias"}  # the block that was number 1


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_an_average_that_was_left_behind(kind):
    ax.follow(kind, like=AveragedModel, wraps=lambda average: average.copies)
    model, optimizer, average, _ = run(kind)
    ax.grow(model, EDIT, optimizer, probe=batch()[0])
    with pytest.raises(ax.GrowthError, match=rf"{kind.__name__} lacks blocks\.2\..*it would not be averaged"):
        ax.verify(model, optimizer, average)
    with pytest.raises(ax.GrowthError, match=rf"{kind.__name__} lacks blocks\.2\."):
        ax.grow(model, EDIT, optimizer, average, probe=batch()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fade_in_opens_in_its_copies_too(kind):
    ax.follow(kind, like=AveragedModel, wraps=lambda average: average.copies)
    model, optimizer, average, _ = run(kind)
    edit = ax.Insert("blocks", Still, index=1, fade=4)
    ax.grow(model, edit, optimizer, average, probe=batch()[0])
    go_on(model, optimizer, average, 2)
    for one in (model, *average.copies):
        assert [(path, float(block.auxin_gate)) for path, block in gated(one)] == [("blocks.1", 0.5)]


class Still(nn.Module):
    """A block that changes what passes through it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.inner(x))


def test_a_copy_that_is_not_made_yet_and_one_that_is_none():
    ax.follow(Plain, like=AveragedModel, wraps=lambda average: [None])
    model, optimizer, average, _ = run(Plain)
    assert networks_of(average) == []
    ax.follow(Plain, like=AveragedModel, wraps=lambda average: average.ema)  # one module, in no list
    assert networks_of(average) == [average.ema]
    ax.follow(Plain, like=AveragedModel, wraps=lambda average: average.ema.parameters())
    with pytest.raises(ax.GrowthError, match=r"follow\(Plain, wraps=\.\.\.\): it has returned a Parameter; let it"):
        ax.verify(model, optimizer, average)


def test_a_checkpoint_of_an_average_built_otherwise(tmp_path):
    ax.follow(Two, like=AveragedModel, wraps=lambda average: average.copies)
    model, optimizer, average, grower = run(Two)
    ax.save(grower, tmp_path)
    _, _, other, fresh = run(Two)
    ax.follow(Two, like=AveragedModel, wraps=lambda average: [average.ema])
    with pytest.raises(ax.GrowthError, match=r"Two holds 1 copies of the network, in the checkpoint 2"):
        ax.load(tmp_path, fresh)
    ax.follow(Two, like=AveragedModel, wraps=lambda average: average.copies)
    other.extra = torch.zeros(2)
    with pytest.raises(ax.GrowthError, match=r"Two itself holds the tensors \{'extra': \(2,\)\}, there \{\}. Build it"):
        ax.load(tmp_path, fresh)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [None, "the average of head.weight is not what", "updates has changed"])
def test_the_conformance_checks_look_at_its_copies_and_counts(kind, broken):
    class Average(kind):
        pass

    ax.follow(Average, like=AveragedModel, wraps=lambda average: average.copies)
    followed = registered(Average(Net())).follower

    @ax.follow(Average, wraps=lambda average: average.copies)
    def follower(average, change):
        going = followed(average, change)
        next(going)
        yield
        next(going)
        if broken and "weight" in broken:
            weight = average.copies[-1].head.weight
            weight.data = torch.nextafter(weight.data, torch.tensor(9.0))
        if broken and "updates" in broken:
            average.updates += 1
        try:
            yield
        except Exception as error:
            going.throw(error)

    words = {"companions": lambda model, optimizer: [Average(model)], "steps": 2}
    with pytest.raises(AssertionError, match=broken) if broken else contextlib.nullcontext():
        check(Net(), EDIT, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2), batch()[0], **words)


def test_an_average_of_an_average(tmp_path):
    def made():
        torch.manual_seed(0)
        model = Net()
        optimizer, inner = torch.optim.AdamW(model.parameters(), lr=1e-2), AveragedModel(model, use_buffers=True)
        outer = AveragedModel(inner)
        grower = ax.Grower(model, optimizer, inner, outer, edits=EDIT, when=ax.when.every(10**9), probe=batch()[0])
        return model, optimizer, inner, outer, grower

    def go_on(model, optimizer, inner, outer, steps):
        for _ in range(steps):
            train(model, optimizer, 1)
            inner.update_parameters(model)
            outer.update_parameters(inner)

    *run, grower = made()
    go_on(*run, 2)
    evidence = ax.Evidence(lambda model, x: model(x).square().mean(), [batch()[0]])
    evidence.train(run[0], run[1:], 1)
    assert int(run[2].n_averaged) == int(run[3].n_averaged) == 3
    copies = [run[2].module, run[3].module.module]
    assert [networks_of(average) for average in run[2:]] == [[one] for one in copies]
    before = [one.blocks[1].up.weight.detach().clone() for one in copies]
    grower.grow(EDIT)
    assert all(torch.equal(one.blocks[2].up.weight, w) for one, w in zip(copies, before, strict=True))
    assert not torch.equal(*before)
    go_on(*run, 2)
    ax.save(grower, tmp_path)
    *other, fresh = made()
    ax.load(tmp_path, fresh)
    for one in (run, other):
        go_on(*one, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(run[3].state_dict().values(), other[3].state_dict().values(), strict=True)
    )
