"""What a network may hold beside its tensors, and what may be done to it in a trial: all of it comes back."""

import collections
import types

import numpy as np
import pytest
import torch
from attacked import Block, assert_same, picture
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler

import auxin as ax

torch.set_num_threads(1)
EDIT = ax.Duplicate("0", by=1)


class Statistics:
    """A helper that is no module."""

    def __init__(self):
        self.mean, self.log, self.by_name = torch.zeros(3), [], {"a": [1]}

    def see(self, *_):
        self.mean += 1
        self.log.append(1)
        self.by_name["a"].append(2)


def statistics(model):
    model.statistics = Statistics()
    model.register_forward_pre_hook(lambda module, _: module.statistics.see())


def drawing(generator):
    def prepare(model):
        model.dice = generator()
        draw = getattr(model.dice, "random", None) or model.dice.random_sample
        model.register_forward_hook(lambda module, _, output: output + 1e-3 * draw())

    return prepare


def counted(model):
    model.counts = np.zeros(3)
    model.register_forward_hook(lambda module, _, output: np.add(module.counts, 1, out=module.counts) is None or None)


def buffer(value):
    return lambda model: model.register_buffer("held", value(), persistent=False)


def doubled(model):
    model.held.mul_(2)


def state(generator):
    return str(generator.bit_generator.state) if hasattr(generator, "bit_generator") else str(generator.get_state()[1:])


# name -> how the network is made, what is done to it, what shows it
HELD = {
    "an object with a tensor and lists": (
        statistics,
        None,
        lambda m: (m.statistics.mean.tolist(), m.statistics.log[:], str(m.statistics.by_name)),
    ),
    "a generator of NumPy": (drawing(lambda: np.random.default_rng(3)), None, lambda m: state(m.dice)),
    "an older generator of NumPy": (drawing(lambda: np.random.RandomState(3)), None, lambda m: state(m.dice)),
    "an array": (counted, None, lambda m: m.counts.tolist()),
    "an expanded mask": (buffer(lambda: torch.ones(1).expand(4, 4)), None, lambda m: m.held.tolist()),
    "an expanded mask, written to": (
        buffer(lambda: torch.ones(4, 1).expand(4, 3)),
        lambda m: m.held[:, :1].mul_(2),
        lambda m: (m.held.tolist(), m.held.stride()),
    ),
    "a sparse mask": (buffer(lambda: torch.eye(3).to_sparse()), doubled, lambda m: m.held.to_dense().tolist()),
    "a lazily conjugated buffer": (
        buffer(lambda: torch.full((2,), 1 + 2j).conj()),
        doubled,
        lambda m: (m.held.tolist(), m.held.is_conj()),
    ),
    "a buffer that is resized": (
        buffer(lambda: torch.zeros(3)),
        lambda m: m.held.resize_(9).fill_(2),
        lambda m: m.held.tolist(),
    ),
    "a weight that is parametrized": (
        None,
        lambda m: parametrizations.weight_norm(m[1]),
        lambda m: (type(m[1]), list(m[1]._parameters), list(m[1]._modules)),
    ),
    "a layer of which the class changes": (
        None,
        lambda m: setattr(m[1], "__class__", type("Other", (nn.Linear,), {})),
        lambda m: type(m[1]),
    ),
    "a counter": (
        lambda m: setattr(m, "held", collections.Counter(a=1)),
        lambda m: m.held.update("ab"),
        lambda m: dict(m.held),
    ),
}


def ready(prepare):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(6, 2)).eval()
    if prepare is not None:
        prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    options = {"edits": EDIT, "when": ax.when.every(10**6), "probe": torch.randn(4, 6), "keep": True}
    step()
    return model, ax.Grower(model, optimizer, **options), step


@pytest.mark.parametrize("way", ["trial", "undo"])
@pytest.mark.parametrize("name", HELD)
def test_what_a_network_holds_comes_back(name, way):
    prepare, deed, shown = HELD[name]
    model, grower, step = ready(prepare)
    before, tensors = shown(model), [t.clone() for t in model.parameters()]
    if way == "trial":
        with grower.trial(EDIT):
            step()
            _ = deed is not None and deed(model)
            step()
    else:
        grower.grow(EDIT)
        step()
        _ = deed is not None and deed(model)
        grower.undo()
    assert shown(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tensors, strict=True))
    step()


@pytest.mark.parametrize("name", ["an object with a tensor and lists", "a generator of NumPy"])
def test_a_probe_leaves_it_where_it_was(name):
    """It is run by a growth, which for the rest moves no old value."""
    prepare, _, shown = HELD[name]
    model, grower, _ = ready(prepare)
    before = shown(model)
    assert "function unchanged" in str(grower.grow(EDIT)) and shown(model) == before


def test_a_mask_that_is_expanded_is_saved_and_loaded(tmp_path):
    prepare, _, shown = HELD["an expanded mask, written to"]
    model, grower, _ = ready(prepare)
    model.held[:, :1].mul_(3)
    grower.grow(EDIT)
    ax.save(grower, tmp_path)
    other, target, _ = ready(prepare)
    ax.load(tmp_path, target)
    assert shown(other) == shown(model)


class Falling:
    """A schedule that remembers, further in than one object."""

    def __init__(self):
        self.inner = types.SimpleNamespace(seen=[], more=types.SimpleNamespace(log=[]))

    def __call__(self, epoch):
        self.inner.seen.append(epoch)
        self.inner.more.log.append(epoch)
        return 0.9**epoch


@pytest.mark.parametrize("place", ["attribute", "in an object", "further in"])
def test_a_network_may_refer_to_its_schedule(place):
    """It used to be met there first, and was not looked into any further."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = lr_scheduler.LambdaLR(optimizer, Falling())
    held = {"attribute": schedule, "in an object": types.SimpleNamespace(schedule=schedule)}
    model.held = held.get(place, types.SimpleNamespace(held=types.SimpleNamespace(schedule=schedule)))
    options = {"edits": ax.Duplicate("", by=1), "when": ax.when.every(10**6), "probe": torch.randn(4, 6)}
    grower = ax.Grower(model, optimizer, schedule, **options)
    before = picture(optimizer, schedule)
    with grower.trial(ax.Duplicate("", by=1)):
        for _ in range(3):
            optimizer.step()
            schedule.step()
    assert_same(before, picture(optimizer, schedule))
