"""What the proof says of layers that this probe does not reach, and of a gradient that something multiplies by zero."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import auxin as ax
from auxin import GrowthError

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Routed(nn.Module):
    """Each row goes to the experts that the router gives the most."""

    def __init__(self, best: int = 1, count: int = 3):
        super().__init__()
        self.best, self.router = best, nn.Linear(8, count)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(self.best)
        y = x
        for number, expert in enumerate(self.experts):
            rows, rank = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                y = y.index_add(0, rows, weights[rows, rank, None] * expert(x[rows]))
        return y


class Balanced(Routed):
    """The router is biased by a buffer that no gradient moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("balance", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (self.router(x) + self.balance).argmax(-1)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            x = x.index_add(0, rows, expert(x[rows])) if len(rows) else x
        return x


def wider(old: nn.Linear, bias: float) -> nn.Linear:
    new = nn.Linear(8, old.out_features + 1)
    with torch.no_grad():
        new.weight[:-1], new.bias[:-1] = old.weight, old.bias
        new.weight[-1], new.bias[-1] = 0, bias
    return new


@pytest.mark.parametrize("best", [1, 2])
def test_an_expert_to_which_no_row_is_routed(best: int) -> None:
    torch.manual_seed(0)
    net = Routed(best)
    optimizer = torch.optim.AdamW(net.parameters())
    before = net(X)
    with ax.surgery(net, optimizer, probe=X) as done:
        net.experts.append(nn.Linear(8, 8))
        net.router = wider(net.router, -20.0)
    assert done.change is not None
    assert "no row of this probe is routed to experts.3, so its gradient was not checked" in done.change.notes
    torch.testing.assert_close(net(X), before)
    ax.verify(net, optimizer)


def test_a_bias_in_a_buffer_keeps_the_rows_away() -> None:
    torch.manual_seed(0)
    net = Balanced()
    with ax.surgery(net, torch.optim.AdamW(net.parameters()), probe=X) as done:
        net.experts.append(nn.Linear(8, 8))
        net.router = wider(net.router, 0.0)
        net.balance = torch.tensor([0.0, 0.0, 0.0, -20.0])
    assert "no row of this probe is routed to experts.3" in str(done.change)


def test_an_expert_that_rows_are_routed_to_is_checked() -> None:
    torch.manual_seed(0)
    net = Routed()
    with ax.surgery(net, torch.optim.AdamW(net.parameters()), probe=X) as done:
        net.experts.append(nn.Linear(8, 8))
        net.router = wider(net.router, 2.0)
    assert "routed" not in str(done.change)


@pytest.mark.parametrize("edit", [ax.Duplicate("experts", by=1), ax.Duplicate("experts", by=1, output="keep")])
def test_a_router_without_an_output_for_it_is_named(edit: Any) -> None:
    torch.manual_seed(0)
    net = Routed()
    leads = r"experts\.3: .*router\.weight \(3, 8\).*Widen\('router', to=6, unit='experts', init='tile'\) copies both"
    with pytest.raises(GrowthError, match=leads):
        ax.grow(net, edit, torch.optim.AdamW(net.parameters()), probe=X)


def test_a_cold_expert_beside_a_new_one() -> None:
    """No row goes to the last one either, so what arrives there is seen at another one."""
    torch.manual_seed(0)
    net = Routed(count=4)
    with torch.no_grad():
        net.router.weight[3], net.router.bias[3] = 0, -20.0
    with pytest.raises(GrowthError, match="does not take|arrives there"):
        ax.grow(net, ax.Insert("experts", Wrong, init="default"), torch.optim.AdamW(net.parameters()), probe=X)
    change = ax.grow(net, ax.Insert("experts", Expert, init="default"), torch.optim.AdamW(net.parameters()), probe=X)
    note = "no row of this probe is routed to experts.4 (nor to experts.3), so its gradient was not checked"
    assert note in change.notes


class Expert(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)


class Wrong(nn.Linear):
    def __init__(self):
        super().__init__(9, 9)


class ByName(nn.Module):
    """The batch says whose head is to run."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"en": nn.Linear(8, 2), "de": nn.Linear(8, 2)})

    def forward(self, x: Tensor, language: str) -> Tensor:
        return self.heads[language](self.body(x))


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_head_that_the_batch_does_not_name(by_hand: bool) -> None:
    torch.manual_seed(0)
    net = ByName()
    optimizer, probe = torch.optim.AdamW(net.parameters()), {"x": X, "language": "en"}
    note = "no row of this probe is routed to heads.fr (nor to heads.de), so its gradient was not checked"
    if by_hand:
        with ax.surgery(net, optimizer, probe=probe) as done:
            net.heads["fr"] = nn.Linear(8, 2)
        change = done.change
    else:
        change = ax.grow(net, ax.Insert("heads", Head, key="fr", init="default"), optimizer, probe=probe)
    assert change is not None
    assert note in change.notes
    assert net(X, "fr").shape == (32, 2)


class Head(nn.Linear):
    def __init__(self):
        super().__init__(8, 2)


class Dropped(nn.Module):
    """Stochastic depth: in training only, or always."""

    def __init__(self, always: bool):
        super().__init__()
        self.always, self.rng = always, random.Random(7)
        self.layers, self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if (self.training or self.always) and random.random() < 0.5:
                continue
            x = x + torch.tanh(layer(x))
        return self.out(x)


@pytest.mark.parametrize("always", [False, True])
def test_a_layer_that_is_dropped_at_times(always: bool) -> None:
    torch.manual_seed(0)
    for _ in range(5):
        net = Dropped(always)
        with ax.surgery(net, torch.optim.AdamW(net.parameters()), probe=X) as done:
            for _ in range(4):
                net.layers.append(nn.Linear(8, 8))
        assert ("routed" in str(done.change)) == always


class Stored(nn.Module):
    def __init__(self, way: str):
        super().__init__()
        self.way, self.depth = way, 2
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "slice":
            layers: Any = self.layers[: self.depth]
        elif self.way == "zip":
            layers = [layer for layer, _ in zip(self.layers, range(2))]  # noqa: B905
        else:
            layers = [self.layers[0], self.layers[1]]
        for layer in layers:
            x = x + torch.relu(layer(x))
        return x


@pytest.mark.parametrize("way", ["slice", "zip", "fixed"])
def test_what_no_data_leads_to_is_refused(way: str) -> None:
    torch.manual_seed(0)
    net = Stored(way)
    with pytest.raises(GrowthError, match=r"layers\.2: the network's forward never calls it"):
        with ax.surgery(net, torch.optim.AdamW(net.parameters()), probe=X):
            net.layers.append(nn.Linear(8, 8))
    assert len(net.layers) == 2


class Fading(nn.Module):
    """A branch that the user fades in; what multiplies it stands in different places."""

    def __init__(self, held: str):
        super().__init__()
        self.held, self.body = held, nn.Linear(8, 8)
        self.alpha, self.config, self.extra = 1.0, SimpleNamespace(alpha=0.0), nn.ModuleList()
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor, alpha: float = 0.0) -> Tensor:
        factors = {
            "attribute": self.alpha,
            "configuration": self.config.alpha,
            "buffer": self.gate,
            "argument": alpha,
            "mask": torch.zeros(8),
        }
        x = self.body(x)
        for layer in self.extra:
            x = x + factors[self.held] * torch.relu(layer(x))
        return x


@pytest.mark.parametrize("held", ["attribute", "configuration", "buffer", "argument", "mask"])
def test_a_fade_in_from_zero_is_noted(held: str) -> None:
    torch.manual_seed(0)
    net = Fading(held)
    optimizer = torch.optim.AdamW(net.parameters())
    before = net(X)
    with ax.surgery(net, optimizer, probe=(X, 0.0)) as done:
        net.extra.append(nn.Linear(8, 8))
        net.alpha = 0.0
    assert torch.equal(net(X), before)
    assert done.change is not None
    note = next(note for note in done.change.notes if "no gradient" in note)
    assert note == (
        "no gradient reaches extra.0.weight, extra.0.bias on this probe: something that is no parameter multiplies "
        "what they give by 0 now (alpha = 0)"
    )


def test_an_edit_under_a_fade_in_is_told_to_wait() -> None:
    torch.manual_seed(0)
    net = Fading("buffer")
    net.extra.append(nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(net.parameters())
    edit = ax.Insert("extra", Expert, init="default")
    with pytest.raises(GrowthError, match=r"multiplies what they give by 0 now.*Grow once it is no longer 0, or add"):
        ax.grow(net, edit, optimizer, probe=X)
    with ax.surgery(net, optimizer, probe=X):
        net.extra.append(Expert())
    net.gate.fill_(0.1)
    ax.grow(net, edit, optimizer, probe=X)
    assert len(net.extra) == 3


class Dead(nn.Module):
    """Ways in which a branch never learns, whatever the loop does."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.body, self.extra = way, nn.Linear(8, 8), nn.ModuleList()
        self.gain = nn.Parameter(torch.zeros(8), requires_grad=way == "both factors zero")

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        for layer in self.extra:
            y = layer(x)
            if self.way == "a ReLU at zero":
                x = x + functional.relu(y)
            elif self.way in ("both factors zero", "behind a frozen zero"):
                x = x + self.gain * y
            elif self.way == "detached":
                x = x + y.detach()
        return x


@pytest.mark.parametrize("way", ["a ReLU at zero", "both factors zero", "behind a frozen zero", "detached", "not used"])
def test_what_never_learns_is_refused(way: str) -> None:
    torch.manual_seed(0)
    net = Dead(way)
    with pytest.raises(GrowthError, match="they would never learn .*Begin with other values, or a residual block"):
        with ax.surgery(net, torch.optim.AdamW(net.parameters()), probe=X):
            layer = nn.Linear(8, 8)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            net.extra.append(layer)
            net.alpha = 0.0
    assert not net.extra
