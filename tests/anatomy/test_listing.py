"""The fast walks over a network give what torch's own give."""

import pytest
from torch import nn

from auxin.listing import listing, modules_in, named_modules, named_parameters


def shared() -> nn.Module:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net = nn.Sequential(inner, nn.ModuleDict({"again": inner, "own": nn.BatchNorm1d(2)}), inner[1])
    net.register_module("none", None)
    net[1]["own"].weight = inner[0].bias
    return net


def circle() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    net[1].above = net[0]
    net[0].below = net[1]
    return net


NETWORKS = {
    "shared": shared,
    "circle": circle,
    "alone": lambda: nn.Linear(2, 2),
    "empty": nn.ModuleList,
    "nested": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 4), 2),
    "deep": lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()), nn.Tanh()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_their_order_are_torchs(name: str) -> None:
    net = NETWORKS[name]()
    assert list(named_modules(net).items()) == list(net.named_modules())
    assert list(map(id, sorted(modules_in(net), key=id))) == sorted(map(id, net.modules()))
    found = listing(net)
    for ours, theirs in (
        (named_parameters(net), net.named_parameters()),
        (found.parameters, net.named_parameters()),
        (found.buffers, net.named_buffers()),
    ):
        assert [(n, id(t)) for n, t in ours.items()] == [(n, id(t)) for n, t in theirs]
