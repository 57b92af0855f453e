"""Odd networks against those that were as wide all along, widenings one upon another, in a fade, and broken off."""

import pytest
import torch
from test_layers_that_widen import off
from test_states import transport
from torch import nn
from torch.nn import functional as F

import auxin as ax
from auxin import engine

torch.set_num_threads(1)
IDS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
ROWS, IMAGE, SERIES = (4, 5, 8), (2, 3, 6, 6), (2, 3, 9)


class Both(nn.Module):
    """Recurrent in both directions, two layers."""

    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(5, 6, 2, bidirectional=True, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class Grouped(nn.Module):
    """A depthwise convolution with two channels from each, and one in three groups."""

    def __init__(self):
        super().__init__()
        self.a, self.deep = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.three, self.b = nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.b(torch.relu(self.three(torch.relu(self.deep(torch.tanh(self.a(x)))))))


class Shared(nn.Module):
    """One weight in two layers that are multiplied."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 9), nn.Linear(8, 9), nn.Linear(9, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)) * torch.sigmoid(self.b(x)))


class Summed(nn.Module):
    """Weights of three dimensions under ``einsum``, in a residual branch."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(8, 3, 4)), nn.Parameter(torch.randn(3, 4, 8))
        self.inp, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.inp(x)
        y = torch.tanh(torch.einsum("bsd,dhe->bshe", x, self.w))
        return self.out(x + torch.einsum("bshe,hed->bsd", y, self.v))


class Gated(nn.Module):
    """A GLU over channels, groups of a norm, and a flatten."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv1d(4, 6, 1)
        self.c, self.out = nn.Linear(54, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = torch.relu(self.b(self.norm(F.glu(self.a(x), 1))))
        return self.out(torch.tanh(self.c(y.flatten(1))))


class Paired(nn.Module):
    """``nn.Bilinear``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mix, self.out = nn.Linear(8, 4), nn.Linear(8, 5), nn.Bilinear(4, 5, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.mix(torch.tanh(self.a(x)), torch.tanh(self.b(x)))))


class Unnormed(nn.Module):
    """A head that is tied to the embedding and reads the stream without a norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


class Attending(nn.Module):
    """``nn.MultiheadAttention`` that also returns its weights, which nobody takes."""

    def __init__(self):
        super().__init__()
        self.inp, self.mix, self.out = (
            nn.Linear(8, 12),
            nn.MultiheadAttention(12, 3, batch_first=True),
            nn.Linear(12, 2),
        )

    def forward(self, x):
        y = self.inp(x)
        return self.out(y + self.mix(y, y, y)[0])


CASES = {
    "LSTM both ways": (lambda: Both(nn.LSTM), "rnn", 2, (2, 4, 5)),
    "GRU both ways": (lambda: Both(nn.GRU), "rnn", 2, (2, 4, 5)),
    "into depthwise": (Grouped, "a", 6, IMAGE),
    "depthwise": (Grouped, "deep", 12, IMAGE),
    "three groups": (Grouped, "three", 6, IMAGE),
    "shared": (Shared, "a", 2, ROWS),
    "einsum": (Summed, "inp", 2, ROWS),
    "GLU": (Gated, "a", 8, SERIES),
    "flattened": (Gated, "b", 2, SERIES),
    "bilinear left": (Paired, "a", 2, ROWS),
    "bilinear right": (Paired, "b", 2, ROWS),
    "bilinear out": (Paired, "mix", 2, ROWS),
    "attention": (Attending, "inp", 8, ROWS),
}


@pytest.mark.parametrize("init", ["zero", "split", "tile", "pair"])
@pytest.mark.parametrize("case", CASES)
def test_function_gradients_and_moments_are_those_of_a_network_as_wide_all_along(case, init):
    build, at, by, probe = CASES[case]
    transport(build, ax.Widen(at, by=by, init=init), probe)


def test_a_tied_head_that_reads_the_stream_itself():
    net, _, _ = transport(Unnormed, ax.Widen("embed", by=2), IDS)
    assert net.head.weight is net.embed.weight and not net.embed.weight[:, 6:].any()
    assert net.down.weight.grad is None and net.up.in_features == 8
    with pytest.raises(ax.GrowthError, match="the outputs on the probe would change"):
        ax.grow(net, ax.Widen("embed", by=2, init="split"), probe=IDS)


class Block(nn.Module):
    def __init__(self, post=False):
        super().__init__()
        self.post, self.norm, self.up, self.down = post, nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        y = torch.relu(self.up(x if self.post else self.norm(x)))
        return self.norm(x + self.down(y)) if self.post else x + self.down(y)


class Net(nn.Module):
    def __init__(self, post=False):
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList([Block(post), Block(post)])

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


X = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def started(post=False):
    torch.manual_seed(0)
    net = Net(post).double()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    trained(net, opt)
    return net, opt


def trained(net, opt, count=2):
    for _ in range(count):
        opt.zero_grad()
        (net(X) - 1).square().mean().backward()
        opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("init", ["zero", "split", "tile", "pair"])
def test_five_in_a_row_with_depth_in_between(init):
    net, opt = started()
    edits = [ax.Widen("blocks.*.up", by=2, init=init) for _ in range(5)]
    edits[2:2] = [ax.Duplicate("blocks", by=1), ax.Widen("inp", by=3), ax.Duplicate("blocks", by=1)]
    for edit in edits:
        before = net(X).detach()
        assert ax.grow(net, edit, opt, probe=X).preserves and off(net(X).detach(), before) < 1e-12
        ax.verify(net, opt)
        trained(net, opt)
    assert [block.up.weight.shape for block in net.blocks] == [(18, 9)] * 4


def test_in_a_fade_and_a_warm_up():
    """The block goes on to fade in, and each of the entries warms up as long as it was to."""
    net, opt = started(post=True)
    ax.grow(net, ax.Duplicate("blocks", by=1, fade=6), opt, probe=X, rewarm=4)
    trained(net, opt)
    for edit in (ax.Widen("blocks.*.up", by=2), ax.Widen("blocks.1.up", by=2, init="split")):
        before = net(X).detach()
        ax.grow(net, edit, opt, probe=X, rewarm=5)
        assert off(net(X).detach(), before) < 1e-12 and any("gate" in name for name, _ in net.named_buffers())
        trained(net, opt, 1)
    trained(net, opt, 3)
    assert not any("gate" in name for name, _ in net.named_buffers())
    assert [block.up.out_features for block in net.blocks] == [10, 12, 10]


def held(net, opt):
    """Everything, with identities."""
    found = {}
    for name, p in net.named_parameters():
        found[name] = id(p), p.detach().clone(), p.stride()
        found |= {f"{name}.{key}": torch.as_tensor(value).clone() for key, value in opt.state[p].items()}
    sizes = {
        path: {k: v for k, v in vars(m).items() if type(v) in (int, float, tuple)} for path, m in net.named_modules()
    }
    return found, sizes, len(opt._optimizer_step_post_hooks)


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "edit", [ax.Widen("blocks.*.up", by=2, init="split"), ax.Widen("inp", by=2)], ids=["units", "stream"]
)
def test_broken_off_it_leaves_everything_as_it_was(edit, raised, monkeypatch):
    net, opt = started()

    def broken(*_, **__):
        raise raised("in between")

    before = held(net, opt)
    monkeypatch.setattr(engine, "prove", broken)
    with pytest.raises(raised):
        ax.grow(net, edit, opt, probe=X)
    after = held(net, opt)
    assert before[1:] == after[1:]
    for name, value in before[0].items():
        if isinstance(value, tuple):
            assert value[0] == after[0][name][0] and value[2] == after[0][name][2], name
            value, other = value[1], after[0][name][1]
        else:
            other = after[0][name]
        assert torch.equal(value, other), name
    monkeypatch.undo()
    ax.grow(net, edit, opt, probe=X)
    trained(net, opt)


def test_gradients_that_wait_are_asked_about_and_used_ones_go():
    net, opt = started()
    (net(X) - 1).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    with pytest.raises(ax.GrowthError, match="has a gradient.*zero_grad"):
        ax.grow(net, ax.Widen("blocks.*.up", by=2), opt, probe=X)
    assert all(torch.equal(p.grad, grads[name]) for name, p in net.named_parameters())
    opt.zero_grad()
    grower = ax.Grower(net, opt, edits=ax.Widen("blocks.*.up", by=2), when=ax.when.every(1), probe=X)
    (net(X) - 1).square().mean().backward()
    opt.step()
    assert grower.step(1.0)
    assert all(p.grad is None or p.grad.shape == p.shape for p in net.parameters())
