"""``Grower.freeze_old``: only what has grown trains; across growths, undo, trials, save and load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import auxin as ax
from auxin import GrowthError

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(7))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def run(edit: Any = None) -> tuple[nn.Sequential, torch.optim.Optimizer, ax.Grower]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    edit = edit or ax.Duplicate("", order=[0, 0, 1, 2])
    return model, optimizer, ax.Grower(model, optimizer, edits=edit, when=ax.when.at([99]), probe=X)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, set_to_none: bool = True) -> None:
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        (model(X) ** 2).mean().backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """First parts of the names of what has changed."""
    return {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_only_what_has_grown_trains_and_the_old_state_stands_still(set_to_none: bool) -> None:
    model, optimizer, grower = run()
    train(model, optimizer)
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    frozen = grower.freeze_old()
    old = {name for name, _ in model.named_parameters() if not name.startswith("1.")}
    assert set(frozen) == old == {name for name, p in model.named_parameters() if not p.requires_grad}
    before = values(model)
    state = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters() if name in old}
    train(model, optimizer, 5, set_to_none)
    assert moved(model, before) == {"1"}
    assert all(torch.equal(optimizer.state[model.get_parameter(n)]["exp_avg"], value) for n, value in state.items())
    grower.verify()


def test_it_can_be_taken_back_and_leaves_what_others_froze() -> None:
    model, optimizer, grower = run()
    model[2].up.weight.requires_grad_(False)
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    frozen = grower.freeze_old()
    assert "3.up.weight" not in frozen
    assert grower.freeze_old(False) == frozen
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["3.up.weight"]
    assert grower.freeze_old(False) == []
    before = values(model)
    train(model, optimizer)
    assert moved(model, before) == {"0", "1", "2", "3"}


def test_twice_freezes_nothing_more() -> None:
    _, _, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    first = grower.freeze_old()
    assert first and grower.freeze_old() == []
    assert grower.freeze_old(False) == first


def test_names_are_those_of_now() -> None:
    """A growth in front of the new block moves it; one that is removed is forgotten."""
    model, _, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 1, 1, 2]))
    block = model[2]
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2, 3]))
    assert model[3] is block
    grower.grow(ax.Remove("1"))
    assert model[2] is block
    grower.freeze_old()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"2"}


def test_the_last_one_removed_and_an_old_one_in_its_place() -> None:
    model, _, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 1, 1, 2]))
    grower.grow(ax.Remove("2"))
    with pytest.raises(GrowthError, match="no parameter of Sequential would be left to train, for nothing has grown"):
        grower.freeze_old()
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_has_grown() -> None:
    model, _, grower = run()
    with pytest.raises(GrowthError, match="for nothing has grown yet"):
        grower.freeze_old()
    assert all(p.requires_grad for p in model.parameters())


def test_a_bad_moment() -> None:
    model, _, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    (model(X) ** 2).mean().backward()
    with pytest.raises(GrowthError, match="gradient"):
        grower.freeze_old()
    assert all(p.requires_grad for p in model.parameters())


def test_blocks_that_grow_later_train_as_well() -> None:
    model, optimizer, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    grower.freeze_old()
    train(model, optimizer)
    grower.grow(ax.Duplicate("", order=[0, 1, 2, 3, 3]))  # a copy of a frozen block
    grower.verify()
    before = values(model)
    train(model, optimizer)
    assert moved(model, before) == {"1", "4"}
    assert {name.split(".")[0] for name in grower.freeze_old(False)} == {"0", "2", "3"}


def test_a_refused_growth_leaves_it_as_it_was() -> None:
    model, _, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    grower.freeze_old()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(GrowthError):
        grower.grow(ax.Duplicate("nowhere", by=1))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_undo_and_trial() -> None:
    model, optimizer, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    grower.freeze_old()
    train(model, optimizer)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with grower.trial(ax.Duplicate("", order=[0, 1, 2, 3, 3])):
        before = values(model)
        train(model, optimizer)
        assert moved(model, before) == {"1", "4"}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    grower.grow(ax.Duplicate("", order=[0, 1, 2, 3, 3]))
    grower.undo()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    before = values(model)
    train(model, optimizer)
    assert moved(model, before) == {"1"}


def test_undo_of_the_growth_before_it() -> None:
    """The run comes back as it was at that growth: nothing was frozen then."""
    model, _, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    grower.freeze_old()
    grower.undo()
    assert len(model) == 3 and all(p.requires_grad for p in model.parameters())
    assert grower.freeze_old(False) == []


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model, optimizer, grower = run()
    train(model, optimizer)
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    frozen = grower.freeze_old()
    train(model, optimizer)
    ax.save(grower, tmp_path)
    again, stepper, resumed = run()
    ax.load(tmp_path, resumed)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    for network, steps in ((model, optimizer), (again, stepper)):
        train(network, steps, 10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert resumed.freeze_old(False) == frozen
    assert all(p.requires_grad for p in again.parameters())


def test_it_is_in_the_state_dict() -> None:
    model, _, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    grower.freeze_old()
    again, _, resumed = run()
    resumed.load_state_dict(grower.state_dict())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_tensor_that_is_tied_to_an_old_one_is_old() -> None:
    model, _, grower = run()
    grower.grow(ax.Duplicate("", order=[0, 0, 1, 2]))
    with grower.surgery():
        model[1].up.weight = model[0].up.weight
    grower.freeze_old()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "1.up.bias",
        "1.down.weight",
        "1.down.bias",
    }


def test_a_state_of_before_has_none() -> None:
    _, _, grower = run()
    state = {name: value for name, value in grower.state_dict().items() if name != "frozen"}
    model, _, resumed = run()
    resumed.load_state_dict(state)
    assert all(p.requires_grad for p in model.parameters())
