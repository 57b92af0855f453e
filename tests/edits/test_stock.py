"""What makes a grown model another one than plain transformers would build, said the most telling reason first."""

import re
import resource

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.anatomy.hugging_face import stock

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 41, (2, 10), generator=torch.Generator().manual_seed(1))
SIZES = dict(vocab_size=41, hidden_size=16, intermediate_size=24, num_attention_heads=2)


def llama(**others):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=1, **SIZES, **others)
    return transformers.LlamaForCausalLM(config).eval()


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x):
        return x + self.up(torch.tanh(self.down(x)))


def refused(model, edit, probe):
    config, names = model.config.to_dict(), list(model.state_dict())
    with pytest.raises(ax.GrowthError) as raised:
        ax.grow(model, edit, probe=probe)
    assert model.config.to_dict() == config and list(model.state_dict()) == names
    return str(raised.value)


def test_a_list_that_would_be_shorter_is_named_first():
    class Headed(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.adapters = nn.ModuleList(Adapter() for _ in range(3))

        def forward(self, input_ids):
            x = self.model(input_ids).last_hidden_state
            for adapter in self.adapters:
                x = adapter(x)
            return self.lm_head(x)

    model = Headed(llama().config).eval()
    said = refused(model, ax.Duplicate("adapters", by=1), {"input_ids": IDS})
    assert re.search(r"Headed: .*cannot express the grown model \(adapters has 4 entries, rebuilt 3\)", said)


def test_tensors_that_would_be_others_are_named():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=41, decoder_start_token_id=0
    )
    model = transformers.T5Model(config).eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    name = r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"
    for edit in (ax.Duplicate("encoder.block", order=[0, 0, 1]), ax.Duplicate("encoder.block")):
        said = refused(model, edit, batch)  # the first one alone has the table of positions
        assert re.search(
            rf"\({name} is not there rebuilt\)\. No copy of block 0 fits .*; order=\[0, 1, 1\] would do", said
        )
    assert ax.grow(model, ax.Duplicate("encoder.block", order=[0, 1, 1]), probe=batch)


def test_what_differs_alike_in_all_blocks_is_said_once():
    minicpm3 = pytest.importorskip("transformers.models.minicpm3")
    torch.manual_seed(0)
    sizes = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
    config = minicpm3.MiniCPM3Config(num_hidden_layers=3, num_key_value_heads=2, **SIZES, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    said = refused(model, ax.Duplicate("model.layers", by=1), {"input_ids": IDS})
    assert "model.layers.0.residual_scale is" in said and said.count("residual_scale") == 1


def test_a_cache_that_does_not_follow_is_noticed(monkeypatch):
    """As with plain transformers, whose cache for a T5 goes by the number of layers of its encoder."""
    monkeypatch.setattr("auxin.anatomy.hugging_face.fields.CACHED", {})
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=41, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert "does not generate with a cache" in refused(model, ax.Duplicate("decoder.block", by=1), batch)
    ax.grow(model, ax.Duplicate("encoder.block", by=1), probe=batch)
    ax.grow(model, ax.Duplicate("decoder.block", by=1), probe=batch)  # not deeper than its encoder
    ax.grow(model, ax.Duplicate("decoder.block", by=1), probe=batch, stock=False)


def test_a_model_whose_cache_never_worked_is_let_through():
    class Forgetful(transformers.LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            raise ValueError("no cache today")

    model = Forgetful(llama().config).eval()
    assert ax.grow(model, ax.Duplicate("model.layers", by=1), probe={"input_ids": IDS})


def test_rebuilding_takes_no_memory_for_the_parameters():
    """A model of 700 million parameters, 2.8 GB, which only the meta device holds here."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=16, vocab_size=64000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) > 700e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert stock.is_stock(model)
    twin = stock._empty(model)
    assert all(p.is_meta for p in twin.parameters()) and not any(b.is_meta for b in twin.buffers())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_the_field_of_a_width_follows():
    model = llama()
    before = model(IDS).logits
    ax.grow(model, ax.Widen("model.layers.*.mlp.gate_proj", by=8), probe={"input_ids": IDS})
    assert model.config.intermediate_size == 32 and torch.allclose(model(IDS).logits, before, atol=1e-6)
    built = transformers.LlamaForCausalLM(model.config)
    assert {n: t.shape for n, t in built.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
