"""Outputs that are no numbers any more after a growth are no proof of anything."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import auxin as ax
from auxin.anatomy.rounding import distance

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
NAN, INF = math.nan, math.inf


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def run() -> tuple[nn.Sequential, torch.optim.Optimizer, AveragedModel]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 2))
    return net, torch.optim.Adam(net.parameters()), AveragedModel(net)


def overflown(module: nn.Module, site: ax.init.InitSite) -> None:
    with torch.no_grad():
        next(module.parameters())[-1].fill_(NAN)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, 2.0], [1.0, NAN], INF),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([NAN, 2.0], [NAN, 2.5], 0.5),
        ([INF, 2.0], [-INF, 2.0], INF),
        ([INF, NAN, 2.0], [INF, NAN, 2.0], 0.0),
        ([INF, 2.0], [NAN, 2.0], INF),
        ([complex(NAN, 1), 2.0], [complex(NAN, 1), 2.5], 0.5),
        ([complex(1, 1), 2.0], [complex(NAN, 1), 2.5], INF),
        ([], [], 0.0),
    ],
)
def test_the_distance_of_outputs_that_are_no_numbers(before: list[float], after: list[float], expected: float) -> None:
    assert distance([torch.ones(3), torch.tensor(before)], [torch.ones(3), torch.tensor(after)]) == expected


EDITS = [ax.Insert("1", Block, init=overflown), ax.Replace("1.0", functools.partial(nn.Linear, 4, 4), init=overflown)]


@pytest.mark.parametrize("edit", EDITS)
def test_new_weights_that_make_the_outputs_no_numbers(edit: ax.Edit) -> None:
    net, optimizer, _ = run()
    before = net(X)
    with pytest.raises(
        ax.GrowthError, match=r"12 of the 12 numbers .* would be NaN on the probe.*no network trains on"
    ):
        ax.grow(net, edit, optimizer, probe=X)
    assert torch.equal(net(X), before)


def test_what_was_no_number_before_may_stay() -> None:
    net, optimizer, _ = run()
    with torch.no_grad():
        net[2].weight[0] = NAN  # type: ignore[index]
    for edit in (ax.Insert("1", Block), ax.Replace("1.0", Block)):
        ax.grow(net, edit, optimizer, probe=X)


ON_FINITE = {
    "Duplicate": ax.Duplicate("1"),
    "a fade": ax.Duplicate("1", fade=5),
    "Insert": ax.Insert("1", Block),
    "After": ax.After("0"),
    "Repeat": ax.Repeat("1", fade=3),
}


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ON_FINITE)
def test_a_probe_that_is_not_finite_is_named_as_the_reason(name: str, value: float) -> None:
    net, optimizer, _ = run()
    probe = X.clone()
    probe[2, 1] = value
    with pytest.raises(
        ax.GrowthError, match=r"the probe holds 1 number that is not finite, and the network returns \d+ on it"
    ):
        ax.grow(net, ON_FINITE[name], optimizer, probe=probe)
    with pytest.raises(ax.GrowthError, match=r"no finite number on it.*the probe holds 24 numbers that are not finite"):
        ax.grow(net, ON_FINITE[name], optimizer, probe=torch.full_like(X, NAN))


def test_another_reason_stays_where_a_network_takes_numbers_that_are_not_finite() -> None:
    """A mask of minus infinities is none of them."""

    class Filled(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.nan_to_num(0.0, 0.0, 0.0))

    net = Filled(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)))
    probe = X.clone()
    probe[2, 1] = -INF
    with pytest.raises(ax.GrowthError) as info:
        ax.grow(net, ax.Duplicate("1", by=1), torch.optim.Adam(net.parameters()), probe=probe)
    assert "not finite" not in str(info.value)
