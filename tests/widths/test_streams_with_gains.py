"""Residual streams under LayerNorm of networks that multiply what they add by gains that are trained (LayerScale)."""

import pytest
import torch
from test_layers_that_widen import off
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax

torch.set_num_threads(1)
X = torch.randn(8, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Scaled(nn.Module):
    """A block as in CaiT, BEiT or DINOv2."""

    def __init__(self, dim, shape=()):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 8), nn.Linear(8, dim)
        self.gamma = nn.Parameter(0.1 * torch.ones(*shape, dim))

    def forward(self, x):
        return x + self.gamma * self.down(torch.tanh(self.up(self.norm(x))))


class Twice(Scaled):
    """Two gains one after the other, one of them behind a dropout."""

    def __init__(self, dim):
        super().__init__(dim)
        self.scale, self.drop = nn.Parameter(torch.ones(dim)), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.gamma * self.down(torch.tanh(self.up(self.norm(x))))).mul(self.scale)


class Vit(nn.Module):
    def __init__(self, block=Scaled, dim=6):
        super().__init__()
        self.entry, self.position = nn.Linear(3, dim), nn.Parameter(torch.randn(1, 5, dim))
        self.blocks = nn.Sequential(block(dim), block(dim))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 2)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.entry(x) + self.position)).mean(1))


def trained(net, *others, steps=20):
    """As after some training: the gains are all different, and of both signs."""
    torch.manual_seed(2)
    net.double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("block", [Scaled, lambda dim: Scaled(dim, (1, 1)), Twice], ids=["vector", "3-d", "two"])
@pytest.mark.parametrize("by", [1, 3, 7])
def test_the_mean_is_weighted_by_the_gains(block, by):
    net = trained(Vit(block))
    before, optimizer = net(X).detach(), torch.optim.Adam(net.parameters(), lr=1e-2)
    change = ax.grow(net, ax.Widen("entry", by=by), optimizer, probe=X)
    assert change.preserves and off(net(X).detach(), before) < 1e-13
    for _ in range(3):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    for part in change.parts:
        if "norm" not in part.name:
            grad = net.get_parameter(part.name).grad
            assert (grad[part.mask] != 0).double().mean() > 0.5, part.name


def test_gains_of_zero_stay_so():
    net = trained(Vit())
    nn.init.zeros_(net.blocks[0].gamma)
    before = net(X).detach()
    ax.grow(net, ax.Widen("entry", by=2), probe=X)
    assert off(net(X).detach(), before) < 1e-13 and net.blocks[0].down.weight.isfinite().all()


def test_averages_weigh_by_their_own_gains():
    net = trained(Vit())
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    average.update_parameters(net)
    before, own = net(X).detach(), average(X).detach()
    assert off(before, own) > 1e-2
    ax.grow(net, ax.Widen("entry", by=3), torch.optim.Adam(net.parameters()), average, probe=X)
    assert off(net(X).detach(), before) < 1e-13 and off(average(X).detach(), own) < 1e-13


def test_a_journal_and_a_checkpoint_hold_the_gains(tmp_path):
    def grower(net):
        optimizer = torch.optim.Adam(net.parameters())
        return ax.Grower(net, optimizer, edits=lambda model: [], when=ax.when.every(10**9), probe=X)

    net = trained(Vit())
    run = grower(net)
    run.grow(ax.Widen("entry", by=3))
    ax.save(run, tmp_path / "run")
    again = Vit().double()
    ax.load(tmp_path / "run", grower(again))
    assert torch.equal(again.eval()(X), net(X))
    assert ax.replay(Vit(), run.journal).blocks[0].gamma.shape == (9,)


class Attending(nn.Module):
    """A block whose heads are as wide together as the stream, by the length that ``x.shape`` gives."""

    def __init__(self, dim, table=None):
        super().__init__()
        self.heads, self.norm, self.gamma = 2, nn.LayerNorm(dim), nn.Parameter(torch.ones(dim))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(2, 5, 5)) if table is None else None
        self.table = [table]  # of all blocks

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.table[0] is not None:
            sin, cos = self.table[0].chunk(2, -1)
            q, k = (t * cos + torch.stack([-t[..., 1::2], t[..., ::2]], -1).reshape(t.shape) * sin for t in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return x + self.gamma * self.proj(y.transpose(1, 2).reshape(B, N, C))


class Rotary(nn.Module):
    """Blocks that share one table of angles."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(5, 8))
        self.inner = Vit(lambda dim: Attending(dim, self.table), dim=8)

    def forward(self, x):
        for block in self.inner.blocks:
            block.table[0] = self.table
        return self.inner(x)


@pytest.mark.parametrize("build", [lambda: Vit(Attending, dim=8), Rotary], ids=["a bias for each head", "rotary"])
def test_a_stream_of_whole_heads(build):
    net = trained(build())
    before, at = net(X).detach(), next(n for n, _ in net.named_modules() if n.endswith("entry"))
    change = ax.grow(net, ax.Widen(at, by=4), torch.optim.SGD(net.parameters(), lr=0.1), probe=X)
    assert change.preserves and off(net(X).detach(), before) < 1e-13
    assert {block.heads for block in net.get_submodule(at.replace("entry", "blocks"))} == {3}


class Convolving(nn.Module):
    """As ConvNeXt: a depthwise convolution in front of the norm."""

    def __init__(self, dim):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(dim, dim, 3, padding=1, groups=dim), nn.LayerNorm(dim)
        self.mlp, self.gamma = nn.Linear(dim, dim), nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x + self.gamma * self.mlp(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class PostNorm(nn.Module):
    """As BERT: the norm is part of the stream."""

    def __init__(self, dim):
        super().__init__()
        self.mlp, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(x + self.mlp(x))


class OverPlaces(nn.Module):
    """As PoolFormer: one mean over channels and places."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.mlp = nn.GroupNorm(1, dim), nn.Conv1d(dim, dim, 1)

    def forward(self, x):
        x = x.transpose(1, 2)
        return (x + self.mlp(self.norm(x))).transpose(1, 2)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Convolving, r"blocks\.0\.conv convolves each entry by itself, so that a new entry cannot be the mean"),
        (PostNorm, r"what blocks\.0\.norm gives, with a gain for each entry, is added to something else"),
        (OverPlaces, r"blocks\.0\.norm takes one mean over entries and places"),
    ],
)
def test_where_no_new_entry_can_be_the_mean_of_the_others_the_layer_is_named(block, words):
    net = trained(Vit(block))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(ax.GrowthError, match=words + r".*Widen\('entry', to=12, init='tile'\) keeps the function"):
        ax.grow(net, ax.Widen("entry", by=2), probe=X)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    old = net(X).detach()
    ax.grow(net, ax.Widen("entry", to=12, init="tile"), probe=X)
    assert off(net(X).detach(), old) < 1e-13
