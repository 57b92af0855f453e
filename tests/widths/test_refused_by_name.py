"""What does not grow, by the reason that is true of it; and what of the same networks does."""

import pytest
import torch
from test_layers_that_widen import off
from torch import nn
from torch.nn import functional as F

import auxin as ax

torch.set_num_threads(1)
IDS = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(1))
DRAW = torch.Generator().manual_seed(2)


class Fused(nn.Module):
    """Attention with one projection for all three; ``normed``: queries and keys by norms over all heads."""

    def __init__(self, dim=12, normed=False):
        super().__init__()
        self.heads, self.norm, self.qkv, self.out = 3, nn.RMSNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.over = nn.ModuleList([nn.RMSNorm(dim), nn.RMSNorm(dim)]) if normed else [nn.Identity()] * 2

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.over[0](q), self.over[1](k), v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OneHead(nn.Module):
    """Attention without heads; ``scaled`` by a length that is the stream's."""

    def __init__(self, dim=12, scaled=True):
        super().__init__()
        self.norm, self.scaled = nn.LayerNorm(dim), scaled
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        scores = self.q(y) @ self.k(y).mT / (x.shape[-1] ** 0.5 if self.scaled else 4.0)
        return x + self.out(scores.softmax(-1) @ self.v(y))


class Text(nn.Module):
    def __init__(self, block, norm=nn.RMSNorm):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(20, 12), nn.Sequential(block, nn.Identity())
        self.norm, self.head = norm(12), nn.Linear(12, 20)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids))))


class Adaptive(nn.Module):
    """A block whose norm is shifted and scaled by a condition, and as in DiT what it adds gated."""

    def __init__(self, gated, dim=12):
        super().__init__()
        self.norm, self.gated = nn.LayerNorm(dim, elementwise_affine=False), gated
        self.up, self.down, self.ada = nn.Linear(dim, 16), nn.Linear(16, dim), nn.Linear(6, 3 * dim)

    def forward(self, x, c):
        shift, scale, gate = self.ada(F.silu(c)).unsqueeze(1).chunk(3, -1)
        y = self.down(F.gelu(self.up(self.norm(x) * (1 + scale) + shift)))
        return x + (gate * y if self.gated else y)


class Conditioned(nn.Module):
    def __init__(self, gated=True):
        super().__init__()
        self.inp, self.cond, self.block = nn.Linear(4, 12), nn.Linear(3, 6), Adaptive(gated)
        self.norm, self.out = nn.LayerNorm(12), nn.Linear(12, 2)

    def forward(self, x, c):
        return self.out(self.norm(self.block(self.inp(x), self.cond(c))))


PAIR = (
    torch.randn(2, 5, 4, dtype=torch.float64, generator=DRAW),
    torch.randn(2, 3, dtype=torch.float64, generator=DRAW),
)


def trained(net):
    torch.manual_seed(2)
    net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def grows(net, edit, probe):
    args = probe if isinstance(probe, tuple) else (probe,)
    before, optimizer = net(*args).detach(), torch.optim.Adam(net.parameters(), lr=1e-2)
    change = ax.grow(net, edit, optimizer, probe=probe)
    assert change.preserves and off(net(*args).detach(), before) < 1e-13
    for _ in range(3):
        optimizer.zero_grad()
        net(*args).square().mean().backward()
        optimizer.step()
    for part in change.parts:
        grad = net.get_parameter(part.name).grad
        assert (grad[part.mask] != 0).any(), part.name
    net.zero_grad()
    return net


CASES = {
    "queries and keys normed over all heads, in one projection": (
        lambda: Text(Fused(normed=True)),
        ax.Widen("blocks.0.qkv", by=1, unit="heads"),
        r"both factors of a product could only begin with zeros, since norms look at them, and would never learn",
    ),
    "both kinds of norms": (
        lambda: Text(OneHead(scaled=False)),
        ax.Widen("embed", by=3),
        r"blocks\.0\.norm subtracts a mean, which new entries must be then, and norm does not",
    ),
    "a scale by the length of the stream": (
        lambda: Text(OneHead(), nn.LayerNorm),
        ax.Widen("embed", by=3),
        r"forward computes a number from a length that grows \(\S+test_refused_by_name.py:\d+\)",
    ),
    "gates of a condition": (
        Conditioned,
        ax.Widen("inp", by=3),
        r"block multiplies two activations entry by entry \(\S+test_refused_by_name.py:\d+\), so that a new entry",
    ),
    "adaptive norms without gates": (
        lambda: Conditioned(gated=False),
        ax.Widen("inp", by=3),
        r"what block\.norm gives is multiplied by another activation, which does not follow",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reason_is_named_and_nothing_has_changed(case):
    build, edit, words = CASES[case]
    net = trained(build())
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(net, edit, probe=PAIR if isinstance(net, Conditioned) else IDS)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


class Together(nn.Module):
    """Attention whose weights have the axes that they are about, as those of XLNet."""

    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(dim, heads, 4)) for _ in range(4))

    def forward(self, x):
        q, k, v = (torch.einsum("bih,hnd->bind", self.norm(x), w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bind,bjnd->bnij", q, k).softmax(-1)
        return x + torch.einsum("bind,hnd->bih", torch.einsum("bnij,bjnd->bind", weights, v), self.o)


def test_heads_that_are_an_axis_of_the_weights():
    """What reads heads and their entries in one sum reads each of the two."""
    net = grows(trained(Text(Together())), ax.Widen("blocks.0", by=2), IDS)
    assert {w.shape for w in net.blocks[0].parameters(False)} == {(12, 5, 4)}


def test_heads_in_one_projection_that_is_chunked_get_larger():
    """Three parts that are always equally long: values grow with queries and keys."""
    net = grows(trained(Text(Fused())), ax.Widen("blocks.0.qkv", by=1, unit="head_dim"), IDS)
    assert net.blocks[0].qkv.weight.shape == (45, 12)
    grows(net, ax.Widen("blocks.0.qkv", by=1, unit="heads"), IDS)


def test_a_stream_beside_one_head():
    grows(trained(Text(OneHead(scaled=False), nn.LayerNorm)), ax.Widen("embed", by=3), IDS)


def test_all_but_the_stream_of_a_network_with_gates_grows():
    net = trained(Conditioned())
    grows(net, ax.Widen("block.up", by=3), PAIR)
    grows(net, ax.Widen("cond", by=3), PAIR)
    grows(net, ax.Widen("inp", to=24, init="tile"), PAIR)
