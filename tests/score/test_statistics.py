"""Moments by hooks are those of the rows, whatever a training step does around them, and hooks do not stay."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import auxin as ax

sys.path.append(str(Path(__file__).parents[1] / "ddp"))
from processes import on_ranks

from auxin.statistics import Pair, PairMoments, Site, measured, watch

PAIR = Pair("0", "2")
PLACES = [PAIR, Pair(None, "0"), Site("1")]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 6).double(), torch.randint(4, (n,))


def obvious(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The slow twin: all rows at once, gradients by autograd."""
    h = net[1](net[0](x)).detach()
    z = net[2](h).detach().requires_grad_()
    (G,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    X, H, D, N = F.pad(x, (0, 1), value=1.0), F.pad(h, (0, 1), value=1.0), -len(x) * G, len(x)
    pairs = {"S_X": (X, X), "S_H": (H, H), "S_XH": (X, H), "M": (X, D), "M_H": (H, D)}
    return {name: a.T @ b / N for name, (a, b) in pairs.items()}


def assert_same(moments: PairMoments, expected: dict[str, Tensor], rel: float = 1e-12) -> None:
    for name, value in expected.items():
        found = getattr(moments, name)
        assert (found - value).norm() <= rel * value.norm(), name


def hooks_in(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


def test_a_step_and_a_pass_give_the_moments_of_the_rows() -> None:
    net, (x, y) = network(), data()
    with watch(net, PLACES, quiet=True) as seen:
        F.cross_entropy(net(x), y).backward()
    assert_same(seen.moments(PAIR), obvious(net, x, y))
    evidence = ax.Evidence(lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x[:9], y[:9]), (x[9:], y[9:])])
    found = measured(net, evidence, PLACES, quiet=True)
    assert_same(found[PAIR], obvious(net, x, y))
    assert hooks_in(net) == 0
    for moments in (found, {place: seen.moments(place) for place in PLACES}):
        alone, site = moments[Pair(None, "0")], moments[Site("1")]
        assert alone.rank[1] == site.rows == 24 and alone.S_X is None
        assert torch.allclose(-alone.M_H[:-1].T, net[0].weight.grad, rtol=1e-12)
        assert torch.allclose(site.S, found[PAIR].S_H[:-1, :-1], rtol=1e-12)


def test_gradients_that_are_accumulated() -> None:
    net, (x, y) = network(), data()
    with watch(net, PLACES, loss_scale=1 / 3, quiet=True) as seen:
        for part in range(3):
            rows = slice(8 * part, 8 * part + 8)
            (F.cross_entropy(net(x[rows]), y[rows]) / 3).backward()
    assert seen.moments(PAIR).samples == 24
    assert_same(seen.moments(PAIR), obvious(net, x, y))


def test_a_scaled_loss_and_steps_that_overflow() -> None:
    net, (x, y) = network(), data()
    scale = 1024.0
    with watch(net, PLACES, loss_scale=lambda: scale, quiet=True) as seen:
        (F.cross_entropy(net(x), y) * scale).backward()
        (F.cross_entropy(net(x), y) * float("inf")).backward()
    assert seen.skipped == 2 + 1
    assert_same(seen.moments(PAIR), obvious(net, x, y))


def test_under_autocast() -> None:
    net, (x, y) = network().float(), data()
    with watch(net, PLACES, quiet=True) as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        F.cross_entropy(net(x.float()), y).backward()
    assert_same(seen.moments(PAIR), {k: v for k, v in obvious(net.double(), x, y).items()}, rel=0.03)
    S_X = seen.moments(PAIR).S_X
    assert S_X.dtype == torch.float64 and (S_X - obvious(net, x, y)["S_X"]).norm() < 1e-5  # not rounded to bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpoints(reentrant: bool) -> None:
    net, (x, y) = network(), data()
    x.requires_grad_()
    with watch(net, PLACES, quiet=True) as seen:
        for _ in range(3):
            F.cross_entropy(checkpoint(net, x, use_reentrant=reentrant), y).backward()
    assert seen.moments(PAIR).samples == 72
    assert_same(seen.moments(PAIR), obvious(net, x.detach(), y))


def test_shared_weights_are_summed_over_calls() -> None:
    net, (x, y) = network(), data()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net(x.flip(1) / 2)

    model = Twice()
    pair = Pair("net.0", "net.2")
    with watch(model, [pair], quiet=True) as seen:
        F.cross_entropy(model(x), y).backward()
    found = seen.moments(pair)
    assert found.samples == len(x)
    assert torch.allclose(-found.M_H[:-1].T, net[2].weight.grad, rtol=1e-12)


def test_two_forwards_before_one_backward_are_one_step() -> None:
    net, (x, y) = network(), data()
    with watch(net, [PAIR], quiet=True) as seen:
        F.cross_entropy(net(x) + net(x / 2), y).backward()
    assert seen.moments(PAIR).samples == len(x)
    assert torch.allclose(-seen.moments(PAIR).M_H[:-1].T, net[2].weight.grad, rtol=1e-12)


def test_the_run_goes_on_as_without() -> None:
    x, y = data()
    kept = []
    for watched in (False, True):
        net = nn.Sequential(*network(), nn.Dropout(0.5))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        torch.manual_seed(5)
        with watch(net, PLACES if watched else [PAIR], quiet=True, every=1 if watched else 1000) as seen:
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                net.eval()
                with torch.no_grad():
                    net(x)
                net.train()
        assert seen.moments(PAIR).samples == (24 * 5 if watched else 24)
        kept.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize(("every", "steps"), [(1, 10), (3, 4), ((2, 5), 4), ((1, 10), 1)])
def test_a_duty_cycle(every: Any, steps: int) -> None:
    net, (x, y) = network(), data()
    with watch(net, [PAIR], every=every, quiet=True) as seen:
        for _ in range(10):
            F.cross_entropy(net(x), y).backward()
    assert seen.moments(PAIR).samples == 24 * steps


def test_memory_is_told_before_and_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    net = network()
    with watch(net, [PAIR]) as seen:
        pass
    expected = 8 * (7 * 7 + 6 * 6 + 7 * 6 + 7 * 4 + 6 * 4)
    assert seen.memory == expected
    assert "statistics at 1 places, every step: 2 KiB of sums" in capsys.readouterr().out
    with pytest.raises(ax.GrowthError, match=rf"the sums would take 2 KiB.*limit={expected} \(bytes\)"):
        watch(net, [PAIR], limit=1000)


def test_rows_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import auxin.statistics.moments as module

    net, (x, y) = network(), data()
    monkeypatch.setattr(module, "WORKSPACE", 1)
    with watch(net, [PAIR], quiet=True) as seen:
        F.cross_entropy(net(x), y).backward()
    assert_same(seen.moments(PAIR), obvious(net, x, y))


def test_sums_over_many_small_steps_are_as_exact_as_over_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import auxin.statistics.moments as module

    monkeypatch.setattr(module, "ROWS", 50)
    net, (x, y) = network().float(), data(240)
    with watch(net, [PAIR], quiet=True) as seen:
        for part in range(20):  # the last rows have not come to 50 again
            rows = slice(12 * part, 12 * part + 12)
            F.cross_entropy(net(x[rows].float()), y[rows]).backward()
    assert seen.moments(PAIR).samples == 240
    assert_same(seen.moments(PAIR), obvious(net.double(), x, y), rel=1e-6)
    assert_same(seen.moments(PAIR), obvious(net.double(), x, y), rel=1e-6)  # asking changes nothing


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"),
    [(3, 1, 1, 1), (3, 2, 1, 0), (2, 3, 2, 1), (3, 1, 12, 12), (3, 2, 9, 9)],  # the last two reach beyond the input
)
def test_what_places_of_a_kernel_see_is_what_autograd_says(
    kernel: int, stride: int, dilation: int, padding: int
) -> None:
    from auxin.statistics.rows import Geometry

    h = torch.randn(2, 3, 7, 8, requires_grad=True)
    layer = nn.Conv2d(3, 3, kernel, stride, padding, dilation)
    made = torch.randn_like(layer(h))
    found = Geometry.of(layer).brought_back(made.movedim(1, -1), (7, 8))
    for place in range(kernel**2):
        weight = torch.zeros(3, 1, kernel**2).index_fill_(2, torch.tensor([place]), 1).view(3, 1, kernel, kernel)
        z = F.conv2d(h, weight, None, stride, padding, dilation, groups=3)
        (expected,) = torch.autograd.grad(z, h, made)
        assert torch.equal(found[:, :, place], expected.flatten(2).transpose(1, 2))


def test_hooks_are_gone_whatever_is_raised() -> None:
    net = network()
    with pytest.raises(ZeroDivisionError), watch(net, PLACES, quiet=True):
        assert hooks_in(net) > 0
        raise ZeroDivisionError
    assert hooks_in(net) == 0


def test_what_goes_wrong_in_a_hook_does_not_fail_the_step() -> None:
    class WritesOver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)
            self.second.weight.requires_grad_(False)  # so that torch does not need what it reads

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            out = self.second(h)
            h.add_(1)
            return out

    model, pair = WritesOver(), Pair(None, "second")
    with watch(model, [pair], quiet=True) as seen:
        model(torch.randn(8, 6)).sum().backward()
    assert model.first.weight.grad is not None
    with pytest.raises(ax.GrowthError, match="written over before the backward pass"):
        seen.moments(pair)


# What is refused


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv, self.head, self.builtin = nn.Conv1d(4, 4, 1), nn.Linear(4, 2), nn.MultiheadAttention(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.transpose(1, 2) / 8).softmax(-1)
        x = self.out(weights @ self.v(x))
        x = self.conv(x.transpose(1, 2)).mean(2)
        return self.builtin(*[self.head(x) @ self.head.weight] * 3)[0]


def refused(message: str, places: list[Any], run: bool = True) -> None:
    model = Attention()
    with pytest.raises(ax.GrowthError, match=message):
        with watch(model, places, quiet=True) as seen:
            if run:
                model(torch.randn(3, 5, 4)).square().sum().backward()
        for place in places:
            found = seen.moments(place)
            if isinstance(found, PairMoments) and found.M is not None:
                ax.score.tiny(found, 1)
    assert hooks_in(model) == 0


@pytest.mark.parametrize(
    ("message", "places"),
    [
        ("has no child 'nothing'", [Pair("v", "nothing")]),
        ("never called as a module", [Pair(None, "builtin.out_proj")]),
        ("builtin is a MultiheadAttention; pairs are made of nn.Linear", [Pair(None, "builtin")]),
        ("do not walk over the same axes", [Pair("out", "conv")]),
        ("head makes 2 channels and v reads 4", [Pair("head", "v")]),
        (r"hidden units mix with other places.*Pair\(None, 'out'\)", [Pair("v", "out")]),
        ("was called before, or more often than, the producer", [Pair("out", "v")]),
        ("rows of one are not rows of the other", [Pair("v", "head")]),
        ("is no place", ["v"]),
        ("there is no place", []),
        ("returns no floating tensor", [Site("builtin")]),
    ],
)
def test_places_that_do_not_fit(message: str, places: list[Any]) -> None:
    refused(message, places)


def test_no_backward() -> None:
    model = Attention()
    with watch(model, [Pair(None, "v")], quiet=True) as seen:
        model(torch.randn(3, 5, 4))
    with pytest.raises(ax.GrowthError, match="no gradient has come back: call backward"):
        seen.moments(Pair(None, "v"))


def test_compiled_modules_are_refused_by_name() -> None:
    net = network()
    net[2].compile(backend="eager")
    with pytest.raises(ax.GrowthError, match="2 stands in a compiled Linear"):
        watch(net, [PAIR])
    with pytest.raises(ax.GrowthError, match="stands in a compiled OptimizedModule"):
        watch(torch.compile(network(), backend="eager"), [PAIR])


@pytest.mark.parametrize("every", [0, -1, (3, 2), (0, 2), 1.5, True])
def test_duty_cycles_that_do_not_fit(every: Any) -> None:
    with pytest.raises(ax.GrowthError, match="every="):
        watch(network(), [PAIR], every=every)


def losses() -> dict[str, tuple[Callable[..., Any], str]]:
    return {
        "nan": (lambda m, b: m(b[0]).sum() * float("nan"), "batch 0: the loss is nan"),
        "many": (lambda m, b: m(b[0]), "the loss is a tensor of shape"),
        "float": (lambda m, b: 1.0, "the loss is a float"),
        "flat": (lambda m, b: m(b[0]).detach().sum(), "the loss has no gradient"),
        "fails": (lambda m, b: m(b[1]), "batch 0: the loss failed"),
    }


@pytest.mark.parametrize("name", losses())
def test_a_loss_that_is_none(name: str) -> None:
    loss, message = losses()[name]
    net = network()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    with pytest.raises(ax.GrowthError, match=message):
        measured(net, ax.Evidence(loss, [data()]), [PAIR], quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert hooks_in(net) == 0 and modes == [m.training for m in net.modules()]
    assert all(p.grad is None for p in net.parameters())


def test_evidence_on_another_device() -> None:
    x, y = data()
    evidence = ax.Evidence(lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x.to("meta"), y.to("meta"))])
    with pytest.raises(ax.GrowthError, match="tensors on meta, the network is on cpu: move it"):
        measured(network(), evidence, [PAIR], quiet=True)


def test_more_units_than_the_data_ask_for() -> None:
    net, (x, y) = network(), data()
    evidence = ax.Evidence(lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x[:2], y[:2])])
    found = measured(net, evidence, [PAIR], quiet=True)[PAIR]
    for call in (ax.score.tiny, ax.score.gradmax):
        with pytest.raises(ax.GrowthError, match=r"k=4 new units between 0 and 2.*2 samples"):
            call(found, 4)
    with pytest.raises(ax.GrowthError, match="pass how many new units"):
        ax.score.tiny(found, 0)


# Several processes


def test_ranks_add_up() -> None:
    on_ranks(2, each_rank)


def each_rank(rank: int) -> None:
    net, (x, y) = network(), data()
    wrapped = nn.parallel.DistributedDataParallel(net)
    mine = slice(0, 10) if rank == 0 else slice(10, 24)
    with watch(wrapped, PLACES, quiet=True) as seen:
        F.cross_entropy(wrapped(x[mine]), y[mine]).backward()
    seen.reduce()
    assert seen.moments(PAIR).samples == 24
    assert_same(seen.moments(PAIR), obvious(net, x, y))
    assert seen.moments(Site("1")).rows == 24
