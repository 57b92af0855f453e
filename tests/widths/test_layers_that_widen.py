"""Every kind of layer gets wider with all that shares its width: the function is kept to rounding in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax

torch.set_num_threads(1)


class Gated(nn.Module):
    """SwiGLU with fused gate and up projections, and an RMSNorm in front."""

    def __init__(self, d=8, hidden=12):
        super().__init__()
        self.norm, self.gate_up, self.down = nn.RMSNorm(d), nn.Linear(d, 2 * hidden), nn.Linear(hidden, d)

    def forward(self, x):
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Attention(nn.Module):
    """Fused projections, grouped queries, rotary embedding in halves."""

    def __init__(self, d=16, heads=4, groups=2, size=4):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.qkv, self.out = nn.Linear(d, (heads + 2 * groups) * size), nn.Linear(heads * size, d)

    def forward(self, x):
        b, t, _ = x.shape
        parts = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        q, k, v = self.qkv(x).split(parts, dim=-1)
        q = q.view(b, t, self.heads, self.size).transpose(1, 2)
        k, v = (y.view(b, t, self.groups, self.size).transpose(1, 2) for y in (k, v))
        angle = torch.arange(t, dtype=x.dtype)[:, None] * torch.ones(self.size, dtype=x.dtype)
        q, k = (y * angle.cos() + _turned(y) * angle.sin() for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.groups, dim=1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(b, t, self.heads * self.size))


def _turned(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


class Excited(nn.Module):
    """A residual block with a squeeze-and-excite branch and a depthwise convolution."""

    def __init__(self, c=8, hidden=12):
        super().__init__()
        self.up, self.n1 = nn.Conv2d(c, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.deep, self.n2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.GroupNorm(4, hidden)
        self.squeeze, self.excite = nn.Conv2d(hidden, 4, 1), nn.Conv2d(4, hidden, 1)
        self.down = nn.Conv2d(hidden, c, 1)

    def forward(self, x):
        y = self.n2(self.deep(F.relu(self.n1(self.up(x)))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.down(y)


class Concatenated(nn.Module):
    """Two branches concatenated, and one of them read once more."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 4), nn.Linear(6, 3), nn.Linear(7, 5), nn.Linear(4, 5)

    def forward(self, x):
        a = F.gelu(self.a(x))
        return self.c(torch.cat([self.b(x), a], -1)) + self.d(a)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, layers=2):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(11, 5), kind(5, 6, layers, batch_first=True), nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])


class Tied(nn.Module):
    """A small language model whose head is its embedding."""

    def __init__(self, norm=nn.LayerNorm, d=8):
        super().__init__()
        self.embed, self.blocks, self.norm = nn.Embedding(13, d), nn.ModuleList([Gated(d), Gated(d)]), norm(d)
        self.head = nn.Linear(d, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def flat():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )


def upsampled():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), nn.ConvTranspose2d(2, 4, 2), nn.Conv2d(4, 1, 1)
    )


def in_one_dimension():
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 1, groups=2), nn.ReLU(), nn.Conv1d(8, 2, 1))


IDS, IMAGE, ROWS = torch.randint(0, 11, (3, 7)), (2, 3, 8, 8), (4, 5, 8)
CASES = {
    "fused gate and up": (lambda: nn.Sequential(nn.Linear(8, 8), Gated(), nn.Linear(8, 2)), "1.gate_up", 8, ROWS),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3)), "0", 4, ROWS),
    "flattened convolution": (flat, "0", 2, IMAGE),
    "squeeze and excite": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Excited(), nn.Conv2d(8, 2, 1)), "1.up", 6, IMAGE),
    "excited unit": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Excited(), nn.Conv2d(8, 2, 1)), "1.squeeze", 2, IMAGE),
    "pixel shuffle": (upsampled, "0", 8, IMAGE),
    "transposed convolution": (upsampled, "2", 2, IMAGE),
    "grouped convolution": (in_one_dimension, "2", 4, (2, 3, 9)),
    "concatenation": (Concatenated, "a", 2, (4, 6)),
    "LSTM": (Recurrent, "rnn", 2, IDS),
    "GRU": (lambda: Recurrent(nn.GRU), "rnn", 2, IDS),
    "RNN": (lambda: Recurrent(nn.RNN, 1), "rnn", 4, IDS),
    "embedding": (Recurrent, "embed", 4, IDS),
    "a group of heads": (lambda: nn.Sequential(nn.Linear(8, 16), Attention(), nn.Linear(16, 2)), "1.qkv", 32, ROWS),
}


def ready(build, probe):
    torch.manual_seed(0)
    net = build().double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, b in net.named_buffers():
            if "running" in name:
                b.add_(0.2 * torch.rand_like(b))
    probe = torch.randn(*probe, dtype=torch.float64) if isinstance(probe, tuple) else probe
    return net, probe


def off(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("init", ["zero", "split", "pair"])
@pytest.mark.parametrize("case", CASES)
def test_the_function_is_kept(case, init):
    build, at, by, probe = CASES[case]
    net, probe = ready(build, probe)
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for _ in range(2):
        net(probe).square().mean().backward()
        opt.step()
        opt.zero_grad()
        ema.update_parameters(net)
    net.eval(), ema.eval()
    before, averaged = net(probe).detach(), ema(probe).detach()
    olds = {name: p for name, p in net.named_parameters()}
    change = ax.grow(net, ax.Widen(at, by=by, init=init), opt, ema, probe=probe)
    assert change.preserves and change.added_parameters > 0
    assert off(net(probe).detach(), before) < 1e-13 and off(ema(probe).detach(), averaged) < 1e-13
    assert all(p is olds[name] for name, p in net.named_parameters())
    for _ in range(3):
        net(probe).square().mean().backward()
        assert init == "zero" or all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        opt.step()
        opt.zero_grad()
        ema.update_parameters(net)
    ax.verify(net, opt, ema)


def test_attributes_say_the_new_sizes():
    net, probe = ready(*[CASES["squeeze and excite"][i] for i in (0, 3)])
    ax.grow(net, ax.Widen("1.up", by=6), probe=probe)
    block = net[1]
    assert (block.up.out_channels, block.deep.groups, block.deep.in_channels, block.n2.num_groups) == (18, 18, 18, 6)
    assert (block.n1.num_features, block.squeeze.in_channels, block.down.in_channels) == (18, 18, 18)
    net, probe = ready(*[CASES["a group of heads"][i] for i in (0, 3)])
    ax.grow(net, ax.Widen("1.qkv", by=16), probe=probe)
    assert (net[1].heads, net[1].groups, net[1].size) == (6, 3, 4)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_the_residual_stream_of_a_tied_language_model(norm, scale):
    """24 entries to 37, the embedding stays tied to the head; epsilons follow (without, the error is 1e-3 and more)."""
    torch.manual_seed(0)
    net = Tied(norm, 24).double()
    if norm is nn.LayerNorm:
        for block in net.blocks:
            block.norm = nn.LayerNorm(24).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        net.embed.weight.mul_(scale)
    ids = torch.randint(0, 13, (3, 7))
    before = net(ids).detach()
    change = ax.grow(net, ax.Widen("embed", to=37), probe=ids)
    assert change.preserves and off(net(ids).detach(), before) < 1e-13
    assert net.head.weight is net.embed.weight and net.embed.embedding_dim == 37 and net.head.in_features == 37
    (net(ids).logsumexp(-1).mean()).backward()
    assert net.embed.weight.grad[:, 24:].abs().max() > 0


def test_more_classes_only_where_the_output_may_get_wider():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    with pytest.raises(ax.GrowthError, match="outputs=True"):
        ax.grow(net, ax.Widen("2", by=2), probe=x)
    before = net(x).detach()
    ax.grow(net, ax.Widen("2", by=2, outputs=True), probe=x)
    assert net[2].out_features == 5 and torch.allclose(net(x)[:, :3], before, atol=1e-6)


def test_a_pattern_widens_all_blocks_alike():
    net, x = nn.Sequential(nn.Linear(8, 8), Gated(), Gated(), Gated()), torch.randn(4, 8)
    ax.grow(net, ax.Widen("*.gate_up", by=8), probe=x)
    assert [net[i].down.in_features for i in (1, 2, 3)] == [16, 16, 16]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda: ax.Widen("0"), "by= .* or to="),
        (lambda: ax.Widen("0", by=1, to=9), "one of them"),
        (lambda: ax.Widen("0", to=6), "6 wide already"),
        (lambda: ax.Widen("0", to=3), "6 wide already"),
        (lambda: ax.Widen("0", by=0), "whole number from 1"),
        (lambda: ax.Widen("0", by=1, init="zeros"), "zero, split, tile, pair, random"),
        (lambda: ax.Widen("0", by=1, state="none"), "'map' or 'reset'"),
        (lambda: ax.Widen("0", by=1, unit="units"), "heads, groups"),
        (lambda: ax.Widen("0", by=1, unit="heads"), "has no heads"),
        (lambda: ax.Widen("0", by=3, init="pair"), "two by two"),
        (lambda: ax.Widen("1", by=1), "no weight of its own"),
        (lambda: ax.Widen("7", by=1), "no child '7'"),
        (lambda: ax.Widen("7.*", by=1), "no module of the network fits"),
        (lambda: ax.Widen("0", by=1, noise=-1.0), "noise"),
        (lambda: ax.Widen("0", by=1, init="split", noise=float("inf")), "noise=inf: pass a number"),
        (
            lambda: ax.Widen("0", by=1, noise=0.1),
            "noise= is added to copies, and init='zero' makes none; pass init='split'",
        ),
        (lambda: ax.Widen("0", by=1, outputs="no"), "outputs='no': pass True or False"),
        (lambda: ax.Widen(0, by=1), "pass the path of a module as text"),
        (lambda: ax.Widen("*", by=-1), "whole number from 1"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(edit, words):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    before = {name: p.clone() for name, p in net.named_parameters()}
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(net, edit(), probe=x)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_without_a_probe_it_says_what_is_missing():
    with pytest.raises(ax.GrowthError, match="pass probe=batch"):
        ax.grow(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), ax.Widen("0", by=1))


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.b(self.a(x).view(len(x), 3, 4).transpose(1, 2).flatten(1))


def test_an_axis_that_a_constant_fixes_is_named_with_its_place():
    net, x = Fixed(), torch.randn(5, 4)
    with pytest.raises(ax.GrowthError, match="steps of 4 or 3; 1 is no multiple"):
        ax.grow(net, ax.Widen("a", by=1), probe=x)
    with pytest.raises(ax.GrowthError, match=r"test_layers_that_widen\.py:\d+.*view\(len\(x\), 3, 4\)"):
        ax.grow(net, ax.Widen("a", by=4), probe=x)


def test_a_journal_rebuilds_it_on_the_meta_device(tmp_path):
    net, probe = ready(*[CASES["a group of heads"][i] for i in (0, 3)])
    grower = ax.Grower(net, edits=ax.Widen("1.qkv", by=16), when=ax.when.every(10**6), probe=probe)
    grower.grow(ax.Widen("1.qkv", by=16))
    ax.save(grower, tmp_path / "run")
    with torch.device("meta"):
        twin = CASES["a group of heads"][0]()
    ax.replay(twin, grower.journal)
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}
    assert twin[1].heads == 6
    other = CASES["a group of heads"][0]().double()
    ax.load(tmp_path / "run", other)
    assert torch.equal(other(probe), net(probe))


def test_undone_and_tried_it_leaves_nothing():
    net, probe = ready(*[CASES["LSTM"][i] for i in (0, 3)])
    opt = torch.optim.Adam(net.parameters())
    net(probe).square().mean().backward()
    opt.step()
    opt.zero_grad()
    before, out = {n: p.clone() for n, p in net.state_dict().items()}, net(probe)
    edit = ax.Widen("rnn", by=2)
    grower = ax.Grower(net, opt, edits=edit, when=ax.when.every(10**6), probe=probe)
    with grower.trial(edit):
        assert net.rnn.hidden_size == 8
    grower.grow(edit)
    grower.undo()
    assert net.rnn.hidden_size == 6 and torch.equal(net(probe), out)
    assert all(torch.equal(b, before[n]) for n, b in net.state_dict().items())
    assert {s["exp_avg"].shape for s in opt.state.values()} == {p.shape for p in net.parameters()}


def test_a_grower_takes_a_pattern_and_names_one_that_fits_nothing():
    net, x = nn.Sequential(nn.Linear(8, 8), Gated(), Gated()), torch.randn(4, 8)
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    grower = ax.Grower(net, opt, edits=ax.Widen("*.gate_up", by=4), when=ax.when.every(1), probe=x)
    net(x).square().mean().backward()
    opt.step()
    opt.zero_grad()
    assert grower.step(1.0) and [net[i].down.in_features for i in (1, 2)] == [14, 14]
    with pytest.raises(ax.GrowthError, match="no module of the network fits"):
        ax.Grower(net, opt, edits=ax.Widen("blocks.*.gate_up", by=4), when=ax.when.every(1), probe=x)
