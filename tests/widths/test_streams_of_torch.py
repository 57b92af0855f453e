"""Streams of networks of torch's own layers: read past a norm, by attention with heads, by weights with a norm."""

import pytest
import torch
from test_layers_that_widen import off
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import auxin as ax

torch.set_num_threads(1)
IDS = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))


class Mixing(nn.Module):
    """A block of ``nn.MultiheadAttention`` with norms in front."""

    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.mix(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Direct(nn.Module):
    """A stream that layers read behind a norm and past it; ``twice``: the blocks have two names."""

    def __init__(self, twice=False, wrap=None, dim=6):
        super().__init__()
        self.entry, self.side = nn.Linear(3, dim), nn.Linear(dim, dim)
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 8), nn.Linear(8, dim)
        self.exit = nn.Linear(dim, 2)
        self.layers = nn.ModuleList([self.up, self.down]) if twice else None
        if wrap is not None:
            wrap(self.up)

    def forward(self, x):
        x = self.entry(x)
        x = x + self.side(x)
        return self.exit(x + self.down(torch.relu(self.up(self.norm(x)))))


def loud(net):
    torch.manual_seed(2)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


def grown(net, edit, probe):
    """Function kept, and once the readers have moved every new entry learns."""
    before, opt = net(probe).detach(), torch.optim.Adam(net.parameters())
    change = ax.grow(net, edit, opt, probe=probe)
    assert change.preserves and off(net(probe).detach(), before) < 1e-13
    for _ in range(3):
        opt.zero_grad()
        net(probe).square().mean().backward()
        opt.step()
    for part in change.parts:
        if "norm" not in part.name:
            grad = net.get_parameter(part.name).grad
            assert (grad[part.mask] != 0).double().mean() > 0.5, part.name
    opt.zero_grad()


X = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", [{}, {"twice": True}, {"wrap": weight_norm}], ids=["plain", "two names", "normed"])
def test_what_reads_the_stream_past_a_norm_reads_the_mean_with_zeros(options):
    net = loud(Direct(**options))
    grown(net, ax.Widen("entry", by=3), X)
    assert net.side.weight.shape == (9, 9) and net.norm.normalized_shape == (9,) and net.exit.in_features == 9


def test_layers_with_two_names_get_more_units():
    net = loud(Direct(twice=True))
    grown(net, ax.Widen("up", by=2, init="split"), X)
    assert net.layers[0] is net.up and net.up.out_features == net.layers[1].in_features == 10


@pytest.mark.parametrize("final", [True, False])
def test_a_stream_with_multihead_attention_gets_whole_heads(final):
    net = [nn.Embedding(7, 12), Mixing(), Mixing(), *([nn.LayerNorm(12)] if final else []), nn.Linear(12, 7)]
    net = loud(nn.Sequential(*net))
    grown(net, ax.Widen("0", by=8), IDS)
    for block in (net[1], net[2]):
        mix = block.mix
        assert (mix.embed_dim, mix.num_heads, mix.head_dim, mix.kdim, mix.vdim) == (20, 5, 4, 20, 20)
        values = mix.in_proj_weight.detach().view(3, 5, 4, 20)
        assert (values[:, 3] - values[:, 4]).abs().min() > 0  # new heads start apart
    with pytest.raises(ax.GrowthError, match="grows in steps of 4 or 5; 3 is no multiple"):
        ax.grow(net, ax.Widen("0", by=3), probe=IDS)


def test_a_layer_of_torchs_own_transformer():
    layer = nn.TransformerEncoderLayer(12, 3, 16, norm_first=True, batch_first=True, dropout=0.0)
    net = loud(nn.Sequential(nn.Embedding(7, 12), layer, nn.LayerNorm(12), nn.Linear(12, 7))).eval()
    grown(net, ax.Widen("0", by=4), IDS)
    assert net[1].self_attn.num_heads == 4 and net[1].linear1.in_features == 16
    grown(net, ax.Widen("1.linear1", by=4), IDS)


def test_keys_and_values_of_other_widths():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values, self.ask = nn.Linear(3, 5), nn.Linear(3, 7), nn.Linear(3, 6)
            self.mix, self.exit = nn.MultiheadAttention(6, 2, kdim=5, vdim=7, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.exit(self.mix(self.ask(x), self.keys(x), self.values(x))[0])

    net, x = loud(Cross()), X.view(4, 4, 3)
    grown(net, ax.Widen("keys", by=2), x)
    grown(net, ax.Widen("values", by=3, init="split"), x)
    assert (net.mix.embed_dim, net.mix.kdim, net.mix.vdim, net.mix.num_heads) == (6, 7, 10, 2)
    grown(net, ax.Widen("ask", by=3), x)
    assert (net.mix.embed_dim, net.mix.kdim, net.mix.vdim, net.mix.num_heads) == (9, 7, 10, 3)


def test_rows_of_an_embedding_that_is_not_tied():
    net = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    change = ax.grow(net, ax.Widen("0", by=3, unit="rows"), probe=IDS)
    assert net[0].num_embeddings == 10 and "no gradient yet at the new entries of 0.weight" in str(change)
    assert net(torch.tensor([[9]])).shape == (1, 1, 2)


def test_pairs_of_whole_heads_are_counted_in_heads():
    net = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (4, 3)), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(
        ax.GrowthError, match="init='pair' adds units two by two, and this adds 1 of them; add an even number"
    ):
        ax.grow(net, ax.Widen("0", by=3, init="pair"), probe=torch.randn(4, 3))


def test_a_dry_run_leaves_the_record_of_young_entries_as_it_was():
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    opt, x = torch.optim.Adam(net.parameters()), torch.randn(4, 3)
    for _ in range(2):
        net(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        ax.grow(net, ax.Widen("0", by=2), opt, probe=x)
    young = next(iter(opt._optimizer_step_pre_hooks.values())).ramps.ramps[0]
    held, blocks = young.held, young._blocks
    ax.grow(net, ax.Widen("0", by=2, init="split"), opt, probe=x, dry_run=True)
    assert young.held is held and young._blocks is blocks and held
