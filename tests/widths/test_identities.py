"""Identities of wider networks, with the mistakes that are easily made beside them: each is far off."""

import pytest
import torch
from test_layers_that_widen import Attention, Gated, off
from torch import nn
from torch.nn import functional as F

import auxin as ax

torch.set_num_threads(1)


class Rotated(nn.Module):
    """Attention with rotary embedding in halves and a stored table of frequencies; the scale is torch's default."""

    def __init__(self, d=16, heads=2, size=16):
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k, self.v = (nn.Linear(d, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, d)
        self.register_buffer("frequencies", 10.0 ** -torch.arange(size // 2).double().div(size // 2))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, self.heads, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        angle = torch.arange(t, dtype=x.dtype)[:, None] * torch.cat([self.frequencies, self.frequencies])
        q, k = (y * angle.cos() + turned(y) * angle.sin() for y in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(b, t, self.heads * self.size))


def turned(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def loud(net, scale=0.5):
    """Weights that are far from zero, so that attention looks at something and no mistake hides."""
    torch.manual_seed(1)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn_like(p))
    return net


X = torch.randn(2, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def resized_by_hand(net, place, scaled=True):
    """A rotary head of 16 entries made 24: where old entries go, and whether queries are rescaled."""
    wide = Rotated(16, 2, 24).double()
    with torch.no_grad():
        for name in ("q", "k", "v"):
            new, old = getattr(wide, name), getattr(net, name)
            at = torch.tensor([h * 24 + (j if name == "v" else place(j)) for h in range(2) for j in range(16)])
            for tensor, value in ((new.weight, old.weight), (new.bias, old.bias)):
                tensor.mul_(0 if name == "k" else 1)
                tensor[at] = value * ((24 / 16) ** 0.5 if scaled and name == "q" else 1)
        columns = torch.tensor([h * 24 + j for h in range(2) for j in range(16)])
        wide.out.weight.zero_()
        wide.out.weight[:, columns] = net.out.weight
        wide.out.bias.copy_(net.out.bias)
        wide.frequencies[:8] = net.frequencies
    return wide


def test_i7_i16_the_size_of_a_rotary_head():
    """16 to 24: old entries keep their half and their frequency, queries grow by the root of 24/16."""
    net = loud(Rotated())
    before = net(X).detach()
    halves = lambda j: j if j < 8 else j + 4  # noqa: E731
    assert off(resized_by_hand(net, halves)(X).detach(), before) < 1e-13
    wrong = {
        "no factor": resized_by_hand(net, halves, scaled=False),
        "at the end": resized_by_hand(net, lambda j: j),
        "frequencies anew": resized_by_hand(net, halves),
    }
    wrong["frequencies anew"].frequencies.copy_(10.0 ** -torch.arange(12).double().div(12))
    errors = {name: off(other(X).detach(), before) for name, other in wrong.items()}
    print({name: f"{error:.2g}" for name, error in errors.items()})
    assert min(errors.values()) > 1e-2
    change = ax.grow(net, ax.Widen("q", to=24, unit="head_dim"), probe=X)
    print(change)
    assert change.preserves and off(net(X).detach(), before) < 1e-13 and net.size == 24
    assert net.frequencies.shape == (12,) and net.k.weight.shape == (48, 16) and net.v.out_features == 48
    net(X).square().sum().backward()
    assert net.k.weight.grad.view(2, 24, 16)[:, [8, 9, 10, 11, 20, 21, 22, 23]].abs().max() > 0


def test_i15_grouped_queries():
    """A whole group; more queries in each group, at the end of each; at the global end or tiled it is wrong."""
    for unit, heads, groups in (("groups", 6, 3), ("heads", 8, 2)):
        net = loud(Attention())
        before = net(X).detach()
        by = 1 if unit == "groups" else 4
        assert ax.grow(net, ax.Widen("qkv", by=by, unit=unit), probe=X).preserves
        assert (net.heads, net.groups) == (heads, groups) and off(net(X).detach(), before) < 1e-14
    net, wide = loud(Attention()), Attention(heads=8).double()
    with torch.no_grad():
        wide.qkv.weight.copy_(torch.cat([net.qkv.weight[:16], torch.randn(16, 16), net.qkv.weight[16:]]))
        wide.qkv.bias.copy_(torch.cat([net.qkv.bias[:16], torch.randn(16), net.qkv.bias[16:]]))
        wide.out.weight.copy_(torch.cat([net.out.weight, torch.zeros(16, 16)], 1))
        wide.out.bias.copy_(net.out.bias)
    assert off(wide(X).detach(), net(X).detach()) > 1e-2


def test_i10_more_classes_raise_the_loss_by_a_known_amount():
    net, x = loud(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5))), X[0]
    target = torch.arange(6) % 5
    old, before = net(x).detach(), F.cross_entropy(net(x), target)
    ax.grow(net, ax.Widen("2", by=3, outputs=True), probe=x)
    new = net(x).detach()
    assert torch.allclose(new[:, :5], old, rtol=0, atol=1e-14)
    rise = torch.log1p(new[:, 5:].exp().sum(1) / new[:, :5].exp().sum(1)).mean()
    assert abs(F.cross_entropy(net(x), target) - before - rise) < 1e-12


def test_i19_whole_groups_of_a_group_norm_and_nothing_inside_them():
    net = loud(nn.Sequential(nn.Conv1d(6, 8, 1), nn.GroupNorm(4, 8), nn.Conv1d(8, 3, 1)))
    x = X.clone()[:, :6]
    before = net(x).detach()
    change = ax.grow(net, ax.Widen("0", by=4), probe=x)
    assert change.preserves and net[1].num_groups == 6 and off(net(x).detach(), before) < 1e-14
    with pytest.raises(ax.GrowthError, match="steps of 2 or 6; 3 is no multiple"):
        ax.grow(net, ax.Widen("0", by=3), probe=x)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_i6n_without_a_rescaled_epsilon_a_quiet_stream_changes(kind):
    torch.manual_seed(0)
    eps = 1e-5
    norm, wide = kind(24, eps=eps).double(), kind(37, eps=eps).double()
    x = 1e-2 * torch.randn(5, 24, dtype=torch.float64)
    more = x.mean(-1, keepdim=True).expand(5, 13) if kind is nn.LayerNorm else torch.zeros(5, 13, dtype=torch.float64)
    wide.weight.data.mul_((24 / 37) ** 0.5)
    y = torch.cat([x, more], -1)
    assert off(wide(y)[:, :24], norm(x)) > 1e-3
    wide.eps = eps * 24 / 37
    assert off(wide(y)[:, :24], norm(x)) < 1e-13


def test_i8_batch_norms_of_old_channels_keep_their_statistics():
    net = loud(nn.Sequential(nn.Conv1d(6, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 1)))
    x = X.clone()[:, :6]
    net(x)
    stats = net[1].running_mean.clone(), net[1].running_var.clone()
    twin = [p.clone() for p in net.parameters()]
    before = net(x).detach()  # in train mode
    net[1].running_mean.copy_(stats[0]), net[1].running_var.copy_(stats[1])
    ax.grow(net, ax.Widen("0", by=4, init="split"), probe=x)
    assert torch.equal(net[1].running_mean[:4], stats[0]) and torch.equal(net[1].running_var[:4], stats[1])
    assert off(net(x).detach(), before) < 1e-13 and len(twin) == 6


def test_g1_with_zero_the_readers_learn_first_and_all_from_the_second_step_on():
    net = loud(nn.Sequential(nn.Linear(16, 8), Gated(8, 12), nn.Linear(8, 3)), 0.2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    ax.grow(net, ax.Widen("1.gate_up", by=8), opt, probe=X)
    new_rows, new_columns = torch.tensor([12, 13, 14, 15, 28, 29, 30, 31]), slice(12, 16)
    for step in (1, 2):
        net(X).square().mean().backward()
        rows, columns = net[1].gate_up.weight.grad[new_rows], net[1].down.weight.grad[:, new_columns]
        assert (columns.abs().amax(0) > 0).all() and ((rows.abs().amax(1) > 0).all() if step == 2 else not rows.any())
        opt.step()
        opt.zero_grad()


def test_g3_where_both_factors_of_a_product_would_be_zero_it_is_refused():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 6), nn.Linear(6, 3)
            nn.init.zeros_(self.a.weight), nn.init.zeros_(self.a.bias), nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.b(self.a(x))

    net = Dead().double()
    change = ax.grow(net, ax.Widen("a", by=2), probe=X)  # new rows at random although the old ones are zero
    assert net.a.weight[6:].abs().min() > 0 and "no gradient yet at the new entries of a.weight" in str(change)


def test_s4_new_units_are_not_alike():
    net = loud(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)))
    ax.grow(net, ax.Widen("0", by=8), probe=X)
    new = F.normalize(net[0].weight[8:], dim=1)
    assert (new @ new.T - torch.eye(8)).abs().max() < 0.9


def test_the_state_of_a_parametrized_weight_is_kept_or_refused_by_name():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    before = net(X).detach()
    change = ax.grow(net, ax.Widen("0", by=4), probe=X)
    assert change.preserves and off(net(X).detach(), before) < 1e-13 and net[0].out_features == 12
    for kind in (nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.orthogonal):
        net = nn.Sequential(kind(nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
        with pytest.raises(ax.GrowthError, match=r"Widen\('0', by=4\): cannot grow"):
            ax.grow(net, ax.Widen("0", by=4), probe=X)


def test_lora_rank_grows_and_the_scale_stays():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
    net = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])).double()
    layer = net.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    before = net(X).detach()
    change = ax.grow(net, ax.Widen("base_model.model.0.lora_A.default", by=2), probe=X)
    assert change.preserves and off(net(X).detach(), before) < 1e-14
    assert layer.lora_A["default"].out_features == 6 == layer.lora_B["default"].in_features
    assert layer.scaling["default"] == 2.0
