"""Networks that add what their blocks return, as in x + block(x): a new block returns zeros at first, not its input."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.anatomy.probe import PlanContext

torch.set_num_threads(1)
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """No residual of its own."""

    def __init__(self, dim=6):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 12), nn.Linear(12, dim)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Bounded(Branch):
    """Ends with an activation that is never zero for all inputs."""

    def forward(self, x):
        return torch.sigmoid(super().forward(x))


class Scaled(Branch):
    """A fixed basis behind the last weights: with the basis zero nothing would ever learn."""

    def __init__(self, dim=6):
        super().__init__(dim)
        self.basis = nn.Parameter(torch.eye(dim) + 0.1, requires_grad=False)

    def forward(self, x):
        return super().forward(x) @ self.basis


class Added(nn.Module):
    def __init__(self, block=Branch, depth=3):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(block() for _ in range(depth)), nn.Linear(6, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Subtracted(Added):
    def forward(self, x):
        for block in self.blocks:
            x = x - 0.5 * block(x)
        return self.head(x)


class Counted(Added):
    def __init__(self, block=Branch, depth=3):
        super().__init__(block, depth)
        self.n_layers = depth

    def forward(self, x):
        for i in range(self.n_layers):
            x = x + self.blocks[i](x)
        return self.head(x)


class Listed(Added):
    """Over a plain list beside the ModuleList."""

    def __init__(self, block=Branch, depth=3):
        super().__init__(block, depth)
        self.blocks_list = list(self.blocks)

    def forward(self, x):
        for block in self.blocks_list:
            x = x + block(x)
        return self.head(x)


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleDict({"a": Branch(), "b": Branch()}), nn.Linear(6, 1)

    def forward(self, x):
        for block in self.blocks.values():
            x = x + block(x)
        return self.head(x)


class Averaged(Added):
    """What each block adds becomes less when there are more."""

    def forward(self, x):
        return self.head(x + sum(block(x) for block in self.blocks) / len(self.blocks))


def ready(build, *args):
    torch.manual_seed(0)
    model = build(*args)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def step(model, optimizer):
    optimizer.zero_grad()
    (model(X) - X.sin().sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


EDITS = {
    "a copy": ax.Duplicate("blocks", by=1),
    "as many again": ax.Duplicate("blocks"),
    "a copy in front": ax.Duplicate("blocks", order=[0, 0, 1, 2]),
    "a new one": ax.Insert("blocks", Branch),
    "a new one in front": ax.Insert("blocks", Branch, index=0),
    "a fresh copy, no fade": ax.Duplicate("blocks", by=1, content="fresh", fade=0),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("build", [Added, Subtracted, Counted, Listed], ids=lambda b: b.__name__)
def test_the_function_stays_and_everything_new_learns(build, name):
    model, optimizer = ready(build)
    before = model(X)
    change = ax.grow(model, EDITS[name], optimizer, probe=X)
    assert torch.equal(model(X), before) and change.max_difference == 0 and not change.gates
    assert len(model.blocks) == (6 if name == "as many again" else 4)
    new = {
        n: p.detach().clone() for n, p in model.named_parameters() if any(n.startswith(at) for at, _ in change.added)
    }
    assert {n for n, p in new.items() if not p.any()} == set(change.writers)
    assert all(".down." in name for name in change.writers)
    step(model, optimizer)
    step(model, optimizer)
    now = dict(model.named_parameters())
    assert not [n for n, p in new.items() if torch.equal(p, now[n])]


@pytest.mark.parametrize("edit", [ax.Duplicate("blocks", by=1), ax.Insert("blocks", Branch)], ids=["copy", "new"])
def test_a_single_block(edit):
    model, optimizer = ready(Added, Branch, 1)
    before = model(X)
    ax.grow(model, edit, optimizer, probe=X)
    assert len(model.blocks) == 2 and torch.equal(model(X), before)


def test_under_a_key():
    model, optimizer = ready(Keyed)
    before = model(X)
    ax.grow(model, ax.Insert("blocks", Branch, key="c", before="b"), optimizer, probe=X)
    assert list(model.blocks) == ["a", "c", "b"] and torch.equal(model(X), before)


def test_a_fixed_basis_is_not_what_is_zeroed():
    model, optimizer = ready(Added, Scaled)
    before = model(X)
    change = ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=X)
    assert torch.equal(model(X), before) and change.writers == ("blocks.3.down.weight", "blocks.3.down.bias")
    assert torch.equal(model.blocks[3].basis, model.blocks[2].basis) and not model.blocks[3].basis.requires_grad


REFUSED = {
    "an activation at its end": (Added, Bounded, "the network adds what .* End it with a Linear"),
    "divided by the number of blocks": (Averaged, Branch, "the outputs changed by"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("new", [False, True], ids=["copy", "new"])
def test_refused_by_name_and_untouched(name, new):
    build, block, words = REFUSED[name]
    model, optimizer = ready(build, block)
    was, ids = copy.deepcopy(model.state_dict()), [id(m) for m in model.modules()]
    edit = ax.Insert("blocks", block) if new else ax.Duplicate("blocks", by=1)
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(model, edit, optimizer, probe=X)
    assert [id(m) for m in model.modules()] == ids
    assert all(torch.equal(t, was[n]) for n, t in model.state_dict().items())
    kept = dataclasses.replace(edit, **({"init": "default"} if new else {"output": "keep"}))
    assert ax.grow(model, kept, optimizer, probe=X).max_difference > 0


class PostNorm(nn.Module):
    """Its output is handed on, and no zeros make it return its input."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = Branch(), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(x + self.inner(x))


class HandedOn(Added):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_what_is_handed_on_fades_in_as_ever():
    model, optimizer = ready(HandedOn, PostNorm)
    before = model(X)
    change = ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=X)
    assert change.gates == ("blocks.3",) and torch.equal(model(X), before)


@dataclasses.dataclass(frozen=True)
class Given:
    """What a block returns."""

    y: torch.Tensor
    note: str = ""


class Noted(Branch):
    def forward(self, x):
        return Given(super().forward(x), note="x")


class InADict(Branch):
    def forward(self, x):
        return {"y": super().forward(x)}


class AddedFromInside(Added):
    def forward(self, x):
        for block in self.blocks:
            given = block(x)
            x = x + (given["y"] if isinstance(given, dict) else given.y)
        return self.head(x)


@pytest.mark.parametrize("block", [Noted, InADict], ids=lambda b: b.__name__)
@pytest.mark.parametrize("at", [0, 2])
def test_blocks_that_return_structures(block, at):
    model, optimizer = ready(AddedFromInside, block)
    before = model(X)
    change = ax.grow(model, ax.Duplicate("blocks", order=sorted([0, 1, 2, at])), optimizer, probe=X)
    assert torch.equal(model(X), before) and not change.gates


class Recurrent(Branch):
    """Returns a state besides, as for a cache."""

    def __init__(self):
        super().__init__()
        self.gate, self.mix = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        state = self.gate(x) * x.mean()
        return x + super().forward(self.mix(state)), state


class Stateful(Added):
    def __init__(self):
        super().__init__(Recurrent)

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


def test_what_nothing_uses_is_not_zeroed():
    model, _ = ready(Stateful)
    count = []
    model.register_forward_hook(lambda *_: count.append(1))
    change = ax.Duplicate("blocks", by=1).plan(model, PlanContext(model, X))
    assert [set(new.zeroed) for _, new in change.added] == [{"down.weight", "down.bias"}] and len(count) == 3


def test_a_head_that_is_zero_hides_what_holds_so_nothing_is_grown():
    """Zeros come out whatever the blocks do: that a block of zeros changes nothing would say nothing."""
    model, optimizer = ready(HandedOn, PostNorm)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ax.GrowthError, match="no gradient reaches the new weights"):
        ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=X)
    assert len(model.blocks) == 3


def test_two_forwards_are_enough_to_find_out():
    model, _ = ready(Added)
    count = []
    model.register_forward_hook(lambda *_: count.append(1))
    ax.Duplicate("blocks", by=1).plan(model, PlanContext(model, X))
    assert len(count) == 2


def test_an_average_and_a_journal_follow(tmp_path):
    model, optimizer = ready(Listed)
    average = torch.optim.swa_utils.AveragedModel(model)
    grower = ax.Grower(model, optimizer, average, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(1), probe=X)
    before = model(X)
    for _ in range(2):
        grower.step(1.0)
    assert torch.equal(average.module(X), before)
    step(model, optimizer)
    ax.save(grower, tmp_path)
    other = Listed()
    ax.load(tmp_path, other)
    assert len(other.blocks) == len(other.blocks_list) == 5 and torch.equal(other(X), model(X))
