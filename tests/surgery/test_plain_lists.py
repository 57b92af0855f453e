"""Networks that keep their blocks twice, or count them: a new layer runs, or is refused by name."""

import functools

import pytest
import torch
from growing import Block, assert_same, batch, bits, ema_of, picture, train
from torch import nn

import auxin as ax

torch.set_num_threads(1)
NEW = functools.partial(Block, 8)


class Stacked(nn.Module):
    """As in forecasting libraries: forward runs over a plain list, a ModuleList beside it registers the blocks."""

    def __init__(self, kind=list):
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks_list = kind(Block() for _ in range(2))
        self.blocks = nn.ModuleList(self.blocks_list)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks_list:
            x = block(x)
        return self.head(x)


class Twice(nn.Module):
    """Stacks of such stacks, and a second list of the same blocks on another module."""

    def __init__(self):
        super().__init__()
        self.inner = Stacked()
        self.watched = self.inner.blocks_list
        self.copied = list(self.inner.blocks)

    def forward(self, x):
        return self.inner(x)


class Halves(nn.Module):
    """Two plain lists of parts of the blocks: none of them follows from the ModuleList alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.first, self.second = list(self.blocks)[:2], list(self.blocks)[2:]

    def forward(self, x):
        x = self.stem(x)
        for block in [*self.first, *self.second]:
            x = block(x)
        return self.head(x)


class Counted(nn.Module):
    """Forward counts to a stored depth."""

    count = "depth"

    def __init__(self):
        super().__init__()
        setattr(self, self.count, 2)
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for i in range(getattr(self, self.count)):
            x = self.blocks[i](x)
        return self.head(x)


class CountedByN(Counted):
    """The same under a name that does not say what it counts."""

    count = "n"


class Spelled(nn.Module):
    """Forward names its blocks one by one."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleDict({"a": Block(), "b": Block()})

    def forward(self, x):
        return self.head(self.blocks["b"](self.blocks["a"](self.stem(x))))


def ready(network=Stacked, *args):
    torch.manual_seed(0)
    model = network(*args)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ema = ema_of(model)
    train(model, optimizer, 2)
    ema.update_parameters(model)
    return model, optimizer, ema


EDITS = {
    "insert at the end": ax.Insert("blocks", NEW),
    "insert in the middle": ax.Insert("blocks", NEW, index=1),
    "insert first": ax.Insert("blocks", NEW, index=0),
    "duplicate": ax.Duplicate("blocks"),
    "not preserving": ax.Insert("blocks", NEW, index=1, init="kaiming"),
}


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_follows_the_list_and_the_module_list(name, kind):
    model, optimizer, ema = ready(Stacked, kind)
    ax.grow(model, EDITS[name], optimizer, ema, probe=batch()[0])
    for net in (model, ema.module):
        assert type(net.blocks_list) is kind and [id(b) for b in net.blocks_list] == [id(b) for b in net.blocks]
    assert len(model.blocks) > 2
    start = [bits(p) for p in model.blocks.parameters()]
    train(model, optimizer, 3)
    assert all(bits(p) != s for p, s in zip(model.blocks.parameters(), start, strict=True))


def test_by_hand_a_block_in_the_module_list_alone_never_runs():
    model, optimizer, _ = ready()
    before = model(batch()[0])
    model.blocks.append(Block())
    optimizer.param_groups[0]["params"] += list(model.blocks[2].parameters())
    assert torch.equal(model(batch()[0]), before)
    start = [bits(p) for p in model.blocks[2].parameters()]
    train(model, optimizer, 2)
    assert [bits(p) for p in model.blocks[2].parameters()] == start


def test_every_list_of_the_same_blocks_is_followed():
    model, optimizer, _ = ready(Twice)
    lists = model.watched, model.copied, model.inner.blocks_list
    ax.grow(model, ax.Duplicate("inner.blocks", by=1), optimizer, probe=batch()[0])
    assert lists[0] is model.watched is model.inner.blocks_list and lists[1] is model.copied
    assert all([id(b) for b in blocks] == [id(b) for b in model.inner.blocks] for blocks in lists)


@pytest.mark.parametrize("probe", [None, batch()[0]], ids=["no probe", "probe"])
def test_surgery_on_the_module_list_alone_is_refused_by_name(probe):
    everything = ready()
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match=r"surgery: blocks_list is a plain list of the blocks in 'blocks'.*never"):
        with ax.surgery(*everything, probe=probe):
            everything[0].blocks.append(Block())
    assert_same(before, picture(*everything))


@pytest.mark.parametrize("probe", [None, batch()[0]], ids=["no probe", "probe"])
def test_surgery_on_the_plain_list_alone_is_refused_by_name(probe):
    """It would run and never train: its parameters are not the network's."""
    everything = ready()
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match=r"surgery: blocks_list holds a Block that is not part of the network"):
        with ax.surgery(*everything, probe=probe):
            everything[0].blocks_list.append(Block())
    assert_same(before, picture(*everything))


@pytest.mark.parametrize("kind", [list, tuple])
def test_surgery_on_both_is_followed(kind):
    model, optimizer, ema = ready(Stacked, kind)
    with ax.surgery(model, optimizer, ema, probe=batch()[0]):
        model.blocks.insert(1, Block())
        model.blocks_list = kind(model.blocks)
    assert [id(b) for b in ema.module.blocks_list] == [id(b) for b in ema.module.blocks]
    assert len(ema.module.blocks) == 3
    ax.verify(model, optimizer, ema)
    start = [bits(p) for p in model.blocks.parameters()]
    train(model, optimizer, 1)
    assert all(bits(p) != s for p, s in zip(model.blocks.parameters(), start, strict=True))


@pytest.mark.parametrize("edit", [ax.Duplicate("blocks", by=1), ax.Insert("blocks", NEW, index=2)])
def test_lists_of_parts_of_the_blocks_are_refused(edit):
    everything = ready(Halves)
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match=r"blocks\.\d: the network's forward never calls it.*a plain list"):
        ax.grow(everything[0], edit, *everything[1:], probe=batch()[0])
    assert_same(before, picture(*everything))


@pytest.mark.parametrize("edit", [ax.Duplicate("blocks", by=1), ax.Insert("blocks", NEW), ax.Insert("blocks", NEW, 0)])
def test_a_stored_depth_is_followed(edit):
    model, optimizer, ema = ready(Counted)
    ax.grow(model, edit, optimizer, ema, probe=batch()[0])
    assert model.depth == len(model.blocks) == ema.module.depth == 3
    ax.grow(model, ax.Remove("blocks.1"), optimizer, ema, probe=batch()[0])
    assert model.depth == len(model.blocks) == ema.module.depth == 2


@pytest.mark.parametrize("edit", [ax.Duplicate("blocks", by=1), ax.Insert("blocks", NEW), ax.Insert("blocks", NEW, 0)])
def test_a_stored_depth_under_another_name_is_named(edit):
    everything = ready(CountedByN)
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match=r"never calls it.*Perhaps n \(= 2\) counts the blocks\?"):
        ax.grow(everything[0], edit, *everything[1:], probe=batch()[0])
    assert_same(before, picture(*everything))


def test_an_old_block_that_a_new_one_pushes_out_of_the_count_is_named():
    """Not preserving, so nothing else would tell."""
    everything = ready(CountedByN)
    before = picture(*everything)
    edit = ax.Insert("blocks", NEW, index=0, init="kaiming")
    with pytest.raises(
        ax.GrowthError, match=r"blocks\.2: .*called this layer before the growth and never calls it now"
    ):
        ax.grow(everything[0], edit, *everything[1:], probe=batch()[0])
    assert_same(before, picture(*everything))
    with ax.surgery(*everything, probe=batch()[0]) as done:
        everything[0].blocks.insert(0, Block())
    assert "blocks.2 is not called any more" in str(done.change)


def test_surgery_that_counts_on_is_followed_and_one_that_does_not_is_refused():
    model, optimizer, ema = ready(Counted)
    before = picture(model, optimizer, ema)
    with pytest.raises(ax.GrowthError, match=r"blocks\.2: the network's forward never calls it.*depth \(= 2\)"):
        with ax.surgery(model, optimizer, ema, probe=batch()[0]):
            model.blocks.append(Block())
    assert_same(before, picture(model, optimizer, ema))
    with ax.surgery(model, optimizer, ema, probe=batch()[0]):
        model.blocks.append(Block())
        model.depth += 1
    assert ema.module.depth == 3 and len(ema.module.blocks) == 3


def test_a_block_that_forward_does_not_name_is_refused():
    everything = ready(Spelled)
    before = picture(*everything)
    with pytest.raises(ax.GrowthError, match=r"blocks\.c: the network's forward never calls it.*fixed names"):
        ax.grow(everything[0], ax.Insert("blocks", NEW, key="c"), *everything[1:], probe=batch()[0])
    assert_same(before, picture(*everything))
