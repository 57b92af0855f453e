"""What becomes of hooks when a block is copied: which are shared, which are the copy's own, which stay behind."""

import functools

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import auxin as ax

X = torch.randn(3, 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        return x + self.fc(x)


class SelfHooked(Block):
    """Counts its own calls by a hook that it registers itself."""

    def __init__(self):
        super().__init__()
        self.fc.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1


class Counter:
    def __init__(self):
        self.seen = []

    def __call__(self, module, *_):
        self.seen.append(module)

    def method(self, module, *_):
        self.seen.append(module)


def note(seen, module, *_):
    seen.append(module)


def grown(model, **edit):
    optimizer, average = torch.optim.SGD(model.parameters(), lr=0.1), AveragedModel(model)
    change = ax.grow(model, ax.Duplicate("", **edit), optimizer, average, probe=X)
    return change, average


def test_module_hooks_are_shared_and_named():
    model, counter, outside, seen = nn.Sequential(Block(), Block()), Counter(), Counter(), []
    handle = model[1].register_forward_hook(counter)
    model[1].fc.register_forward_pre_hook(outside.method)
    model[1].register_forward_hook(functools.partial(note, seen))
    model[1].register_full_backward_hook(lambda module, *_: seen.append("backward"))
    change, average = grown(model, by=1)
    assert "the hooks on 1 and others are called for its copy too" in change.notes
    for held in (counter.seen, outside.seen, seen):
        held.clear()
    model(X.clone().requires_grad_()).sum().backward()
    blocks = [model[1], model[2]]
    assert counter.seen == blocks and seen == [*blocks, "backward", "backward"]
    assert outside.seen == [block.fc for block in blocks]
    # The handle reaches the source only.
    handle.remove()
    counter.seen.clear()
    model(X)
    assert counter.seen == [model[2]]
    # An average is a copy of its own, with hooks of its own from the day it was made.
    outside.seen.clear()
    average(X)
    assert outside.seen == []


def test_methods_of_the_block_itself_become_the_copys_own():
    model = nn.Sequential(SelfHooked(), SelfHooked())
    change, _ = grown(model, order=[0, 1, 1])
    assert change.notes == ()
    for block in model:
        block.calls = 0
    model(X)
    assert [block.calls for block in model] == [1, 1, 1]


def test_hooks_on_tensors_and_around_the_list_are_not_copied():
    model, seen = nn.Sequential(Block(), Block()), []
    model[1].fc.weight.register_hook(lambda grad: seen.append("tensor"))
    model[1].fc.bias.register_hook(lambda grad: seen.append("bias"))
    model.register_forward_hook(lambda *_: seen.append("around"))
    change, _ = grown(model, by=1)
    assert change.notes == ()
    seen.clear()
    model(X).sum().backward()
    assert sorted(seen) == ["around", "bias", "tensor"]


def test_the_ways_round_that_are_documented():
    model, counter = nn.Sequential(Block(), Block()), Counter()
    first = model[0]
    first.register_forward_hook(lambda module, *_: counter(module) if module is first else None)
    grown(model, order=[0, 0, 1])
    counter.seen.clear()
    model(X)
    assert counter.seen == [first]

    model, counter = nn.Sequential(Block(), Block()), Counter()
    handles = [model[1].register_forward_hook(counter)]
    handles.pop().remove()
    grown(model, by=1)
    handles.append(model[1].register_forward_hook(counter))
    model(X)
    assert counter.seen == [model[1]]

    model[1].register_forward_hook(counter)
    ax.grow(model, ax.Insert("", Block), probe=X)
    assert not model[3]._forward_hooks
