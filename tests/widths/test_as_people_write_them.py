"""Networks that take widths from the shapes of tensors, as most code does, and cells that are called step by step."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import auxin as ax
from auxin.anatomy.widths.sizes import Attribute, Length, Size
from auxin.anatomy.widths.terms import Term

torch.set_num_threads(1)


@dataclasses.dataclass
class Config:
    n_embd: int = 32
    n_head: int = 4
    vocab_size: int = 61
    block_size: int = 16


class CausalSelfAttention(nn.Module):
    """As in nanoGPT: the width of the input is that of queries, keys, values and output."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.n_embd = config.n_head, config.n_embd

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(torch.ones(T, T).tril() == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class FusedAttention(nn.Module):
    """As in the first vision transformers."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.n_head
        self.c_attn, self.c_proj = nn.Linear(config.n_embd, config.n_embd * 3), nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.c_attn(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.c_proj(y.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, config, attention):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn = attention(config)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 64), nn.GELU(), nn.Linear(64, config.n_embd))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    def __init__(self, attention=CausalSelfAttention):
        super().__init__()
        self.config = Config()
        self.wte = nn.Embedding(self.config.vocab_size, self.config.n_embd)
        self.wpe = nn.Embedding(self.config.block_size, self.config.n_embd)
        self.h = nn.ModuleList(Block(self.config, attention) for _ in range(2))
        self.ln_f = nn.LayerNorm(self.config.n_embd)
        self.lm_head = nn.Linear(self.config.n_embd, self.config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx):
        _, t = idx.size()
        x = self.wte(idx) + self.wpe(torch.arange(0, t))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


@pytest.mark.parametrize("attention", [CausalSelfAttention, FusedAttention])
@pytest.mark.parametrize("edit", [ax.Widen("wte", to=64), ax.Widen("h.*.attn.c_attn", by=2, unit="heads")])
def test_a_stream_whose_width_is_that_of_the_heads_gets_whole_heads_more(attention, edit):
    torch.manual_seed(0)
    model, ids = Gpt(attention).double(), torch.randint(61, (8, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(ids).detach()
    print(ax.grow(model, edit, optimizer, probe=ids))
    width, heads = (64, 8) if edit.to else (48, 6)
    assert model.h[1].attn.c_attn.weight.shape == (3 * width, width) and model.wte.weight is model.lm_head.weight
    for block in model.h:
        assert (getattr(block.attn, "n_head", None) or block.attn.num_heads) == heads
    assert getattr(model.h[0].attn, "n_embd", width) == width
    assert float((model(ids).detach() - before).abs().max() / before.abs().max()) < 1e-12
    for _ in range(3):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(model.h[0].attn.c_attn.weight.detach()[-1].abs().max()) > 0 and model(ids).isfinite().all()


def test_what_can_be_pasted_from_the_table_grows():
    ids = torch.randint(61, (8, 16))
    rows = [width for width in ax.sites(Gpt(), ids).widths if width.edit]
    assert {(row.at, row.step) for row in rows} >= {("wte", 8), ("wte", 1), ("h.0.mlp.0", 1)}
    for row in rows:
        model = Gpt()
        ax.grow(model, row.edit, probe=ids)
        model(ids)


class Pooled(nn.Module):
    """Lengths that are no widths: of the batch, of the time, of halves of channels."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 2)

    def forward(self, x):
        y = torch.relu(self.inp(x))
        B, C, H, W = y.shape
        y = y.view(B, 2, C // 2, H, W).transpose(1, 2).reshape(B, C, H * W)  # channels shuffled
        mask = torch.ones(B, 1, H * W).expand(B, C, -1)
        return self.out((y * mask).view(y.size(0), C, -1).mean(2))


def test_shuffled_channels_go_on_growing():
    model, x = Pooled(), torch.randn(8, 3, 4, 4)
    before = model(x)
    ax.grow(model, ax.Widen("inp", to=12), probe=x)
    assert model.inp.out_channels == 12 and torch.allclose(model(x), before, atol=1e-6)


class Stepped(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.hidden, self.cell, self.out = 12, cell(3, 12), nn.Linear(12, 1)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.hidden)
        state = (h, torch.zeros_like(h)) if isinstance(self.cell, nn.LSTMCell) else h
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.out(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_of_a_cell_hidden_units_are_counted_as_of_a_layer(cell):
    model, x = Stepped(cell), torch.randn(4, 5, 3)
    before = model(x)
    width = next(width for width in ax.sites(model, x).widths if width.at == "cell")
    assert (width.size, width.step) == (12, 1) and width.fits == ("Widen('cell', by=1)",)
    ax.grow(model, ax.Widen("cell", to=16), probe=x)
    assert (model.cell.hidden_size, model.hidden, model.out.in_features) == (16, 16, 16)
    assert torch.allclose(model(x), before, atol=1e-6)


class Mixer(nn.Module):
    """What mixes tokens adds the same to every channel, which no new channel of zeros gets."""

    def __init__(self, dim=8):
        super().__init__()
        self.inp, self.norm, self.tokens, self.out = (
            nn.Linear(5, dim),
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)),
            nn.Linear(dim, 2),
        )
        self.last = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.inp(x)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.out(self.last(x).mean(1))


def test_a_refusal_names_the_start_that_keeps_the_function():
    x = torch.randn(4, 6, 5)
    with pytest.raises(ax.GrowthError, match="would change") as refused:
        ax.grow(Mixer(), ax.Widen("inp", by=2), probe=x)
    assert "Widen('inp', to=16, init='tile') keeps the function; init='random' grows it" in str(refused.value)
    model = Mixer()
    before = model(x)
    ax.grow(model, ax.Widen("inp", to=16, init="tile"), probe=x)
    assert torch.allclose(model(x), before, atol=1e-6)
    with pytest.raises(ax.GrowthError, match=r"Widen\('wte', to=64, init='zero'\) keeps the function"):
        ax.grow(Gpt(), ax.Widen("wte", to=64, init="tile"), probe=torch.randint(61, (8, 16)))  # the head is tied


def test_a_length_is_a_plain_number_to_all_that_is_computed_from_it():
    term, size = Term(12), Size.of(Attribute("", "dim", 0, 4))
    noted = []
    length = Length(12, term, noted.append)
    for made in (length + 1, length - 1, length * 2, length // 2, 1 + length, 24 // length, -length, length % 5):
        assert type(made) is int
    assert length**2 == 144 and not noted
    assert (length**0.5, length**-1, length / 2, 24 / length) == (12**0.5, 1 / 12, 6.0, 2.0) and len(noted) == 4
    assert math.sqrt(length) == math.sqrt(12) and noted == [term] * 5
    for made in (length * size, size * length, length + size, size + length, length - size):
        assert isinstance(made, Size) and made.attributes == size.attributes
    assert (length - size, length * size, (48 * size) // length) == (8, 48, 16)
    for forgot in (copy.copy(length), copy.deepcopy(length), pickle.loads(pickle.dumps(length))):
        assert type(forgot) is int and forgot == 12
