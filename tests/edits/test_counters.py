"""Which numbers follow when a list grows: those that, changed, make the model's own class build a longer list there."""

import functools

import pytest
import torch
from torch import nn

import auxin as ax

transformers = pytest.importorskip("transformers")
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, inner=12):
        super().__init__()
        self.up, self.down = nn.Linear(8, inner), nn.Linear(inner, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Configured(transformers.PretrainedConfig):
    model_type = "counted"

    def __init__(self, num_hidden_layers=3, num_head_layers=3, rungs=(2, 3), width=8, wide_until=-1, **others):
        super().__init__(**others)
        self.num_hidden_layers, self.num_head_layers, self.width = num_hidden_layers, num_head_layers, width
        self.rungs, self.wide_until = list(rungs), wide_until


class Counted(transformers.PreTrainedModel):
    """As many blocks as ``num_hidden_layers``, a head of ``num_head_layers``, ladders, and a fixed list of three."""

    config_class = Configured

    def __init__(self, config):
        super().__init__(config)
        self.num_layers, self.depth_of_head = config.num_hidden_layers, config.num_head_layers
        wide = config.wide_until
        self.blocks = nn.ModuleList(Block(16 if i <= wide else 12) for i in range(config.num_hidden_layers))
        self.ladders = nn.ModuleList(nn.ModuleList(Block() for _ in range(n)) for n in config.rungs)
        self.head = nn.ModuleList(Block() for _ in range(config.num_head_layers))
        self.fixed = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.post_init()

    def forward(self, x):
        for i in range(self.num_layers):
            x = self.blocks[i](x)
        for block in (block for ladder in self.ladders for block in ladder):
            x = block(x)
        for block in self.head[: self.config.num_head_layers]:
            x = block(x)
        return self.fixed(x)


def counted():
    torch.manual_seed(0)
    return Counted(Configured()).eval()


def numbers(model):
    config = model.config
    return config.num_hidden_layers, config.num_head_layers, list(config.rungs), model.num_layers, model.depth_of_head


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("blocks", (4, 3, [2, 3], 4, 3)),
        ("head", (3, 4, [2, 3], 3, 4)),
        ("ladders.0", (3, 3, [3, 3], 3, 3)),
        ("ladders.1", (3, 3, [2, 4], 3, 3)),
    ],
)
def test_a_list_has_the_counter_that_builds_it(at, expected, tmp_path):
    model, before = counted(), counted()(X)
    ax.grow(model, ax.Duplicate(at, by=1), probe=X)
    assert numbers(model) == expected and torch.equal(model(X), before)
    model.save_pretrained(tmp_path)
    other = Counted.from_pretrained(tmp_path).eval()
    assert numbers(other) == expected and torch.equal(other(X), before)


@pytest.mark.parametrize(("until", "expected"), [(2, 3), (1, 1)])
def test_the_index_of_a_last_block_follows_where_its_kind_is_copied(until, expected):
    torch.manual_seed(0)
    model = Counted(Configured(wide_until=until, another=2)).eval()
    ax.grow(model, ax.Duplicate("blocks", by=1), probe=X)
    assert (model.config.num_hidden_layers, model.config.wide_until) == (4, expected)


@pytest.mark.parametrize(
    "edit", [ax.Insert("fixed", functools.partial(nn.Linear, 8, 8), index=3), ax.Remove("fixed.1")]
)
def test_a_list_that_nothing_counts_has_none(edit):
    model, was = counted(), numbers(counted())
    ax.grow(model, edit, probe=X, stock=False)
    assert numbers(model) == was


def test_without_a_configuration_a_list_of_like_blocks_is_what_is_counted():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_layers, self.blocks = 3, nn.ModuleList(Block() for _ in range(3))
            self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

        def forward(self, x):
            for i in range(self.num_layers):
                x = self.blocks[i](x)
            return self.head(x)

    model = Plain()
    ax.grow(model, ax.Insert("head", functools.partial(nn.Linear, 8, 8), index=3), probe=X)
    assert (model.num_layers, len(model.head)) == (3, 4)
    ax.grow(model, ax.Duplicate("blocks", by=1), probe=X)
    assert (model.num_layers, len(model.blocks)) == (4, 4)


def test_a_replay_finds_the_same_ones():
    model = counted()
    grower = ax.Grower(model, edits=ax.Duplicate("ladders.1", by=1), when=ax.when.every(1), probe=X)
    grower.grow(ax.Duplicate("ladders.1", by=1))
    with torch.device("meta"):
        other = Counted(Configured())
    ax.replay(other, grower.journal)
    assert numbers(other) == numbers(model) == (3, 3, [2, 4], 3, 3)


def test_a_decoder_that_is_deeper_than_its_encoder_generates(tmp_path):
    """Plain transformers makes a T5's caches as many as the encoder has layers, unless it is told otherwise."""
    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_heads=4, vocab_size=97, decoder_start_token_id=0)
    config = transformers.T5Config(num_layers=2, num_decoder_layers=2, **sizes)
    model, ids = transformers.T5ForConditionalGeneration(config).eval(), torch.randint(3, 90, (2, 12))

    def tokens(model, cache):
        flags = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        return model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cache, **flags)

    before = tokens(model, True)
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    for depth in (3, 4):
        ax.grow(model, ax.Duplicate("decoder.block", by=1), probe=batch)
        assert torch.equal(tokens(model, True), before) and torch.equal(tokens(model, False), before)
        assert (model.config.num_decoder_layers, model.config.num_layers) == (depth, 2)
    model.save_pretrained(tmp_path)
    other = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(tokens(other, True), before)
