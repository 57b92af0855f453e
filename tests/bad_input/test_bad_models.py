"""Networks whose blocks are not what they look like: each refused in words that say why, with nothing touched."""

import functools

import pytest
import torch
from growing import assert_same, ema_of, picture
from torch import nn

import auxin as ax

torch.set_num_threads(1)
IDS = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
SIZES = dict(
    vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, pad_token_id=0
)


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, width=6):
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Over(nn.Module):
    """Runs its blocks in a way of its own."""

    def __init__(self, blocks, run):
        super().__init__()
        self.blocks, self.run, self.head = nn.ModuleList(blocks), run, nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.run(self.blocks, x))


class Masked(Residual):
    """Another kind of block, which wants a mask."""

    def forward(self, x, mask):
        return super().forward(x) * mask


def again_and_again(blocks, x):
    """Two blocks, each over and over: weights shared over the depth."""
    for i in range(6):
        x = blocks[i * len(blocks) // 6](x)
    return x


def beside_one_another(blocks, x):
    return sum(block(x) for block in blocks)


def joined(blocks, x):
    return torch.cat([block(x)[:, :2] for block in blocks], dim=-1)


def in_turns(blocks, x):
    """Blocks of two kinds, told apart by their numbers."""
    for i, block in enumerate(blocks):
        x = block(x, torch.ones(1)) if i % 2 else block(x)
    return x


def by_number(blocks, x):
    return blocks[2](blocks[1](blocks[0](x)))


def unet(blocks, x):
    """Down and up again, with what stood opposite."""
    kept, half = [], len(blocks) // 2
    for block in blocks[:half]:
        x = block(x)
        kept.append(x)
    for block in blocks[half:]:
        x = block(x + kept.pop())
    return x


def tied(count=3):
    blocks = [Residual() for _ in range(count)]
    for block in blocks:
        block.down.weight = blocks[0].down.weight
    return blocks


PLAIN = {
    "weights shared over the depth": (
        lambda: Over([Residual(), Residual()], again_and_again), {},
        r"outputs changed by .* blocks\.0 runs 3 times, blocks\.1 runs 3 times: of weights shared over the depth",
    ),
    "one block under several numbers": (
        lambda: Over([Residual()] * 3, by_number), {},
        r"blocks\.2 shares all its weights with blocks\.0, blocks\.1.*Untie\('blocks'\)",
    ),
    "a sum of branches": (lambda: Over([Residual() for _ in range(3)], beside_one_another), {}, "parallel branches"),
    "joined branches": (
        lambda: Over([Residual() for _ in range(3)], joined), {}, "the grown network does not run on the probe",
    ),
    "blocks of two kinds in turns": (
        lambda: Over([Residual(), Masked(), Residual()], in_turns), {"order": [0, 0, 1, 2]},
        "blocks.1: the grown network does not run on the probe: .*arguments",
    ),
    "fixed numbers": (
        lambda: Over([Residual() for _ in range(3)], by_number), {}, r"blocks\.3: the network's forward never calls it",
    ),
    "a half each": (
        lambda: Over([Residual() for _ in range(4)], unet), {}, "does not run on the probe: pop from empty",
    ),
    "a tied last writer": (
        lambda: Over(tied(), one_by_one), {"fade": 0}, "tied weights.*it can fade in",
    ),
}  # fmt: skip


def one_by_one(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_network(name):
    build, options, words = PLAIN[name]
    torch.manual_seed(0)
    model = build()
    everything = model, torch.optim.AdamW(model.parameters()), ema_of(model)
    before = picture(*everything)
    edit = ax.Duplicate("blocks", **({"by": 1} | options if "order" not in options else options))
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(model, edit, *everything[1:], probe=ROWS)
    assert_same(before, picture(*everything))


def noised(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def albert(**fields):
    transformers = pytest.importorskip("transformers")
    return transformers.AlbertModel(transformers.AlbertConfig(embedding_size=16, **SIZES, **fields))


def jamba():
    transformers = pytest.importorskip("transformers")
    period = dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    state = dict(mamba_d_state=4, mamba_dt_rank=4, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1)
    return transformers.JambaForCausalLM(transformers.JambaConfig(**SIZES, **period, **state))


def minicpm3():
    transformers = pytest.importorskip("transformers")
    ranks = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
    return transformers.MiniCPM3ForCausalLM(transformers.MiniCPM3Config(num_key_value_heads=2, **SIZES, **ranks))


HUGGING_FACE = {
    "albert, one group for all layers": (
        albert, "encoder.albert_layer_groups", {},
        r"albert_layer_groups\.0 runs 4 times: of weights shared over the depth",
    ),
    "albert, two groups": (
        functools.partial(albert, num_hidden_groups=2), "encoder.albert_layer_groups", {},
        r"albert_layer_groups\.0 runs 2 times, encoder\.albert_layer_groups\.1 runs 2 times",
    ),
    "layers whose kind goes by their number": (
        jamba, "model.layers", {"order": [0, 0, 1, 2, 3]}, "its configuration cannot express the grown model",
    ),
    "a residual scale that goes by the depth": (
        minicpm3, "model.layers", {"by": 1}, r"residual_scale is 0\.\d+ here, 0\.\d+ rebuilt.*stock=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_model_of_transformers(name):
    build, at, options, words = HUGGING_FACE[name]
    torch.manual_seed(0)
    model = noised(build())
    everything = model, torch.optim.AdamW(model.parameters()), torch.optim.swa_utils.AveragedModel(model)
    before, config = picture(*everything), model.config.to_dict()
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(model, ax.Duplicate(at, **(options or {"by": 1})), *everything[1:], probe={"input_ids": IDS})
    assert_same(before, picture(*everything))
    assert model.config.to_dict() == config


def test_a_tied_embedding_is_no_hindrance():
    """What is tied outside of the blocks stays tied, and the grown model is stock."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    model = noised(transformers.LlamaForCausalLM(config))
    before = model(IDS).logits
    ax.grow(model, ax.Duplicate("model.layers", by=1), torch.optim.AdamW(model.parameters()), probe={"input_ids": IDS})
    assert torch.equal(model(IDS).logits, before) and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_buffer_that_is_a_nested_tensor_without_a_shape_is_named(tmp_path):
    parts = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    net = nn.Sequential(nn.Linear(4, 4))
    grower = ax.Grower(net, torch.optim.SGD(net.parameters(), lr=0.1))
    net[0].register_buffer("lengths", parts)
    for save in (ax.save, ax.async_save):
        with pytest.raises(ax.GrowthError, match=r"0\.lengths.* nested tensor.*to_padded_tensor"):
            save(grower, tmp_path / "run")
    with pytest.raises(ax.GrowthError, match=r"0\.lengths is a nested tensor.*to_padded_tensor"):
        ax.Grower(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_weight_that_was_left_without_values_is_named():
    """A product of a tensor on a CPU with one on the meta device is not refused by torch."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 1, bias=False))
    net[2].to("meta")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ax.GrowthError, match=r"2\.weight is on the meta device and without values, .*assign=True"):
        ax.grow(net, ax.Duplicate("1", by=1), optimizer, probe=torch.ones(2, 4))
    assert len(net[1]) == 1
    plan = net.to("meta")  # as a whole it is a plan
    ax.verify(plan, torch.optim.SGD(plan.parameters(), lr=0.1))
