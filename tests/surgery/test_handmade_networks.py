"""The dynamic networks that people write by hand, with ready layers: 10 -> 20 -> 30 -> 40."""

import pytest
import torch
from growing import bits, ema_of
from torch import nn

import auxin as ax

torch.set_num_threads(1)


class Chain(nn.Module):
    """Layers in a Sequential."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 20))

    def add_layer(self, layer):
        self.layers.append(layer)

    def forward(self, x):
        return self.layers(x)


class Named(nn.Module):
    """Layers in a Sequential, added under names of their own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 20))
        self.count = 1

    def add_layer(self, layer):
        self.layers.add_module(f"layer_{self.count}", layer)
        self.count += 1

    def forward(self, x):
        return self.layers(x)


class Listed(nn.Module):
    """Layers in a ModuleList."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10, 20)])

    def add_layer(self, layer):
        self.layers.append(layer)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Keyed(nn.Module):
    """Layers in a ModuleDict, in the order of its values."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"first": nn.Linear(10, 20)})

    def add_layer(self, layer):
        self.add_named("next" if "next" not in self.layers else "last", layer)

    def add_named(self, name, layer):
        self.layers[name] = layer

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


class Conditional(nn.Module):
    """Layers that are None until they are set."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(10, 20)
        self.extra = None
        self.more = None

    def add_layer(self, layer):
        if self.extra is None:
            self.extra = layer
        else:
            self.more = layer

    def forward(self, x):
        x = self.first(x)
        if self.extra is not None:
            x = torch.relu(self.extra(x))
        if self.more is not None:
            x = self.more(x)
        return x


NETWORKS = [Chain, Named, Listed, Keyed, Conditional]
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
}


def inputs(seed=0):
    return torch.randn(8, 10, generator=torch.Generator().manual_seed(seed))


def steps(model, optimizer, scheduler=None, ema=None, count=2):
    for seed in range(count):
        optimizer.zero_grad()
        model(inputs(seed)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
            ema.update_parameters(model)
    optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_ready_layer_is_followed_by_everything(network, optimizer):
    torch.manual_seed(0)
    model = network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    ema = ema_of(model, 0.9)
    steps(model, optimizer, scheduler, ema)
    for width, layer in ((30, nn.Linear(20, 30)), (40, nn.Linear(30, 40))):
        old = {p: [bits(p), *({k: bits(v) for k, v in optimizer.state[p].items()}.items())] for p in model.parameters()}
        with ax.surgery(model, optimizer, scheduler, ema, probe=inputs()) as done:
            model.add_layer(layer)
        assert any(m is layer for m in model.modules()) and model(inputs()).shape == (8, width)
        now = {p: [bits(p), *({k: bits(v) for k, v in optimizer.state[p].items()}.items())] for p in old}
        assert now == old
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        assert [n for n, _ in ema.module.named_parameters()] == [n for n, _ in model.named_parameters()]
        assert torch.equal(ema.module(inputs())[:0], model(inputs())[:0]) and ema.module(inputs()).shape == (8, width)
        assert done.change.added_parameters == sum(p.numel() for p in layer.parameters())
        start = bits(layer.weight)
        steps(model, optimizer, scheduler, ema)
        assert bits(layer.weight) != start
    ax.verify(model, optimizer, scheduler, ema)


@pytest.mark.parametrize("network", NETWORKS)
def test_by_hand_the_layer_never_trains(network):
    torch.manual_seed(0)
    model = network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    layer = nn.Linear(20, 30)
    start = bits(layer.weight)
    model.add_layer(layer)
    steps(model, optimizer)
    assert layer.weight.grad is not None and bits(layer.weight) == start


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_with_surgery_is_saved_and_goes_on(network, tmp_path):
    def run():
        torch.manual_seed(0)
        model = network()
        optimizer = OPTIMIZERS["adam"](model.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        ema = ema_of(model, 0.9)
        grower = ax.Grower(
            model, optimizer, scheduler, ema, edits=lambda model: [], when=ax.when.every(10), probe=inputs()
        )
        return model, optimizer, scheduler, ema, grower

    model, optimizer, scheduler, ema, grower = run()
    steps(model, optimizer, scheduler, ema)
    for layer in (nn.Linear(20, 30), nn.Linear(30, 40)):
        with ax.surgery(model, optimizer, scheduler, ema) as done:
            model.add_layer(layer)
        grower.record(done.change)
        steps(model, optimizer, scheduler, ema)
    ax.save(grower, tmp_path)

    other = run()
    ax.load(tmp_path, other[4])
    for a, b in zip((model, ema.module), (other[0], other[3].module), strict=True):
        assert {k: bits(v) for k, v in a.state_dict().items()} == {k: bits(v) for k, v in b.state_dict().items()}
        assert list(a.state_dict()) == list(b.state_dict())
    steps(model, optimizer, scheduler, ema)
    steps(*other[:4])
    assert all(bits(a) == bits(b) for a, b in zip(model.parameters(), other[0].parameters(), strict=True))
    if network is Named:
        assert other[0].count == 3

    bare = network()
    ax.load(tmp_path, bare)
    assert bare(inputs()).shape == (8, 40)


def test_layers_that_do_not_fit_each_other_are_refused_and_taken_out_again():
    torch.manual_seed(0)
    model = Chain()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with (
        pytest.raises(ax.GrowthError, match=r"layers\.1: the grown network does not run on the probe.*8x20 and 25x30"),
        ax.surgery(model, optimizer, probe=inputs()),
    ):
        model.add_layer(nn.Linear(25, 30))
    assert len(model.layers) == 1 and len(optimizer.param_groups[0]["params"]) == 2


def test_a_layer_set_behind_an_attribute_that_forward_never_reads_is_refused():
    model = Conditional()
    with (
        pytest.raises(ax.GrowthError, match="unused: the network's forward never calls it"),
        ax.surgery(model, OPTIMIZERS["adam"](model.parameters()), probe=inputs()),
    ):
        model.unused = nn.Linear(20, 20)
    assert not hasattr(model, "unused")
