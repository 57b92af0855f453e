"""Moments of convolutions that go on by one place at a time, without patches: the same as from rows of patches."""

from typing import Any

import pytest
import torch
from torch import nn

from auxin.statistics import Proposal, lags
from auxin.statistics.moments import Sums, add_pair, pair_shapes
from auxin.statistics.rows import Geometry


def convolution(dims: int, *arguments: Any, **words: Any) -> nn.Module:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](*arguments, **words)


CASES = [
    (1, {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1}),
    (1, {"kernel_size": 3, "padding": 2}, {"kernel_size": 5, "bias": False}),
    (2, {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": 3, "bias": False}, {"kernel_size": (1, 3), "padding": (2, 0)}),
    (2, {"kernel_size": 1}, {"kernel_size": 2, "padding": 1}),
    (2, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, {"kernel_size": 3, "padding": 1}),
    (2, {"kernel_size": 2, "padding": 1}, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
    (3, {"kernel_size": 2, "padding": 1}, {"kernel_size": (3, 2, 1), "padding": (1, 0, 0)}),
]


@pytest.mark.parametrize("few", [0, lags.FEW])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("dims", "one", "other"), CASES)
def test_sums_are_those_of_patches(
    dims: int, one: dict[str, Any], other: dict[str, Any], alone: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(lags, "FEW", few)
    layers = convolution(dims, 2, 3, **one).double(), convolution(dims, 3, 4, **other).double()
    x = torch.randn(5, 2, *(4, 5, 3)[:dims]).double()
    h = layers[0](x).relu().detach()
    d = torch.randn_like(layers[1](h))
    producer, consumer = map(Geometry.of, layers)
    proposal = Proposal(torch.randn(producer.features, 2).double(), torch.tanh)
    for direct in (False, True):
        pair = (None, consumer) if alone else (producer, consumer)
        shapes = pair_shapes(*pair, None if alone else proposal, direct)
        found = []
        for slides in (True, False):
            monkeypatch.setattr(Geometry, "slides", slides)
            sums = Sums.zeros(shapes, x.device)
            add_pair(sums, pair, (None if alone else x, h, d), None if alone else proposal)
            found.append((sums.settle(), sums.rows))
        for name in shapes:
            torch.testing.assert_close(found[0][0][name], found[1][0][name], rtol=1e-11, atol=1e-11)
        assert found[0][1] == found[1][1]


def test_only_what_goes_on_by_one_place_slides() -> None:
    words = [{}, {"stride": 2}, {"dilation": 2}, {"stride": (1, 2)}]
    assert [Geometry.of(nn.Conv2d(2, 3, 3, **one)).slides for one in words] == [True, False, False, False]
    assert not Geometry.of(nn.Linear(2, 3)).slides


def test_no_patches_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing between layers of 3 x 3 is larger than what one of them reads, with its border."""
    sizes: list[int] = []
    monkeypatch.setattr(lags, "FEW", 100)

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else [out]) if isinstance(t, torch.Tensor))
            return out

    one, other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(16, 4, 9, 9)
    producer, consumer = Geometry.of(one), Geometry.of(other)
    sums = Sums.zeros(pair_shapes(producer, consumer, None, True), x.device)
    with Seen():
        add_pair(sums, (producer, consumer), (x, x, x), None)
    assert max(sizes) <= 16 * 4 * 13 * 13
