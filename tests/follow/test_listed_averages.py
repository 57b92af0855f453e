"""Averages that keep a list of tensors in the order of the parameters, as two packages write them."""

import copy
import weakref

import pytest
import torch
from growing import Net, assert_same, batch, picture, train

import auxin as ax

KIND = "torch_ema.ema:ExponentialMovingAverage"
EDIT = ax.Duplicate("blocks", by=1)


class Shadows:
    def __init__(self, parameters, decay=0.9):
        parameters = list(parameters)
        self.shadows, self.decay, self.updates = [p.detach().clone() for p in parameters], decay, 0
        self.refs = [weakref.ref(p) for p in parameters]

    def update(self):
        self.updates += 1
        for shadow, ref in zip(self.shadows, self.refs, strict=True):
            shadow.lerp_(ref().detach(), 1 - self.decay)

    def state_dict(self):
        return {"shadows": self.shadows, "updates": self.updates}

    def load_state_dict(self, state):
        self.shadows, self.updates = copy.deepcopy(state["shadows"]), state["updates"]


def run():
    ax.follow(Shadows, like=KIND)
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), Shadows(model.parameters())


def go_on(model, optimizer, average, steps=2):
    for _ in range(steps):
        train(model, optimizer)
        average.update()


def test_a_copied_block_begins_from_the_average_of_its_source():
    model, optimizer, average = run()
    go_on(model, optimizer, average)
    old = dict(zip((name for name, _ in model.named_parameters()), average.shadows, strict=True))
    ax.grow(model, EDIT, optimizer, average, probe=batch()[0])
    now = dict(zip((name for name, _ in model.named_parameters()), average.shadows, strict=True))
    assert all(now[name] is value for name, value in old.items())
    assert torch.equal(now["blocks.2.up.weight"], old["blocks.1.up.weight"])
    assert now["blocks.2.up.weight"] is not old["blocks.1.up.weight"] and not now["blocks.2.down.weight"].any()
    before = now["blocks.2.up.weight"].clone()
    go_on(model, optimizer, average)
    assert not torch.equal(before, now["blocks.2.up.weight"])


@pytest.mark.parametrize("edit", [EDIT, ax.Widen("blocks.*.up", by=4), ax.After("stem")])
def test_shapes_are_those_of_the_network_and_undo_gives_all_back(edit):
    model, optimizer, average = run()
    go_on(model, optimizer, average)
    grower = ax.Grower(model, optimizer, average, edits=edit, when=ax.when.every(10**9), probe=batch()[0])
    before, held = picture(model, optimizer), list(average.shadows)
    grower.grow(edit)
    assert [s.shape for s in average.shadows] == [p.shape for p in model.parameters()]
    assert [ref() for ref in average.refs] == list(model.parameters())
    ax.verify(model, optimizer, average)
    grower.undo()
    assert_same(before, picture(model, optimizer))
    assert all(a is b for a, b in zip(average.shadows, held, strict=True))
    go_on(model, optimizer, average)


def test_old_entries_of_a_wider_layer_keep_their_average():
    model, optimizer, average = run()
    go_on(model, optimizer, average)
    place = [name for name, _ in model.named_parameters()].index("blocks.0.up.weight")
    old = average.shadows[place].clone()
    ax.grow(model, ax.Widen("blocks.*.up", by=4), optimizer, average, probe=batch()[0])
    assert torch.equal(average.shadows[place][: len(old)], old)


def test_saved_and_loaded(tmp_path):
    model, optimizer, average = run()
    options = {"edits": EDIT, "when": ax.when.every(10**9), "probe": batch()[0]}
    grower = ax.Grower(model, optimizer, average, **options)
    go_on(model, optimizer, average)
    grower.grow(EDIT)
    go_on(model, optimizer, average)
    ax.save(grower, tmp_path)
    fresh, other, shadows = run()
    ax.load(tmp_path, ax.Grower(fresh, other, shadows, **options))
    go_on(model, optimizer, average)
    go_on(fresh, other, shadows)
    assert all(map(torch.equal, average.shadows, shadows.shadows)) and shadows.updates == 6


def test_one_that_was_left_behind_is_found():
    model, optimizer, average = run()
    ax.grow(model, EDIT, optimizer, probe=batch()[0])
    for call in (ax.verify, lambda *all: ax.grow(*all[:1], EDIT, *all[1:], probe=batch()[0])):
        with pytest.raises(ax.GrowthError, match=r"Shadows\.shadows holds 16 tensors, and not the shapes of the 22"):
            call(model, optimizer, average)
    average.shadows.clear()
    with pytest.raises(ax.GrowthError, match=r"Shadows holds no list of tensors"):
        ax.verify(model, optimizer, average)


def test_of_those_that_train_only():
    ax.follow(Shadows, like=KIND)
    model = Net()
    model.stem.requires_grad_(False)
    average = Shadows(p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    ax.grow(model, EDIT, optimizer, average, probe=batch()[0])
    assert [s.shape for s in average.shadows] == [p.shape for p in model.parameters() if p.requires_grad]


def test_like_a_text_that_nothing_follows():
    with pytest.raises(ax.GrowthError, match=r"like=no\.such:Average\): nothing follows no\.such:Average itself"):
        ax.follow(Shadows, like="no.such:Average")
