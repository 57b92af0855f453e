"""Models of transformers as people use them: in half precision, with adapters, quantized, checkpointed, compiled."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import auxin as ax

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
IDS = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))
SIZES = dict(
    vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
PROBE = {"input_ids": IDS}


def built(kind="Llama", **fields):
    config = getattr(transformers, f"{kind}Config" if kind != "Gemma3" else "Gemma3TextConfig")
    heads = {} if kind == "Llama" else dict(num_key_value_heads=1, head_dim=8)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**SIZES, **heads, **fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def steps(model, optimizer, count):
    losses = []
    for _ in range(count):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3"])
def test_half_precision_also_by_to(kind, dtype):
    """model.to(bfloat16) rounds the frequencies of the rotary embedding too, which a rebuilt model has in full."""
    model = built(kind).to(dtype)
    before = logits(model)
    change = ax.grow(model, ax.Duplicate("model.layers", by=1), adamw(model), probe=PROBE)
    assert torch.equal(logits(model), before) and change.how == "last writers zero"
    assert {p.dtype for p in model.parameters()} == {dtype}
    ax.grow(model, ax.After("model.layers.1.mlp"), adamw(model), probe=PROBE, stock=False)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("asked", ["probe", "config"])
def test_one_output_for_each_layer(asked):
    model = built()
    before, optimizer = logits(model), adamw(model)
    probe = PROBE | {"output_hidden_states": True}
    if asked == "config":
        model.config.output_hidden_states, probe = True, PROBE
    with pytest.raises(ax.GrowthError, match=r"return 6 tensors instead of 5: one for each layer.*: False"):
        ax.grow(model, ax.Duplicate("model.layers", by=1), optimizer, probe=probe)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    ax.grow(model, ax.Duplicate("model.layers", by=1), optimizer, probe=PROBE | {"output_hidden_states": False})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = built()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    if reentrant:
        model.enable_input_require_grads()
    optimizer, before = adamw(model), logits(model)
    ax.grow(model, ax.Duplicate("model.layers", by=1), optimizer, probe=PROBE)
    ax.grow(model, ax.After("model.layers.1.mlp"), optimizer, probe=PROBE, stock=False)
    new = model.model.layers[3]
    assert new.gradient_checkpointing and new.training and torch.equal(logits(model), before)
    start = {n: p.detach().clone() for n, p in new.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps(model, optimizer, 3)
    assert not [n for n, p in new.named_parameters() if torch.equal(p, start[n])]


def test_behind_a_writer_that_is_still_zero():
    model = built()
    optimizer = adamw(model)
    ax.grow(model, ax.Duplicate("model.layers", by=1), optimizer, probe=PROBE)
    edit = ax.After("model.layers.3.mlp")
    with pytest.raises(ax.GrowthError, match="only zeros come out of it on this probe.*Train some steps first"):
        ax.grow(model, edit, optimizer, probe=PROBE, stock=False)
    steps(model, optimizer, 2)
    assert ax.grow(model, edit, optimizer, probe=PROBE, stock=False).max_difference == 0


@pytest.mark.parametrize("way", [{"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_generation_goes_on_as_it_was(way):
    model = built()
    words = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, **way)
    before = model.generate(IDS, **words)
    ax.grow(model, ax.Duplicate("model.layers", order=[0, 0, 1, 1, 2]), adamw(model), probe=PROBE)
    assert torch.equal(model.generate(IDS, **words), before)


class Quantized(nn.Module):
    """An int8 weight, as a buffer or as a parameter that does not train, and a scale."""

    def __init__(self, linear, buffer):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / scale).round().to(torch.int8)
        if buffer:
            self.register_buffer("weight", whole), self.register_buffer("scale", scale)
        else:
            self.weight = nn.Parameter(whole, requires_grad=False)
            self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x):
        return functional.linear(x, self.weight.to(x) * self.scale)


class Adapted(nn.Module):
    """Low-rank weights beside one that stays."""

    def __init__(self, base):
        super().__init__()
        outs, ins = base.weight.shape
        self.base, self.a, self.b = base, nn.Linear(ins, 2, bias=False), nn.Linear(2, outs, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def quantized(buffer, adapted=()):
    model = built()
    for module in list(model.model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is nn.Linear:
                new = Quantized(child, buffer)
                module._modules[name] = Adapted(new) if name in adapted else new
    return model


@pytest.mark.parametrize("buffer", [True, False], ids=["buffers", "parameters"])
def test_quantized_weights(buffer):
    """What cannot be zeroed fades in; a layer behind one is as ever."""
    model = quantized(buffer)
    before, optimizer = logits(model), adamw(model)
    change = ax.grow(model, ax.Duplicate("model.layers", by=1, fade=2), optimizer, probe=PROBE, stock=False)
    assert change.gates == ("model.layers.3",) and torch.equal(logits(model), before)
    steps(model, optimizer, 3)
    whole = model.model.layers[3].mlp.down_proj.weight
    assert whole.dtype == torch.int8 and torch.equal(whole, model.model.layers[2].mlp.down_proj.weight)
    model = quantized(buffer)
    optimizer = adamw(model)
    ax.grow(model, ax.After("model.layers.1.mlp.down_proj"), optimizer, probe=PROBE, stock=False)
    assert torch.equal(logits(model), before)


ADAPTED = {
    "in front of what stays": (("q_proj", "v_proj"), True),
    "in front and behind": (("q_proj", "down_proj"), True),
    "behind all that stays": (("o_proj", "down_proj"), False),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_in_a_copy_learn_all_of_them(name):
    """A frozen projection at zero would cut off the adapters in front of it, however long they train."""
    adapted, fades = ADAPTED[name]
    model = built()
    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            for child in [c for c in module._modules if c in adapted]:
                module._modules[child] = Adapted(module._modules[child])
    for n, p in model.named_parameters():
        p.requires_grad_(".a." in n or ".b." in n)
    before, optimizer = logits(model), adamw(model)
    change = ax.grow(model, ax.Duplicate("model.layers", by=1, fade=2), optimizer, probe=PROBE, stock=False)
    assert torch.equal(logits(model), before) and bool(change.gates) is fades
    new = {n: p for n, p in model.model.layers[3].named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in new.items()}
    steps(model, optimizer, 4)
    assert len(new) == 2 * len(adapted) and not [n for n, p in new.items() if torch.equal(p, start[n])]


def test_adapters_of_peft_are_merged_and_a_layer_behind_one_trains():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(built(), config).eval()
    before, optimizer = logits(model), adamw(model)
    at = "base_model.model.model.layers"
    ax.grow(model, ax.Duplicate(at, order=[0, 0, 1, 2], fade=2), optimizer, probe=PROBE)
    change = ax.grow(model, ax.After(f"{at}.2.mlp"), optimizer, probe=PROBE)
    assert torch.equal(logits(model), before) and all(p.requires_grad for p in change.parameters)
    steps(model, optimizer, 3)
    after = logits(model)
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), after, atol=1e-5, rtol=0)
