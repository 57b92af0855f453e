"""Duplicate, Insert and Remove on Hugging Face models of random weights: numbers, caches and configurations follow."""

import copy
import functools
import json
import textwrap

import pytest
import torch
from torch import nn

import anew
import auxin as ax

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))
COMMON = dict(vocab_size=41, bos_token_id=0, eos_token_id=1, pad_token_id=2)


def llama(layers=3):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, **COMMON
        )
    )


def qwen3(layers=3):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"][:layers]
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, layer_types=kinds, use_sliding_window=True, sliding_window=4, **COMMON,
        )
    )  # fmt: skip


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, decoder_start_token_id=0,
            **COMMON,
        )
    )  # fmt: skip


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, decoder_start_token_id=0, **COMMON,
        )
    )  # fmt: skip


def bert():
    return transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=41
        )
    )


def built(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)


def logits(model, **kwargs):
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def cached(model):
    """Logits token by token, each step seeing the past through the cache only."""
    past, found = None, []
    with torch.no_grad():
        for token in IDS.split(1, dim=1):
            out = model(token, past_key_values=past, use_cache=True)
            past, found = out.past_key_values, [*found, out.logits]
    return torch.cat(found, dim=1)


def tokens(model, **kwargs):
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, **kwargs)


def test_the_number_may_stand_in_some_blocks_only():
    """In a stack of several kinds only those with a cache know their position."""
    config = transformers.RecurrentGemmaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, lru_width=16, attention_window_size=8, block_types=["recurrent", "recurrent", "attention"],
        **COMMON,
    )  # fmt: skip
    model = built(lambda: transformers.RecurrentGemmaForCausalLM(config))
    before, was = logits(model), tokens(model)
    ax.grow(model, ax.Duplicate("model.layers", by=1), adamw(model), probe={"input_ids": IDS})
    assert [model.model.layers[i].temporal_block.layer_idx for i in (2, 3)] == [2, 3]
    assert torch.equal(logits(model), before) and torch.equal(tokens(model), was)


def test_a_copy_of_the_grown_model_calls_its_own_blocks():
    """Hooks of the gate are functions of their module, not closures over the model's."""
    model = built(bert)
    ax.grow(model, ax.Duplicate("encoder.layer", by=1), adamw(model), probe=IDS, stock=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.encoder.layer[2].output.dense.weight.fill_(float("nan"))
        model.encoder.layer[2].auxin_gate.fill_(1.0)
        twin.encoder.layer[2].auxin_gate.fill_(1.0)
    assert not model(IDS)[0].isnan().any() and twin(IDS)[0].isnan().any()


@pytest.mark.parametrize("build", [t5, bart])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_each_side_of_an_encoder_decoder_has_its_own_depth(build, side, tmp_path):
    model = built(build)
    at = next(p for p in (f"{side}.block", f"model.{side}.layers") if p in dict(model.named_modules()))
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    # A cache of T5 that generate makes is as deep as the encoder, whatever num_decoder_layers says (transformers 5.23).
    cache = not (build is t5 and side == "decoder")
    before, was = logits(model, decoder_input_ids=IDS), tokens(model)
    optimizer = adamw(model)
    ax.grow(model, ax.Duplicate(at, by=1, fade=3), optimizer, probe=batch, stock=build is t5)
    assert torch.equal(logits(model, decoder_input_ids=IDS), before) and torch.equal(
        tokens(model, use_cache=cache), was
    )
    fields = {"encoder": "num_layers", "decoder": "num_decoder_layers"}
    if build is bart:
        fields = {"encoder": "encoder_layers", "decoder": "decoder_layers"}
    assert {s: getattr(model.config, name) for s, name in fields.items()} == {"encoder": 2, "decoder": 2} | {side: 3}
    for _ in range(4):  # the gate opens and goes
        model(**batch, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    after = logits(model, decoder_input_ids=IDS)
    torch.testing.assert_close(logits(loaded, decoder_input_ids=IDS), after, atol=1e-6, rtol=0)
    assert torch.equal(tokens(model, use_cache=cache), tokens(model, use_cache=False))


def test_twice_in_a_row_and_one_taken_out_again(tmp_path):
    model = built(qwen3)
    before, optimizer = logits(model), adamw(model)
    for depth in (4, 5):
        ax.grow(model, ax.Duplicate("model.layers", by=1), optimizer, probe={"input_ids": IDS})
        assert len(model.model.layers) == model.config.num_hidden_layers == len(model.config.layer_types) == depth
    assert torch.equal(logits(model), before)
    ax.grow(model, ax.Remove("model.layers.4"), optimizer, probe={"input_ids": IDS})
    assert len(model.config.layer_types) == model.config.num_hidden_layers == 4
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2, 3]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model), atol=1e-6, rtol=0)
    torch.testing.assert_close(cached(model), logits(model), atol=1e-5, rtol=0)


def layer_of_a_llama():
    return type(llama().model.layers[0])(llama().config, 0)


def test_insert_gives_the_place_its_number_and_its_entries():
    model = built(llama)
    edit = ax.Insert("model.layers", layer_of_a_llama, index=1)
    before = logits(model)
    ax.grow(model, edit, adamw(model), probe={"input_ids": IDS})
    assert model.config.num_hidden_layers == 4 and torch.equal(logits(model), before)
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2, 3]
    torch.testing.assert_close(cached(model), before, atol=1e-5, rtol=0)


def test_what_its_configuration_cannot_say_is_refused_and_nothing_changes():
    torch.manual_seed(0)
    config = transformers.EsmConfig(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        mask_token_id=3, pad_token_id=0, position_embedding_type="absolute", max_position_embeddings=32,
    )  # fmt: skip
    model = built(lambda: transformers.EsmModel(config))
    optimizer, was, settings = adamw(model), copy.deepcopy(model.state_dict()), json.dumps(config.to_dict())
    with pytest.raises(ax.GrowthError, match=r"contact_head.*stock=False to grow it all the same"):
        ax.grow(model, ax.Duplicate("encoder.layer", by=1), optimizer, probe={"input_ids": IDS})
    assert json.dumps(model.config.to_dict()) == settings and list(model.state_dict()) == list(was)
    assert all(torch.equal(t, was[name]) for name, t in model.state_dict().items())
    assert len(optimizer.param_groups) == 1 and not optimizer.state
    assert ax.grow(model, ax.Duplicate("encoder.layer", by=1), optimizer, probe={"input_ids": IDS}, stock=False)


def test_blocks_in_parallel_lists_are_refused():
    config = transformers.XLMConfig(vocab_size=41, emb_dim=16, n_layers=3, n_heads=2, max_position_embeddings=32)
    model = built(lambda: transformers.XLMModel(config))
    with pytest.raises(
        ax.GrowthError, match=r"ffns\.3: .*does not run.* Beside it attentions, layer_norm1, layer_norm2"
    ):
        ax.grow(model, ax.Duplicate("ffns", by=1), adamw(model), probe={"input_ids": IDS}, stock=False)
    assert len(model.ffns) == 3 and model.n_layers == model.config.n_layers == 3


def grower_of(model, optimizer, average=None, **fields):
    companions = [optimizer, *([average] if average is not None else [])]
    return ax.Grower(model, *companions, edits=ax.Duplicate("model.layers", by=1), when=ax.when.every(1),
                     probe={"input_ids": IDS}, **fields)  # fmt: skip


def test_a_grower_grows_undoes_and_its_average_has_a_configuration_of_its_own():
    model = built(llama)
    optimizer, average = adamw(model), torch.optim.swa_utils.AveragedModel(model)
    settings, before = model.config.to_dict(), logits(model)
    assert average.module.config is not model.config
    grower = grower_of(model, optimizer, average)
    assert grower.step(1.0)
    assert average.module.config.num_hidden_layers == len(average.module.model.layers) == 4
    assert torch.equal(logits(average.module), before)
    torch.testing.assert_close(cached(average.module), before, atol=1e-5, rtol=0)
    grower.undo()
    assert model.config.to_dict() == average.module.config.to_dict() == settings
    assert torch.equal(logits(model), before) and len(average.module.model.layers) == 3


def test_a_model_with_adapters_is_let_through():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(built(llama), config).eval()
    at = "base_model.model.model.layers"
    before, optimizer = logits(model), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    try:
        change = ax.grow(model, ax.Duplicate(at, by=1), optimizer, probe={"input_ids": IDS})
    except ax.GrowthError as error:
        pytest.fail(str(error))
    assert len(model.get_submodule(at)) == model.config.num_hidden_layers == 4
    assert torch.equal(logits(model), before)
    assert [p.requires_grad for _, p in change.added[0][1].module.named_parameters()] == [
        p.requires_grad for p in model.get_submodule(at)[2].parameters()
    ]
    torch.testing.assert_close(cached(model), before, atol=1e-5, rtol=0)
    ax.verify(model, optimizer)


def test_saved_and_loaded_in_a_new_process(tmp_path):
    model = built(qwen3)
    optimizer = adamw(model)
    grower = grower_of(model, optimizer)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step(1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    ax.save(grower, tmp_path / "run")
    torch.save((logits(model), [tuple(s["exp_avg"].shape) for s in optimizer.state.values()]), tmp_path / "want.pt")
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
        import torch, auxin as ax, test_real_models as this
        model = this.built(this.qwen3)
        optimizer = this.adamw(model)
        ax.load({str(tmp_path / "run")!r}, this.grower_of(model, optimizer))
        want, shapes = torch.load({str(tmp_path / "want.pt")!r})
        assert model.config.num_hidden_layers == len(model.config.layer_types) == 5
        assert [b.self_attn.layer_idx for b in model.model.layers] == [0, 1, 2, 3, 4]
        torch.testing.assert_close(this.logits(model), want, atol=1e-6, rtol=0)
        torch.testing.assert_close(this.cached(model), want, atol=1e-5, rtol=0)
        assert [tuple(s["exp_avg"].shape) for s in optimizer.state.values()] == shapes
        bare = this.built(this.qwen3)
        ax.load({str(tmp_path / "run")!r}, bare)
        assert bare.config.num_hidden_layers == 5
        torch.testing.assert_close(this.logits(bare), want, atol=1e-6, rtol=0)
    """)
    done = anew.run("-c", code)
    assert done.returncode == 0, done.stderr


def test_blocks_under_study_do_not_write_into_a_cache_of_the_batch():
    """A cache that the user hands in stays as long as it was."""
    model = built(llama)
    with torch.no_grad():
        past = model(IDS, use_cache=True).past_key_values
    before = past.get_seq_length()
    batch = {"input_ids": IDS, "past_key_values": past}
    try:
        ax.grow(model, ax.Duplicate("model.layers", by=1), adamw(model), probe=batch)
    except ax.GrowthError:
        assert len(model.model.layers) == 3
    assert past.get_seq_length() == before


def test_a_list_of_stages_is_not_a_list_of_blocks():
    """Three stages, and three blocks in the last: only the entry of the depth may follow."""
    torch.manual_seed(0)
    config = transformers.CvtConfig(embed_dim=[16, 16, 32], depth=[1, 2, 3], num_heads=[1, 2, 4])
    model = built(lambda: transformers.CvtModel(config))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ax.grow(model, ax.Duplicate("encoder.stages.2.layers", by=1), adamw(model), probe={"pixel_values": images})
    assert model.config.depth == [1, 2, 4] and model.config.num_heads == [1, 2, 4]


def test_nothing_but_a_module_is_needed_for_a_plain_one():
    """The checks of a stock model do not touch what has no configuration."""
    model = nn.Sequential(nn.Linear(4, 4))
    assert ax.grow(model, ax.Insert("", functools.partial(nn.Linear, 4, 4)), adamw(model), probe=torch.randn(2, 4))
