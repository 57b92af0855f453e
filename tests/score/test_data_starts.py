"""`Widen` and `After` with weights from data: what they bring, what they keep, what they refuse."""

import copy
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax


def data(n: int = 300) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(n, 12)
    return x, (x @ torch.randn(12, 5)).relu().argmax(1)


def trained(*between: nn.Module, hidden: int = 4) -> tuple[nn.Sequential, torch.optim.Optimizer, ax.Evidence]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, hidden), *between, nn.Linear(hidden, 5))
    x, y = data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer, on([(x[:100], y[:100]), (x[100:], y[100:])])


def on(batches: list[Any]) -> ax.Evidence:
    return ax.Evidence(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batches)


def widened(net: nn.Module, evidence: ax.Evidence | None, init: str, by: int = 3, **options: Any) -> Any:
    edit = ax.Widen(options.pop("at", "0"), by=by, init=init)
    return ax.grow(net, edit, *options.pop("companions", ()), probe=data()[0][:20], evidence=evidence, **options)


BETWEEN = {
    "relu": lambda: [nn.ReLU()],
    "tanh": lambda: [nn.Tanh()],
    "gelu": lambda: [nn.GELU()],
    "batch norm": lambda: [nn.BatchNorm1d(4), nn.ReLU()],
    "in place": lambda: [nn.ReLU(inplace=True)],
}


@pytest.mark.parametrize("name", BETWEEN)
def test_tiny_lowers_the_loss_at_once_and_says_by_how_much(name: str) -> None:
    net, optimizer, evidence = trained(*BETWEEN[name]())
    before, old = evidence.mean(net), net[0].weight.detach().clone()
    change = widened(net, evidence, "tiny", companions=[optimizer])
    after = evidence.mean(net)
    assert after < 0.95 * before
    assert torch.equal(net[0].weight[:4], old)
    told = re.search(r"loss on the evidence ([\d.]+) -> ([\d.]+) \(-\d+ %\), scale", str(change))
    assert told and abs(float(told[1]) - before) < 1e-3 and abs(float(told[2]) - after) < 1e-3
    assert not change.preserves
    F.cross_entropy(net(data()[0]), data()[1]).backward()
    optimizer.step()


def test_no_amplitude_twice_as_large_or_half_as_large_is_better() -> None:
    net, _, evidence = trained(nn.ReLU())
    widened(net, evidence, "tiny")
    best = evidence.mean(net)
    for scale in (0.5, 2.0):
        other = copy.deepcopy(net)
        with torch.no_grad():
            other[0].weight[4:] *= scale**0.5
            other[0].bias[4:] *= scale**0.5
            other[2].weight[:, 4:] *= scale**0.5
        assert evidence.mean(other) > best


def test_the_amplitude_is_judged_on_validation_batches_where_there_are_any() -> None:
    x, y = data()
    found = []
    for validation in (None, [(x[200:], y[200:])]):
        net, _, evidence = trained(nn.ReLU())
        given = ax.Evidence(evidence.loss, [(x[:40], y[:40])], validation=validation)
        before = given.validate(net)
        told = str(widened(net, given, "tiny"))
        assert f"loss on the evidence {before:.4g} -> {given.validate(net):.4g}" in told
        found.append(evidence.loss(net, (x[200:], y[200:])).item())
    assert found[1] < found[0]


def test_the_grid_extends() -> None:
    from auxin.edits.data_start import lowest

    for true in (2.0**-20, 2.0**17.5, 3.0):
        loss, gamma = lowest(lambda g, true=true: abs(math.log2(g / true)), before=20.0, gain=0.0)
        assert loss < 0.5 and 0.7 < gamma / true < 1.42


@pytest.mark.parametrize("name", BETWEEN)
def test_gradmax_keeps_the_function_and_has_more_gradient_than_chance(name: str) -> None:
    net, _, evidence = trained(*BETWEEN[name]())
    net.eval()
    x, y = data()
    expected = net(x).detach()

    def gradient_of_new(grown: nn.Module) -> float:
        grown.zero_grad()
        F.cross_entropy(grown(x), y).backward()
        found = grown[-1].weight.grad[:, 4:].square().sum()
        grown.zero_grad()
        return float(found)

    by_chance = []
    length = net[0].weight.detach().norm(dim=1).mean()
    for seed in range(5):
        other = copy.deepcopy(net)
        widened(other, None, "zero", seed=seed)
        with torch.no_grad():
            other[0].weight[4:] *= length / other[0].weight[4:].norm(dim=1, keepdim=True)
        by_chance.append(gradient_of_new(other))
    change = widened(net, evidence, "gradmax")
    assert change.preserves and torch.allclose(net(x), expected, atol=1e-5)
    assert gradient_of_new(net) > max(by_chance)
    rows = torch.cat([net[0].weight[4:], net[0].bias[4:, None]], 1).detach().double()
    cosine = F.normalize(rows) @ F.normalize(rows).T - torch.eye(3)
    assert cosine.abs().max() < 1e-6  # S4


# G2


@pytest.mark.parametrize("name", ["relu", "batch norm"])
def test_incoming_zeros_are_refused_in_front_of_a_relu(name: str) -> None:
    net, _, evidence = trained(*BETWEEN[name]())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ax.GrowthError, match=r"derivative at 0 is 0.*init='gradmax' puts the zeros on the other side"):
        widened(net, evidence, "gradmax-in")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_without_that_guard_they_would_never_move() -> None:
    net, _, evidence = trained(nn.ReLU())
    widened(net, evidence, "gradmax")
    with torch.no_grad():
        net[0].weight[4:], net[0].bias[4:] = 0, 0
        net[2].weight[:, 4:] = torch.randn(5, 3)
    x, y = data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert not net[0].weight[4:].any()


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_incoming_zeros_where_they_learn(name: str) -> None:
    net, _, evidence = trained(*BETWEEN[name]())
    change = widened(net, evidence, "gradmax-in")
    assert change.preserves and not net[0].weight[4:].any()
    columns = net[2].weight[:, 4:].detach()
    assert (F.normalize(columns.T) @ F.normalize(columns.T).T - torch.eye(3)).abs().max() < 1e-5
    old = net[2].weight[:, :4].detach().norm(dim=0).mean()
    assert torch.allclose(columns.norm(dim=0), 0.5 * old.expand(3), rtol=1e-4)


# Where


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(12, 8), "down": nn.Linear(8, 12), "norm": nn.LayerNorm(12)})
            for _ in range(2)
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](F.gelu(block["up"](block["norm"](x))))
        return self.head(x)


@pytest.mark.parametrize("init", ["tiny", "gradmax", "gradmax-in"])
def test_all_blocks_at_once(init: str) -> None:
    torch.manual_seed(0)
    net, evidence = Blocks(), on([data()])
    before = evidence.mean(net)
    widened(net, evidence, init, at="blocks.*.up")
    assert net.blocks[1]["up"].weight.shape == (11, 12) and net.blocks[0]["down"].weight.shape == (12, 11)
    assert evidence.mean(net) < before if init == "tiny" else abs(evidence.mean(net) - before) < 1e-5


@pytest.mark.parametrize("init", ["tiny", "gradmax"])
def test_convolutions(init: str) -> None:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2))
    net = nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
    x = torch.randn(100, 2, 8, 8)
    evidence = on([(x, x.mean((2, 3)).argmax(1))])
    before = evidence.mean(net)
    ax.grow(net, ax.Widen("0", by=5, init=init), probe=x[:10], evidence=evidence)
    assert net[3].weight.shape == (6, 9, 3, 3)
    assert evidence.mean(net) < before if init == "tiny" else abs(evidence.mean(net) - before) < 1e-5


def test_a_frozen_network_and_no_biases() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 4, bias=False), nn.Tanh(), nn.Linear(4, 5, bias=False)).requires_grad_(False)
    net[0].requires_grad_(True)
    evidence = on([data()])
    before = evidence.mean(net)
    widened(net, evidence, "tiny")
    assert evidence.mean(net) < before
    assert [p.requires_grad for p in net.parameters()] == [True, False]


def test_it_is_saved_undone_and_replayed_like_any_growth() -> None:
    net, optimizer, evidence = trained(nn.ReLU())
    before = copy.deepcopy(net.state_dict())
    edit = ax.Widen("0", by=3, init="tiny")
    grower = ax.Grower(net, optimizer, when=ax.when.every(100), edits=[edit], probe=data()[0], evidence=evidence)
    grower.grow(edit)
    grown = copy.deepcopy(net.state_dict())
    other = trained(nn.ReLU())[0]
    ax.replay(other, grower.journal)
    other.load_state_dict(grown)
    assert torch.equal(other(data()[0]), net(data()[0]))
    grower.undo()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


# Dead and alike


def test_new_units_that_say_nothing_are_named() -> None:
    class Deaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() * (torch.arange(x.shape[1]) != 5)

    net, evidence = nn.Sequential(nn.Linear(12, 4), Deaf(), nn.Linear(4, 5)), on([data()])
    with pytest.warns(UserWarning, match=r"on the evidence 0\[5\] say nothing"):
        widened(net, evidence, "gradmax")


def test_new_units_that_repeat_others_are_named() -> None:
    x, y = data()
    x = x[:, :1].repeat(1, 12)  # every unit says the same but for its bias
    net, evidence = nn.Sequential(nn.Linear(12, 2, bias=False), nn.Identity(), nn.Linear(2, 5)), on([(x, y)])
    with pytest.warns(UserWarning, match=r"0\[2\] say what another unit, or the bias, says"):
        widened(net, evidence, "gradmax", by=1)


def test_nothing_is_warned_of_where_nothing_is_wrong() -> None:
    net, _, evidence = trained(nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        widened(net, evidence, "tiny")


# Refused, and nothing has changed


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def bad(name: str) -> tuple[nn.Module, ax.Evidence | None, dict[str, Any], str]:
    net = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 5))
    x, y = data()
    return {
        "no evidence": (net, None, {}, r"looks at data: pass evidence=auxin.Evidence\(loss, batches\)"),
        "loss": (net, ax.Evidence(lambda m, b: m(b[0]).sum() * float("nan"), [(x, y)]), {}, "the loss is nan"),
        "too few": (net, on([(x[:2], y[:2])]), {"by": 3}, "k=3 new units between 0 and 2, but the data ask for 2"),
        "too many": (
            net,
            on([(x, y)]),
            {"by": 9},
            r"k=9 new units between 0 and 2, but the data ask for \d dir",
        ),
        "device": (
            net,
            on([(x.to("meta"), y.to("meta"))]),
            {},
            "tensors on meta, the network is on cpu: move it there",
        ),
        "gated": (Gated(), on([(x, y)]), {"at": "up"}, "gate.* make them and down reads them"),
        "nothing asked": (net, ax.Evidence(lambda m, b: m(b[0]).sum() * 0, [(x, y)]), {}, "ask for 0 directions"),
    }[name]


@pytest.mark.parametrize("init", ["tiny", "gradmax"])
@pytest.mark.parametrize("name", ["no evidence", "loss", "too few", "too many", "device", "gated", "nothing asked"])
def test_bad_input(name: str, init: str) -> None:
    net, evidence, options, message = bad(name)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ax.GrowthError, match=message):
        widened(net, evidence, init, **options)
    after = net.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


# Depth


@pytest.mark.parametrize("at", ["0", "1"])
def test_a_layer_behind_lowers_the_loss_at_once(at: str) -> None:
    net, optimizer, evidence = trained(nn.Tanh())
    before = evidence.mean(net)
    change = ax.grow(net, ax.After(at, init="tiny"), optimizer, probe=data()[0], evidence=evidence)
    assert evidence.mean(net) < before
    assert f"loss on the evidence {before:.4g} -> {evidence.mean(net):.4g}" in str(change)


def test_a_layer_behind_a_convolution() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    x = torch.randn(60, 2, 8, 8)
    evidence = on([(x, x.mean((2, 3)).argmax(1))])
    before = evidence.mean(net)
    ax.grow(net, ax.After("0", init="tiny"), probe=x, evidence=evidence)
    assert evidence.mean(net) < before


@pytest.mark.parametrize(
    ("options", "evidence", "message"),
    [
        ({"init": "gradmax"}, True, "has the whole gradient with P = 0 already"),
        ({"init": "tiny"}, False, "looks at data: pass evidence="),
        ({"init": "tiny", "layer": nn.Identity}, True, r"the layer x \+ P x that After\(at\) builds; leave layer out"),
    ],
)
def test_layers_that_are_refused(options: dict[str, Any], evidence: bool, message: str) -> None:
    net, _, given = trained(nn.Tanh())
    with pytest.raises(ax.GrowthError, match=message):
        ax.grow(net, ax.After("0", **options), probe=data()[0], evidence=given if evidence else None)
    assert len(net) == 3
