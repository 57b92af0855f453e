"""Predicted over obtained, at a small step, in networks as they are written: printed, and within [0.95, 1.05]."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax
from auxin import score
from auxin.race import probed
from auxin.statistics import Pair, Proposal, Site, measured

STEP = 1e-5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(60, 8)


def conv(norm: bool) -> tuple[nn.Module, Tensor]:
    between = [nn.BatchNorm2d(5), nn.ReLU()] if norm else [nn.ReLU()]
    layers = [nn.Conv2d(2, 5, 3, padding=1), *between, nn.Conv2d(5, 4, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(60, 2, 7, 7)
    for _ in range(3):
        net(x)  # running statistics that are not 0 and 1
    return net, x


def attention() -> tuple[nn.Module, Tensor]:
    return Attention(), torch.randn(40, 5, 8)


MADE: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], str, str, Callable[[Tensor], Tensor]]] = {
    "Linear": (linear, "0", "2", torch.relu),
    "conv": (lambda: conv(False), "0", "2", torch.relu),
    "conv through BatchNorm": (lambda: conv(True), "0", "3", lambda z: torch.relu(z / (1 + 1e-5) ** 0.5)),
    "attention output": (attention, "", "out", F.gelu),
    "FFN": (attention, "up", "down", F.gelu),
}


@pytest.fixture(params=MADE)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, ax.Evidence, Pair, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    build, producer, consumer, activation = MADE[request.param]
    net, x = build()
    net, x = net.double().eval(), x.double()
    y = torch.randint(3, (len(x),))
    evidence = ax.Evidence(lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x, y)])
    return request.param, net, evidence, Pair(producer or None, consumer), activation


def told(name: str, what: str, predicted: float, before: float, after: float, scale: float = STEP) -> None:
    ratio = scale * predicted / (before - after)
    print(f"{name}, {what}: predicted / obtained {ratio:.4f}, {predicted:.3g} per unit")
    assert predicted > 0 and 0.95 <= ratio <= 1.05


def test_the_old_weights(case: tuple) -> None:
    name, net, evidence, pair, _ = case
    pair = Pair(None, pair.consumer)
    found = measured(net, evidence, [pair], quiet=True)[pair]
    update, d1 = score.best_update(found)
    layer, before = net.get_submodule(pair.consumer), evidence.mean(net)
    with torch.no_grad():
        layer.weight += STEP * update[:, :-1].reshape(layer.weight.shape)
        layer.bias += STEP * update[:, -1]
    told(name, "best update", d1, before, evidence.mean(net))


def test_new_units(case: tuple) -> None:
    name, net, evidence, pair, activation = case
    if pair.producer is None:
        pytest.skip("units mix in attention; see the best update, and the layer behind")
    found = measured(net, evidence, [pair], quiet=True)[pair]
    new = score.tiny(found, 2, joint=False)
    found = measured(net, evidence, [pair], proposals={pair: Proposal(new.A, activation)}, quiet=True)[pair]
    assert found.M_new is not None
    gains = score.gain(found.M_new, new.O)
    signs = torch.where(gains > 0, 1.0, -1.0).to(gains)
    before = evidence.mean(net)
    producer, consumer = net.get_submodule(pair.producer), net.get_submodule(pair.consumer)

    class Beside(nn.Module):
        """What the consumer reads does not hold the new units: they go around it."""

        def forward(self, output: Tensor) -> Tensor:
            made = producer._conv_forward if isinstance(producer, nn.Conv2d) else F.linear
            rows = new.A[:-1].T.reshape(2, *producer.weight.shape[1:])
            h = activation(made(read["x"], rows, new.A[-1]))
            if isinstance(consumer, nn.Conv2d):
                kernel = (new.O * signs).view(9, 4, 2).permute(1, 2, 0).reshape(4, 2, 3, 3)
                return output + STEP * consumer._conv_forward(h, kernel, None)
            return output + STEP * F.linear(h, new.O * signs)

    read: dict[str, Tensor] = {}
    producer.register_forward_pre_hook(lambda _, args: read.update(x=args[0]))
    consumer.register_forward_hook(lambda _, args, output: Beside()(output))
    told(name, "new units", float((gains * signs).sum()), before, evidence.mean(net))


@pytest.mark.parametrize("whitened", [False, True])
def test_an_inserted_layer(case: tuple, whitened: bool) -> None:
    name, net, evidence, pair, _ = case
    site = Site(pair.consumer)
    moments = measured(net, evidence, [site], quiet=True)[site]
    found = score.sensitivity(moments, whitened)
    before = evidence.mean(net)
    ax.grow(net, ax.After(pair.consumer), probe=evidence.batches[0][0])
    new = next(p for path, p in net.named_parameters() if p.shape == found.direction.shape and not p.any())
    with torch.no_grad():
        new += STEP * found.direction
    told(name, f"layer behind{', whitened' * whitened}", found.score, before, evidence.mean(net))


def test_an_inserted_block() -> None:
    """x + V s(U x), V = 0: the gain of the proposal U is the squared gradient of V."""
    torch.manual_seed(0)
    net, x = linear()
    net, x = net.double(), x.double()
    y = torch.randint(3, (len(x),))
    evidence = ax.Evidence(lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x, y)])
    moments = measured(net, evidence, [Site("1")], quiet=True)[Site("1")]
    U = torch.randn(6, 4).double()
    h = net[1](net[0](x)).detach()
    z = h.clone().requires_grad_()
    (G,) = torch.autograd.grad(F.cross_entropy(net[2](z), y), z)
    M_new = torch.tanh(h @ U).T @ (-len(x) * G) / len(x)
    V = M_new.T
    after = float(F.cross_entropy(net[2](h + STEP * torch.tanh(h @ U) @ V.T), y).detach())
    told("inserted block", "V", float(score.gain(M_new, V).sum()), evidence.mean(net), after)
    assert moments.samples == len(x)


class Curved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5).double(), nn.Linear(5, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_what_by_gain_says_a_small_step_takes_off_validation_data(optimizer: type[torch.optim.Optimizer]) -> None:
    """The step is taken in train mode, through a batch's norm, and judged in eval mode."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3)]
    net = nn.Sequential(*layers).double()
    x, y = torch.randn(200, 8).double() * 2 + 1, torch.randint(3, (200,))
    evidence = ax.Evidence(
        lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x[:100], y[:100])], validation=[(x[100:], y[100:])]
    )
    steps, edit = optimizer(net.parameters(), lr=STEP), ax.Insert("", Curved, index=3)
    grower = ax.Grower(net, steps, edits=edit, when=ax.when.every(9), probe=x, evidence=evidence)
    look = probed(grower, edit, 8)
    with grower.trial(edit):
        before = evidence.validate(net)
        stood = copy.deepcopy(net.state_dict())
        gradients = torch.autograd.grad(evidence.loss(net.train(), evidence.batches[0]), [*net[3].parameters()])
        net.load_state_dict(stood)  # running statistics
        with torch.no_grad():
            for p, gradient in zip(net[3].parameters(), gradients, strict=True):
                p -= STEP * (gradient.sign() if optimizer is torch.optim.AdamW else gradient)
        told(optimizer.__name__, "by_gain", look.gain, before, evidence.validate(net), scale=1.0)
