"""The rank of PEFT's adapters grows: the same function, the same multiplier, and the same outputs after a reload."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import auxin as ax

peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

IDS = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(2))
PROBE = {"input_ids": IDS}
LAYERS = "base_model.model.model.layers"


def base():
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).double()


def adapted(**options):
    options = dict(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False) | options
    return peft.get_peft_model(base(), peft.LoraConfig(**options)).double()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(model, optimizer, steps=3):
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def reloaded(model, path):
    model.save_pretrained(path)
    return peft.PeftModel.from_pretrained(base(), path).double()


def assert_same(a, b):
    assert torch.allclose(a, b, rtol=0, atol=1e-14 * float(a.abs().max()) * 10), float((a - b).abs().max())


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("by", [1, 2, 5])
def test_all_ranks_of_an_adapter(by, stabilised, tmp_path):
    model = adapted(use_rslora=stabilised, lora_alpha=6)
    optimizer = optimizer_of(model)
    trained(model, optimizer)
    before, layer = logits(model), model.base_model.model.model.layers[0].self_attn.q_proj
    scaling = layer.scaling["default"]
    edits = [ax.Widen(f"{LAYERS}.*.{at}.lora_A.default", by=by) for at in ("self_attn.q_proj", "mlp.down_proj")]
    ax.grow(model, edits, optimizer, probe=PROBE)
    assert_same(logits(model), before)
    assert layer.r == {"default": 2 + by} and layer.scaling["default"] == scaling
    assert layer.lora_A["default"].out_features == layer.lora_B["default"].in_features == 2 + by
    alpha = 6 * (math.sqrt((2 + by) / 2) if stabilised else (2 + by) / 2)
    assert layer.lora_alpha["default"] == pytest.approx(alpha, rel=1e-15)
    trained(model, optimizer, 20)
    assert layer.lora_B["default"].weight[:, 2:].all()
    assert_same(logits(reloaded(model, tmp_path / "adapter")), logits(model))


def test_one_rank_for_all_layers_is_said_as_one():
    """With one target the pattern covers every layer, so the configuration needs none."""
    model = adapted(target_modules=["q_proj"], lora_alpha=8)
    ax.grow(model, ax.Widen(f"{LAYERS}.*.self_attn.q_proj.lora_A.default", by=2), probe=PROBE)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (4, 16, {}, {})


def test_single_layers_stand_in_front_of_older_patterns(tmp_path):
    model = adapted(rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 9})
    before = logits(model)
    ax.grow(model, ax.Widen(f"{LAYERS}.1.self_attn.q_proj.lora_A.default", by=3), probe=PROBE)
    config = model.peft_config["default"]
    assert list(config.rank_pattern.items()) == [("model.layers.1.self_attn.q_proj", 6), ("q_proj", 3)]
    assert list(config.alpha_pattern.items()) == [("model.layers.1.self_attn.q_proj", 18), ("q_proj", 9)]
    again = reloaded(model, tmp_path / "adapter")
    assert_same(logits(again), before)
    ranks = [layer.self_attn.q_proj.r["default"] for layer in again.base_model.model.model.layers]
    assert ranks == [3, 6]


def test_adapters_in_the_model_itself():
    """Without a PeftModel around it, as transformers' own add_adapter puts them there."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, base(), "a").double()
    before = logits(model)
    ax.grow(model, ax.Widen("model.layers.0.self_attn.q_proj.lora_A.a", by=2), probe=PROBE, stock=False)
    said = peft.LoraConfig.from_peft_type(**model.peft_config["a"].to_dict())
    assert said.rank_pattern == {"model.layers.0.self_attn.q_proj": 4}
    again = peft.inject_adapter_in_model(said, base(), "a").double()
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(model, adapter_name="a"), adapter_name="a")
    assert_same(logits(again), before)


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(target_modules=["embed_tokens"])], ids=["dora", "words"])
def test_other_kinds_of_layers(options, tmp_path):
    model = adapted(**options)
    before = logits(model)
    inside = "embed_tokens.lora_embedding_A" if "target_modules" in options else "layers.*.mlp.down_proj.lora_A.default"
    ax.grow(model, ax.Widen(f"base_model.model.model.{inside}", by=3), probe=PROBE)
    assert_same(logits(model), before)
    assert_same(logits(reloaded(model, tmp_path / "adapter")), before)


def test_taken_back_saved_and_loaded_by_auxin(tmp_path):
    model = adapted()
    optimizer = optimizer_of(model)
    grower = ax.Grower(model, optimizer, edits=lambda model: [], when=ax.when.every(10**9), probe=PROBE)
    edit = ax.Widen(f"{LAYERS}.*.self_attn.q_proj.lora_A.default", by=2)
    was = copy.deepcopy(model.peft_config["default"].to_dict())
    grower.grow(edit)
    grower.undo()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert model.peft_config["default"].to_dict() == was and layer.r == {"default": 2}
    grower.grow(edit)
    trained(model, optimizer)
    ax.save(grower, tmp_path / "run")
    fresh = adapted()
    other = ax.Grower(fresh, optimizer_of(fresh), edits=lambda model: [], when=ax.when.every(10**9), probe=PROBE)
    ax.load(tmp_path / "run", other)
    assert fresh.peft_config["default"].to_dict() == model.peft_config["default"].to_dict()
    assert torch.equal(logits(fresh), logits(model))


def merged(model):
    model.merge_adapter()


def not_active(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.double().set_adapter("other")


@pytest.mark.parametrize("away", [merged, not_active])
def test_an_adapter_that_does_not_run_is_refused(away):
    model = adapted()
    away(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ax.GrowthError, match="'default' of .*q_proj takes no part in this forward: it is merged"):
        ax.grow(model, ax.Widen(f"{LAYERS}.0.self_attn.q_proj.lora_A.default", by=2), probe=PROBE)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_start_that_makes_the_base_weights_anew_is_refused():
    model = peft.get_peft_model(
        base().float(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    with pytest.raises(ax.GrowthError, match="init_lora_weights='pissa': PEFT makes the base weights of"):
        ax.grow(model, ax.Widen(f"{LAYERS}.0.self_attn.q_proj.lora_A.default", by=2), probe=PROBE)


# ---- weights that are no plain numbers


class Codes(nn.Module):
    """As a layer of 8 bits of bitsandbytes: codes, and a scale beside them."""

    def __init__(self, layer):
        super().__init__()
        codes = (100 * layer.weight.detach()).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.SCB = torch.full((layer.out_features,), 0.01)

    def forward(self, x):
        return x @ (self.weight.float() * self.weight.SCB[:, None]).T


def of_codes(layer):
    return Codes(layer)


def of_bare_codes(layer):
    made = Codes(layer)
    scale = made.weight.SCB
    del made.weight.SCB
    made.forward = lambda x: x @ (made.weight.float() * scale[:, None]).T
    return made


def of_a_class_of_its_own(layer):
    from torch.testing._internal.two_tensor import TwoTensor

    weight = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    return layer


def packed(layer):
    engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    torch.backends.quantized.engine = engines[-1]
    holder = nn.Sequential(layer)
    return torch.ao.quantization.quantize_dynamic(holder, {nn.Linear}, dtype=torch.qint8)[0]


KINDS = {
    of_codes: ("2.weight is quantized .a Parameter with SCB", "2.weight is quantized"),
    of_bare_codes: ("2.weight is a parameter of torch.int8", "2.weight is a parameter of torch.int8"),
    of_a_class_of_its_own: ("2.weight is a TwoTensor", "2.weight is a TwoTensor"),
    packed: ("the weights of 2 are quantized and packed", "2 runs quantized::linear_dynamic along it"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("at", ["2", "0"])
def test_quantized_weights_are_refused_by_name(make, at):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    model[2] = make(model[2])
    x = torch.randn(4, 8)
    before = model(x)
    with pytest.raises(ax.GrowthError, match=KINDS[make][at == "0"]):
        ax.grow(model, ax.Widen(at, by=4), probe=x)
    assert torch.equal(model(x), before) and model[0].out_features == 16
