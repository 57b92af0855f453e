"""``After`` at every kind of site of tiny models of the transformers library: bit for bit, or refused."""

import re

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.anatomy.probe import tensors_in

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LIKE_BERT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
LIKE_LLAMA = dict(LIKE_BERT, num_key_value_heads=1, head_dim=8, vocab_size=64, pad_token_id=0)
MODELS = {
    "GPT2LMHeadModel": (dict(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=16), dict(input_ids=IDS)),
    "LlamaForCausalLM": (LIKE_LLAMA, dict(input_ids=IDS)),
    "MixtralForCausalLM": (dict(LIKE_LLAMA, num_local_experts=2), dict(input_ids=IDS)),
    "BertModel": (dict(LIKE_BERT, vocab_size=64), dict(input_ids=IDS)),
    "T5Model": (
        dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=64),
        dict(input_ids=IDS, decoder_input_ids=IDS[:, :4]),
    ),
    "ViTModel": (dict(LIKE_BERT, image_size=16, patch_size=8), dict(pixel_values=PIXELS)),
    "MambaForCausalLM": (dict(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=64), dict(input_ids=IDS)),
    "ResNetModel": (
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
        dict(pixel_values=PIXELS),
    ),
}


def build(name):
    fields, inputs = MODELS[name]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**fields, attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model, dict(inputs) | ({"use_cache": False} if hasattr(model.config, "use_cache") else {})


def outputs(model, inputs):
    with torch.no_grad():
        return list(tensors_in(model(**inputs)))


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_site_takes_a_layer_bit_for_bit(name):
    model, inputs = build(name)
    listed = ax.sites(model, inputs)
    patterns = {re.sub(r"\d+", "*", site.at): site for site in reversed(listed) if site.shape and len(site.shape) > 1}
    before, names, config = outputs(model, inputs), list(model.state_dict()), repr(model.config)
    assert len(patterns) >= 9
    for site in patterns.values():
        assert site.why_not == "", site
        grower = ax.Grower(model, edits=lambda model: [], when=ax.when.every(1), probe=inputs, stock=False)
        change = grower.grow(ax.After(site.at))
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True)), site.at
        assert change.added_parameters > 0
        grower.undo()
    assert list(model.state_dict()) == names and repr(model.config) == config
    assert not any(m._forward_hooks for m in model.modules())


def test_all_sites_of_one_model_at_once_and_it_trains():
    model, inputs = build("LlamaForCausalLM")
    before = outputs(model, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    paths = [site.at for site in ax.sites(model, inputs) if not site.why_not]
    for path in paths:
        ax.grow(model, ax.After(path, as_hook=True), optimizer, probe=inputs, stock=False)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    assert len(paths) == 27
    assert all(model.get_submodule(path)._grown[0].weight.any() for path in paths)


def test_a_stock_model_is_refused_unless_told_otherwise():
    model, inputs = build("BertModel")
    keys = list(model.state_dict())
    with pytest.raises(ax.GrowthError, match="Pass stock=False to grow it all the same"):
        ax.grow(model, ax.After("encoder.layer.0.output.dense"), probe=inputs)
    assert list(model.state_dict()) == keys and not any(m._forward_hooks for m in model.modules())


def test_a_block_that_holds_a_grown_layer_is_copied_with_it():
    model, inputs = build("LlamaForCausalLM")
    before = outputs(model, inputs)
    ax.grow(model, ax.After("model.layers.0.mlp"), probe=inputs, stock=False)
    ax.grow(model, ax.Duplicate("model.layers", by=1, order=[0, 0, 1]), probe=inputs, stock=False)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    assert isinstance(second._grown, nn.Sequential) and second._grown is not first._grown
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))
