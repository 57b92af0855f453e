"""Norms and attention as people write them: no gain, an epsilon in the code, gains less 1, keys beside values."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils

import auxin as ax

torch.set_num_threads(1)
IDS = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(1))


class NoGain(nn.Module):
    small = 1e-4

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.small)


class Written(NoGain):
    """A gain, and an epsilon that nobody can set."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return super().forward(x) * self.gain


class Smaller(Written):
    """So small that it hardly counts, and a gain less 1."""

    small = 1e-8

    def forward(self, x):
        return NoGain.forward(self, x) * (1 + self.gain)


class Centred(nn.Module):
    """A layer norm in words."""

    def __init__(self):
        super().__init__()
        self.eps, self.gain, self.bias = 1e-4, nn.Parameter(torch.randn(8)), nn.Parameter(0.1 * torch.randn(8))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)) + self.bias


class LessOne(nn.Module):
    """As in Gemma."""

    def __init__(self):
        super().__init__()
        self.eps, self.weight = 1e-4, nn.Parameter(0.2 * torch.randn(8))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


class Text(nn.Module):
    def __init__(self, norm, tied=False):
        super().__init__()
        self.embed, self.norm, self.last = nn.Embedding(20, 8), norm(), norm()
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.last(x + self.down(F.silu(self.up(self.norm(x))))))


class Positions(Text):
    """Positions that do not train, and an embedding multiplied by the root of the width, as Gemma's."""

    def __init__(self, norm, scaled):
        super().__init__(norm)
        self.hidden_size, self.scaled = 8, scaled
        self.register_buffer("positions", torch.randn(1, 9, 8))

    def forward(self, ids):
        x = self.embed(ids) * (self.hidden_size**0.5 if self.scaled else 1) + self.positions[:, : ids.shape[1]]
        return self.head(self.last(x + self.down(F.silu(self.up(self.norm(x))))))


class NoModules(Text):
    """Norms that are functions, called by the network itself."""

    def __init__(self):
        super().__init__(nn.Identity)

    def forward(self, ids):
        x = F.rms_norm(self.embed(ids), (self.embed.embedding_dim,))
        x = x + self.down(F.relu(self.up(F.rms_norm(x, (x.size(-1),)))).square())
        return self.head(F.rms_norm(x, (x.size(-1),)))


class NanoNorm(nn.Module):
    """As nanoGPT's."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(0.1 * torch.randn(8))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class FusedKeys(nn.Module):
    """Keys and values in one projection, of one size."""

    def __init__(self):
        super().__init__()
        self.heads, self.size = 2, 4
        self.embed = nn.Embedding(20, 8)
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        q = self.q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (self.heads, 2 * self.size)).transpose(1, 2).split(self.size, -1)
        return self.out(((q @ k.mT * self.size**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Heads(nn.Module):
    """The stream is as wide as the heads, and queries and keys are normed too."""

    def __init__(self):
        super().__init__()
        self.heads, self.embed = 2, nn.Embedding(20, 8)
        self.norm, self.qkv, self.out, self.head = NoGain(), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        B, T, C = x.shape
        q, k, v = (
            y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return self.head(self.norm(x + self.out(y.transpose(1, 2).reshape(B, T, C))))


class NormedOverHeads(nn.Module):
    """Queries and keys are normed over all heads, as in OLMo 2."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 5)
        self.q, self.k, self.v, self.norm, self.last = *(nn.Linear(8, 8) for _ in range(3)), NoGain(), nn.RMSNorm(8)

    def forward(self, ids):
        q, k, v = (layer(self.embed(ids)) for layer in (self.q, self.k, self.v))
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.last(q), self.norm(k), v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Kernel(Written):
    """As it runs on a GPU."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-4

    def forward(self, x):
        return torch.ops.aten._fused_rms_norm(x, [len(self.gain)], self.gain, self.eps)[0]


class Recurrent(nn.Module):
    """Two recurrent layers, whose outputs a layer of attention looks at."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 6), nn.LSTM(6, 5, 2, batch_first=True)
        self.ask, self.out = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, ids):
        x = self.embed(ids)
        memory = self.lstm(x)[0]
        return self.out((self.ask(x) @ memory.mT).softmax(-1) @ memory)


def grown(model, edit):
    """Grow it between steps of AdamW; the outputs stay, and every new entry learns."""
    model = model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    target = torch.randn(model(IDS).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def step():
        F.mse_loss(model(IDS), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = model(IDS).detach()
    change = ax.grow(model, edit, optimizer, probe=IDS)
    torch.testing.assert_close(model(IDS).detach(), before, rtol=1e-10, atol=1e-10)
    start = copy.deepcopy(dict(model.named_parameters()))
    for _ in range(5):
        step()
    now = dict(model.named_parameters())
    still = [p.name for p in change.parts if not (now[p.name] != start[p.name])[p.mask].any()]
    assert not still
    return model, change


def plain():
    return nn.LayerNorm(8, elementwise_affine=False)


@pytest.mark.parametrize("norm", [NoGain, Written, plain])
def test_a_norm_whose_epsilon_cannot_follow_keeps_its_root_mean_square(norm):
    model, change = grown(Text(norm), ax.Widen("embed", by=4))
    assert "as much more" in change.how and model.embed.weight.shape == (20, 12)


def test_a_root_mean_square_norm_that_is_one_operation_gets_zeros():
    torch.manual_seed(0)
    model, change = grown(Text(Kernel), ax.Widen("embed", by=4))
    assert change.how == "new entries get zeros" and model.last.eps == pytest.approx(1e-4 * 8 / 12)


def test_a_stream_of_whole_heads_that_are_normed_too():
    torch.manual_seed(0)
    model, _ = grown(Heads(), ax.Widen("embed", by=4))
    assert model.heads == 3 and model.qkv.weight.shape == (36, 12)
    assert all((model.qkv.weight[n : n + 4] != 0).all() for n in (8, 20, 32)) and (model.out.weight[:8, 8:] != 0).all()


def test_a_layer_norm_in_words_gets_the_mean_of_the_old_entries():
    torch.manual_seed(0)
    model, change = grown(Text(Centred), ax.Widen("embed", by=4))
    assert "the mean of the old entries" in change.how and model.last.eps == pytest.approx(1e-4 * 8 / 12)


@pytest.mark.parametrize("tied", [False, True])
def test_gains_that_are_kept_less_one_follow(tied):
    torch.manual_seed(0)
    model, _ = grown(Text(LessOne, tied), ax.Widen("embed", by=4))
    assert model.last.weight.shape == (12,) and model.last.eps == pytest.approx(1e-4 * 8 / 12)


def test_a_width_that_cannot_keep_the_function_exactly_names_what_may_be_in_the_way():
    torch.manual_seed(0)
    model = Text(Smaller, tied=True).double()
    with pytest.raises(ax.GrowthError, match="epsilon or a scale in the code goes by the width"):
        ax.grow(model, ax.Widen("embed", by=1), probe=IDS)


class Response(nn.Module):
    """Global response normalisation, as in ConvNeXt v2: by the mean over the channels."""

    def __init__(self, known):
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        if known:
            self.eps = 1e-6

    def forward(self, x):
        x = F.gelu(self.inp(x))
        size = x.norm(dim=1, keepdim=True)
        part = size / (size.mean(-1, keepdim=True) + (self.eps if "eps" in vars(self) else 1e-6))
        return self.out(x + torch.addcmul(self.bias, self.weight, x * part))


@pytest.mark.parametrize("known", [True, False])
def test_what_the_list_of_widths_offers_is_what_grows(known):
    """An epsilon in the code changes the outputs by a millionth: that is rounding in float32, and not in float64."""
    torch.manual_seed(0)
    model, x = Response(known).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    width = next(w for w in ax.sites(model, x).widths if w.at == "inp")
    assert bool(width.fits) == known
    if known:
        assert ax.grow(model, width.edit, torch.optim.SGD(model.parameters(), lr=0.1), probe=x).max_difference < 1e-14
    else:
        assert "a norm's epsilon or a scale in the code goes by the width" in width.why_not
        with pytest.raises(ax.GrowthError, match="a norm's epsilon or a scale in the code goes by the width"):
            ax.grow(model, ax.Widen("inp", by=1), probe=x)
    again = Response(known)
    assert ax.grow(again, ax.Widen("inp", by=1), torch.optim.SGD(again.parameters(), lr=0.1), probe=x.float()).preserves


class InFloat32(nn.Module):
    """A norm that computes in float32 whatever it is given, as those of Llama."""

    def __init__(self):
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def test_norms_in_float32_of_a_network_in_float64():
    torch.manual_seed(0)
    model = Text(InFloat32).double()
    before = model(IDS).detach()
    (width,) = (w for w in ax.sites(model, IDS).widths if w.at == "embed" and w.edit.unit is None)
    change = ax.grow(model, width.edit, torch.optim.SGD(model.parameters(), lr=0.1), probe=IDS)
    assert change.preserves and 0 < float((model(IDS).detach() - before).norm() / before.norm()) < 1e-6


@pytest.mark.parametrize("norm", [NanoNorm, Written])
def test_a_tied_head_goes_on_behind_norms_whose_epsilon_cannot_follow(norm):
    torch.manual_seed(0)
    model = Text(norm, tied=True)
    with torch.no_grad():
        model.embed.weight.mul_(0.02)  # as it begins: there the epsilon counts
    model, change = grown(model, ax.Widen("embed", by=4))
    assert "as much more" in change.how and model.head.weight is model.embed.weight


def test_norms_that_are_functions_of_the_network_itself():
    torch.manual_seed(0)
    model, change = grown(NoModules(), ax.Widen("embed", by=4))
    assert "as much more" in change.how and model.up.weight.shape == (12, 12)


@pytest.mark.parametrize("scaled", [False, True])
def test_positions_that_do_not_train_and_a_scale_by_the_width(scaled):
    torch.manual_seed(0)
    model, _ = grown(Positions(LessOne, scaled), ax.Widen("embed", by=4))
    assert model.positions.shape == (1, 9, 12) and not model.positions[..., 8:].any()
    assert model.hidden_size == (8 if scaled else 12)


def test_values_beside_keys_of_their_size_learn_when_heads_get_larger():
    torch.manual_seed(0)
    model, _ = grown(FusedKeys(), ax.Widen("q", by=1, unit="head_dim"))
    values = model.kv.weight.view(2, 2, 5, 8)[:, 1, 4]
    assert model.size == 5 and values.count_nonzero() and model.out.weight[:, 4].count_nonzero()


def test_heads_whose_queries_and_keys_would_both_stay_zero_are_refused():
    torch.manual_seed(0)
    with pytest.raises(ax.GrowthError, match=r"Widen\('q', to=4, unit='heads', init='tile'\) keeps"):
        ax.grow(NormedOverHeads(), ax.Widen("q", by=1, unit="heads"), probe=IDS)
    change = ax.grow(NormedOverHeads(), ax.Widen("q", to=4, unit="heads", init="tile"), probe=IDS)
    assert change.preserves


def test_layers_below_the_one_that_is_attended_to_learn():
    torch.manual_seed(0)
    model, _ = grown(Recurrent(), ax.Widen("lstm", by=1))
    assert model.lstm.hidden_size == 6


@pytest.mark.parametrize("norm", [NoGain, Written, Centred, LessOne])
def test_an_average_and_a_resumed_run_keep_step(norm, tmp_path):
    """The average has other values than the network: its own entries are multiplied and shifted, not the network's."""

    def build():
        torch.manual_seed(0)
        model = Text(norm).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        never = ax.when.every(10**6)
        edit = ax.Widen("embed", by=4)
        return model, optimizer, average, ax.Grower(model, optimizer, average, edits=edit, when=never, probe=IDS)

    def train(model, optimizer, average, grower):
        losses = []
        for _ in range(5):
            loss = F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            grower.step()
            losses.append(loss.item())
        return losses

    run = model, optimizer, average, grower = build()
    train(*run)
    before = average(IDS).detach()
    assert not torch.allclose(before, model(IDS), atol=1e-3)
    grower.grow(ax.Widen("embed", by=4))
    assert model.embed.weight.shape == average.module.embed.weight.shape == (20, 12)
    torch.testing.assert_close(average(IDS).detach(), before, rtol=1e-10, atol=1e-10)
    ax.save(grower, tmp_path / "run")
    other = build()
    ax.load(tmp_path / "run", other[-1])
    assert train(*run) == train(*other)
    assert torch.equal(average(IDS), other[2](IDS))
