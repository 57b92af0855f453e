"""Units of ``init="tiny"`` in front of a BatchNorm do in train mode what they were chosen for in eval mode."""

import pytest
import torch
from torch import Tensor, nn

import auxin as ax


def network(affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=affine), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for _ in range(8):
            net(data())  # running statistics that are not 0 and 1
        if affine:
            net[1].weight.mul_(2)
    return net


def data() -> Tensor:
    return 3 * torch.rand(64, 5, generator=torch.Generator().manual_seed(0)) - 1


def grown(net: nn.Sequential, *companions: object, rows: int = 64) -> ax.Change:
    evidence = ax.Evidence(lambda m, b: (m(b) - b[:, :2].abs()).square().mean(), [data()])
    return ax.grow(net, ax.Widen("0", by=2, init="tiny"), *companions, probe=data()[:rows], evidence=evidence)


@torch.no_grad()
def new_units(net: nn.Sequential, training: bool) -> Tensor:
    """What the norm returns of them."""
    return net[1].train(training)(net[0](data()))[:, 4:]


def test_new_units_are_the_same_in_both_modes() -> None:
    net = network()
    change = grown(net)
    with torch.no_grad():
        rows = net[0](data())[:, 4:]
    torch.testing.assert_close(net[1].running_mean[4:], rows.mean(0))
    torch.testing.assert_close(net[1].running_var[4:], rows.var(0))
    kept = new_units(net, training=False)
    torch.testing.assert_close(kept, 2 * rows / (1 + net[1].eps) ** 0.5)  # as with statistics of 0 and 1
    torch.testing.assert_close(new_units(net, training=True), kept, rtol=0.02, atol=0.02)  # n / (n - 1) of the variance
    assert "train mode" not in str(change)


def test_an_average_takes_them_over() -> None:
    net = network()
    average = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    grown(net, average)
    for name in ("running_mean", "running_var", "weight", "bias"):
        assert torch.equal(getattr(average.module[1], name)[4:], getattr(net[1], name)[4:])
    assert not torch.equal(net[1].running_var[4:], torch.ones(2))


@pytest.mark.parametrize(
    ("affine", "rows", "why"),
    [(True, 15, "the probe has 15 values of a channel, where 16 would do"), (False, 64, "the norm has no gain and")],
)
def test_where_that_cannot_be_it_is_said(affine: bool, rows: int, why: str) -> None:
    net = network(affine)
    change = grown(net, rows=rows)
    assert torch.equal(net[1].running_mean[4:], torch.zeros(2)) and torch.equal(net[1].running_var[4:], torch.ones(2))
    assert why in str(change)
    assert "so in train mode new channels of 1 count for another amount at first" in str(change)
