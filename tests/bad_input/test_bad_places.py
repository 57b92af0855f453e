"""Edits that name a wrong place or a wrong layer: refused in words that show what to write, and nothing is touched."""

import functools

import pytest
import torch
from growing import Block, Net, assert_same, batch, ema_of, picture, train
from torch import nn

import auxin as ax

torch.set_num_threads(1)
ROWS = batch()[0]
LINEAR = functools.partial(nn.Linear, 8, 8)


class Mixed(Net):
    """A network with every kind of container."""

    def __init__(self):
        super().__init__()
        self.chain = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.named = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        self.empty = nn.ModuleList()
        self.idle = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x):
        x = self.chain(self.stem(x))
        for block in (*self.blocks, *self.named.values(), *self.empty):
            x = block(x)
        return self.head(x)


def ready():
    torch.manual_seed(0)
    model = Mixed()
    model.idle.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer, 2)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), ema_of(model)


def refused(edit, match, probe=ROWS, **options):
    everything = ready()
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(everything[0], edit, *everything[1:], probe=probe, **options)
    assert_same(before, picture(*everything))


def local_layer():
    return nn.Linear(8, 8)


def factory():
    def closure():
        return nn.Linear(8, 8)

    return closure


class Broken(nn.Module):
    """Its constructor wants more."""

    def __init__(self, dim, heads):
        super().__init__()


def not_a_module():
    return [nn.Linear(8, 8)]


class Raises(nn.Module):
    """Its forward fails."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(8))

    def forward(self, x):
        raise ValueError("I was never finished")


PLACES = {
    "no such child": (
        ax.Insert("block", LINEAR),
        r"at\)?=?.*'block': the model \(Mixed\) has no child 'block'; its children",
    ),
    "no such path": (ax.Insert("blocks.7.up", LINEAR), r"'blocks\.7\.up': blocks \(ModuleList\) has no child '7'; its"),
    "not a container": (ax.Insert("head", LINEAR), r"'head' is a Linear, not a container.*'blocks'.*surgery"),
    "not a container to copy": (ax.Duplicate("stem"), r"Duplicate\(at='stem'\): 'stem' is a Linear, not a container"),
    "the network itself": (ax.Duplicate(""), r"'' is a Mixed, not a container"),
    "beyond the end": (ax.Insert("blocks", Block, index=3), r"index=3\): 'blocks' has 2 children; .* from -2 to 2"),
    "before the start": (ax.Insert("blocks", Block, index=-3), r"index=-3\).*from -2 to 2"),
    "a key for a list": (ax.Insert("blocks", Block, key="x"), r"'blocks' has natural indices; pass index="),
    "an index for named children": (ax.Insert("named", LINEAR, index=0), r"have names \(a, b\); pass key='new_name'"),
    "a key that is taken": (ax.Insert("named", LINEAR, key="a"), r"key='a'\): there is a 'a' already"),
    "a key with a dot": (ax.Insert("named", LINEAR, key="a.c"), r"not usable as a module name"),
    "a key that is a method": (ax.Insert("named", LINEAR, key="forward"), r"not usable as a module name"),
    "before nothing": (ax.Insert("named", LINEAR, key="c", before="z"), r"before='z'\): no such child; there are a, b"),
    "before without a key": (ax.Insert("blocks", Block, before="1"), r"before= goes with key=; here pass index="),
    "copies of named children": (ax.Duplicate("named"), r"have names \(a, b\), not the indices.*use Insert"),
    "copies of nothing": (ax.Duplicate("empty"), r"'empty' is empty, there is nothing to copy"),
    "into nothing": (ax.Insert("empty", LINEAR), r"the container is empty.*surgery"),
    "where nothing runs": (ax.Insert("idle", LINEAR), r"never calls what stands there"),
    "copies of what never runs": (ax.Duplicate("idle"), r"the network never calls idle\.0"),
    "too many at the end": (ax.Duplicate("blocks", by=3, order="last"), r"there are 2 blocks"),
    "an order that lacks a block": (ax.Duplicate("blocks", order=[0, 0, 0]), r"every old index 0\.\.1"),
    "no edit": (LINEAR, r"edit is a partial; pass an edit such as Duplicate\('blocks'\)"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_wrong_place(name):
    refused(*PLACES[name])


# What means nothing in any network is refused where the edit is written down.
WORDS = {
    "an index that is no number": (ax.Insert, {"layer": Block, "index": "1"}, r"index='1'\).*a whole number"),
    "an unknown init": (ax.Insert, {"layer": Block, "init": "sideways"}, r"init='sideways' is not known; use one of"),
    "a fade into the past": (ax.Insert, {"layer": Block, "fade": -1}, r"fade=-1 is a number of optimizer steps"),
    "an unknown init behind": (ax.After, {"init": "sideways"}, r"After.*init='sideways' is not known"),
    "units behind": (ax.After, {"init": "gradmax"}, r"chooses directions for new units"),
    "half a step behind": (ax.After, {"fade": 0.5}, r"fade=0.5 is a number of optimizer steps"),
    "an unknown init instead": (ax.Replace, {"layer": Block, "init": "sideways"}, r"Replace.*'sideways' is not known"),
    "no copies": (ax.Duplicate, {"by": 0}, r"by=0.*a whole number from 1"),
    "half a copy": (ax.Duplicate, {"by": 1.5}, r"by=1\.5.*a whole number from 1"),
    "an unknown order": (ax.Duplicate, {"order": "sideways"}, r"order is one of 'interleave'"),
    "an order without a copy": (ax.Duplicate, {"order": [0, 1]}, r"at least one of them again"),
    "an order that jumps": (ax.Duplicate, {"order": [0, 2, 2]}, r"every old index 0\.\.1, in order of first use"),
    "an order of texts": (ax.Duplicate, {"order": ["0", "0"]}, r"at least one of them again"),
    "an order and another number": (ax.Duplicate, {"by": 2, "order": [0, 0]}, r"adds 1 blocks, by=2 says otherwise"),
    "an unknown output": (ax.Duplicate, {"output": "half"}, r"output is one of 'zero', 'keep'"),
    "an unknown width": (ax.Widen, {"by": 0}, r"by=0\): pass a whole number from 1"),
    "no width": (ax.Widen, {}, r"pass by= \(how many entries more\) or to="),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_word_that_means_nothing(name):
    edit, words, match = WORDS[name]
    with pytest.raises(ax.GrowthError, match=match):
        edit("blocks", **words)


LAYERS = {
    "a lambda": (
        lambda: nn.Linear(8, 8),
        r"a lambda.*functools\.partial\(nn\.Linear, 64, 64\).*surgery\(model, optimizer\)",
    ),
    "a closure": (factory(), r"defined inside a function.*functools\.partial.*surgery\(model, optimizer\)"),
    "a ready layer": (
        nn.Linear(8, 8),
        r"a ready module.*`functools\.partial\(nn\.Linear, .*8, .*8.*\)`.*surgery\(model",
    ),
    "a ready block": (Block(), r"a ready module.*Pass its class: `Block`.*surgery\(model"),
    "a ready list": (nn.ModuleList([nn.Linear(8, 8)]), r"a ready module.*at the top level of a module that builds it"),
    "a partial of a lambda": (functools.partial(lambda n: nn.Linear(n, n), 8), r"a lambda.*functools\.partial"),
    "a method": (Block().forward, r"a method of an object"),
    "a name": ("nn.Linear", r"neither a class nor a function.*functools\.partial"),
    "a class without its arguments": (nn.Linear, r"building it failed: .*partial\(Linear, \.\.\.\)"),
    "a class that wants more": (
        functools.partial(Broken, 8),
        r"building it failed: .*heads.*partial\(Broken, \.\.\.\)",
    ),
    "a factory of something else": (not_a_module, r"it returned a list, not an nn\.Module"),
    "another width": (
        functools.partial(nn.Linear, 4, 8),
        r"does not take the \(16, 8\) tensor that arrives there.*16x8 and 4x8",
    ),
    "another output": (
        functools.partial(nn.Linear, 8, 4),
        r"turns \(16, 8\) -> \(16, 4\), so it cannot leave the function",
    ),
    "a layer that fails": (Raises, r"does not take the \(16, 8\) tensor.*I was never finished"),
    "a layer that cannot start as nothing": (nn.Sigmoid, r"changes the function and has no weights"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_layer(name):
    layer, match = LAYERS[name]
    refused(ax.Insert("blocks", layer), match)


def test_a_width_that_does_not_fit_what_stands_behind():
    refused(
        ax.Insert("blocks", functools.partial(nn.Linear, 8, 4), index=1, init="kaiming"), r"blocks\.1: the grown.*4"
    )


def test_an_output_that_would_change_its_shape():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20))
    optimizer = torch.optim.Adam(model.parameters())
    probe, before = torch.randn(4, 10), picture(model, optimizer)
    edit = ax.Insert("", functools.partial(nn.Linear, 20, 30), init="default")
    with pytest.raises(ax.GrowthError, match=r"output would change from \(4, 20\) to \(4, 30\).*outputs=True"):
        ax.grow(model, edit, optimizer, probe=probe)
    assert_same(before, picture(model, optimizer))
    edit = ax.Insert("", functools.partial(nn.Linear, 20, 30), init="default", outputs=True)
    ax.grow(model, edit, optimizer, probe=probe)
    assert model(probe).shape == (4, 30)


PROBES = {
    "none, to preserve": (None, r"needs one batch to find which weights must be zero: pass\s+probe=batch"),
    "another width": (torch.randn(4, 3), r"probe: Mixed does not run on it: .*4x3 and 5x8.*as the training loop calls"),
    "a wrong keyword": ({"inputs": torch.randn(4, 5)}, r"probe: Mixed does not run on it: .*inputs"),
    "nothing": ((), r"probe=tuple of 0|probe: Mixed does not run on it|does not take it"),
    "a text": ("batch", r"probe: Mixed does not run on it"),
    "a function that fails": (lambda: 1 / 0, r"probe.*division by zero"),
}


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("edit", [ax.Duplicate("blocks", by=1), ax.Insert("blocks", Block)], ids=["copy", "new"])
def test_a_probe_that_does_not_fit(name, edit):
    probe, match = PROBES[name]
    refused(edit, match, probe=probe)


def test_a_model_that_is_none():
    with pytest.raises(ax.GrowthError, match=r"model is a list; pass the nn\.Module itself"):
        ax.grow([nn.Linear(2, 2)], ax.Duplicate("blocks"))


@pytest.mark.parametrize("group", [3, -1, "first", 1.0])
def test_a_group_that_is_not_there(group):
    refused(
        ax.Duplicate("blocks", by=1), r"group=.*pass the index of an existing group \(0: AdamW group 0\)", group=group
    )


def test_everything_is_refused_before_the_first_growth_of_a_grower():
    model, optimizer, *_ = ready()
    options = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.every(1), "probe": batch()[0]}
    for wrong, match in (
        ({"when": 3}, r"when is a int; pass a trigger such as auxin\.when\.plateau"),
        ({"edits": [LINEAR]}, r"edits holds a partial; pass edits such as auxin\.Duplicate"),
        ({"limit": ax.Limit(flops=1e9), "probe": None}, r"limit=Limit\(flops=\.\.\.\) is measured on a batch"),
    ):
        with pytest.raises(ax.GrowthError, match=match):
            ax.Grower(model, optimizer, **{**options, **wrong})


def test_a_pattern_that_fits_nothing_is_told_what_is_there():
    net = nn.Sequential(Block(8), Block(8))
    with pytest.raises(ax.GrowthError, match=r"'\*\.middle'.*fits this pattern; \*\. has [a-z, ]+\.$"):
        ax.grow(net, ax.Widen("*.middle", by=2), probe=torch.ones(2, 8))
    with pytest.raises(ax.GrowthError, match=r"fits this pattern; auxin\.sites\(model, probe\) lists all\.$"):
        ax.grow(net, ax.Widen("layers.*.middle", by=2), probe=torch.ones(2, 8))
