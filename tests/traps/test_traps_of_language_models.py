"""What goes wrong without a word when a model of transformers is made deeper by hand; then with auxin."""

import copy
import pickle

import pytest
import torch
from language_models import IDS, adamw, blocks_of, built, cached, logits, ran, steps
from torch import nn

import auxin as ax

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
PROBE = {"input_ids": IDS}


def counted(model):
    """Let the configuration say how many blocks there are, as a careful person does."""
    model.config.num_hidden_layers += 1


def test_22_a_layer_that_the_configuration_does_not_count_never_runs_and_is_not_saved(tmp_path):
    model = built("llama")
    before, optimizer = logits(model), adamw(model)
    layer = copy.deepcopy(model.model.layers[2])
    model.model.layers.append(layer)
    optimizer.add_param_group({"params": list(layer.parameters())})
    start = [p.detach().clone() for p in layer.parameters()]
    assert ran(model.model.layers, lambda: logits(model)) == [0, 1, 2] and torch.equal(logits(model), before)
    steps(model, optimizer, 2)
    assert all(torch.equal(p, s) for p, s in zip(layer.parameters(), start, strict=True))
    model.save_pretrained(tmp_path / "by hand")
    other, info = type(model).from_pretrained(tmp_path / "by hand", output_loading_info=True)
    assert len(other.model.layers) == 3 and len(info["unexpected_keys"]) == len(start)  # lost, with a report only

    model = built("llama")
    optimizer = adamw(model)
    ax.grow(model, ax.Duplicate("model.layers", by=1), optimizer, probe=PROBE)
    layer = model.model.layers[3]
    start = [p.detach().clone() for p in layer.parameters()]
    assert ran(model.model.layers, lambda: logits(model)) == [0, 1, 2, 3]
    steps(model, optimizer, 2)
    assert not any(torch.equal(p, s) for p, s in zip(layer.parameters(), start, strict=True))
    model.save_pretrained(tmp_path / "grown")
    other, info = type(model).from_pretrained(tmp_path / "grown", output_loading_info=True)
    assert len(other.model.layers) == 4 and not any(info.values())
    torch.testing.assert_close(logits(other), logits(model), atol=1e-6, rtol=0)


def test_22_the_same_inside_surgery_is_refused_by_name():
    model = built("llama")
    optimizer = adamw(model)
    with (
        pytest.raises(ax.GrowthError, match=r"model\.layers\.3: the network's forward never calls it"),
        ax.surgery(model, optimizer, probe=PROBE),
    ):
        model.model.layers.append(type(layer_of(model))(model.config, 3))
    assert len(model.model.layers) == 3 == model.config.num_hidden_layers
    with ax.surgery(model, optimizer, probe=PROBE):
        model.model.layers.append(type(layer_of(model))(model.config, 3))
        counted(model)
    assert ran(model.model.layers, lambda: logits(model)) == [0, 1, 2, 3]


def layer_of(model):
    return model.model.layers[0]


def numbers_of(block):
    return sorted({m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")})


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
def test_23_a_copied_index_mixes_up_the_cache(name):
    kinds = {} if name in ("llama", "gpt2") else {"layer_types": ["full_attention"] * 3}
    model = built(name, **kinds)
    blocks = blocks_of(name, model)
    blocks.insert(1, copy.deepcopy(blocks[0]))  # indices 0, 0, 1, 2
    counted(model)
    if kinds:
        model.config.layer_types.append("full_attention")
    assert ran(blocks, lambda: logits(model)) == [0, 1, 2, 3]
    assert not torch.allclose(cached(model), logits(model), atol=1e-3)  # what it trains is not what it generates

    model = built(name)
    edit = ax.Duplicate(at_of(name), order=[0, 0, 1, 2], output="keep")  # the copies write, as those by hand
    ax.grow(model, edit, adamw(model), probe=PROBE)
    assert [numbers_of(block) for block in blocks_of(name, model)] == [[0], [1], [2], [3]]
    torch.testing.assert_close(cached(model), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("probe", [PROBE, None], ids=["probe", "no probe"])
def test_23_the_same_inside_surgery_is_refused_by_name(probe):
    model = built("llama")
    optimizer = adamw(model)
    with (
        pytest.raises(ax.GrowthError, match=r"model\.layers\.3\.self_attn\.layer_idx is 2, as in 2\. A cache"),
        ax.surgery(model, optimizer, probe=probe),
    ):
        model.model.layers.append(copy.deepcopy(model.model.layers[2]))
        counted(model)
    assert len(model.model.layers) == 3 == model.config.num_hidden_layers
    with ax.surgery(model, optimizer, probe=probe):
        append_a_copy(model)
    torch.testing.assert_close(cached(model), logits(model), atol=1e-5, rtol=0)


def at_of(name):
    return {"gpt2": "transformer.h"}.get(name, "model.layers")


def grads(model, module):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    found = {name: bool(p.grad is not None and p.grad.any()) for name, p in module.named_parameters()}
    model.zero_grad()
    return found


def append_a_copy(model):
    """As careful as by hand one can be: numbered, and counted."""
    twin = copy.deepcopy(model.model.layers[2])
    for m in twin.modules():
        if hasattr(m, "layer_idx"):
            m.layer_idx = 3
    model.model.layers.append(twin)
    counted(model)
    return twin


def zero(*modules):
    for m in modules:
        nn.init.zeros_(m.weight)


def test_29_zeroed_norms_keep_the_function_and_never_learn():
    model = built("llama")
    twin = append_a_copy(model)
    before = logits(built("llama"))
    zero(twin.input_layernorm, twin.post_attention_layernorm)
    assert torch.equal(logits(model), before)  # looks right: the block returns its input
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    assert not any(has for name, has in grads(model, twin).items() if "mlp" in name or "post" in name)
    steps(model, adamw(model), 20)
    dead = [name for name, p in twin.named_parameters() if torch.equal(p, start[name])]
    assert {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"} <= set(dead)

    model = built("llama")
    twin = append_a_copy(model)
    zero(twin.input_layernorm, twin.post_attention_layernorm, twin.self_attn.o_proj, twin.mlp.down_proj)
    assert torch.equal(logits(model), before) and not any(grads(model, twin).values())  # two zeros in one product

    model = built("llama")
    optimizer = adamw(model)
    change = ax.grow(model, ax.Duplicate("model.layers", by=1), optimizer, probe=PROBE)
    twin = model.model.layers[3]
    zeroed = [name for name, p in twin.named_parameters() if not p.any()]
    assert zeroed == ["self_attn.o_proj.weight", "mlp.down_proj.weight"] and torch.equal(logits(model), before)
    assert list(change.writers) == [f"model.layers.3.{name}" for name in zeroed]
    assert [name for name, has in grads(model, twin).items() if has] == zeroed  # the writers first
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    steps(model, optimizer, 2)
    assert not [name for name, p in twin.named_parameters() if torch.equal(p, start[name])]  # then everything


def test_29_a_block_of_two_zeros_in_one_product_is_refused_in_surgery():
    model = built("llama")
    optimizer = adamw(model)
    with (
        pytest.raises(ax.GrowthError, match=r"model\.layers\.3.*no gradient reaches the new weights on the probe"),
        ax.surgery(model, optimizer, probe=PROBE),
    ):
        twin = append_a_copy(model)
        zero(twin.input_layernorm, twin.post_attention_layernorm, twin.self_attn.o_proj, twin.mlp.down_proj)
    assert len(model.model.layers) == 3 == model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_31_a_closure_on_a_module_keeps_calling_the_layer_of_the_original(name, tmp_path):
    def broken(layer):
        with torch.no_grad():
            layer.weight.fill_(float("nan"))

    model = built(name)
    at = f"{at_of(name)}.1.mlp"
    new = nn.Linear(16, 16)
    model.get_submodule(at).register_forward_hook(lambda module, args, out: out + new(out))
    average = torch.optim.swa_utils.AveragedModel(model)
    broken(new)
    assert logits(average.module).isnan().all()  # the average runs the live model's layer
    with pytest.raises((AttributeError, pickle.PicklingError)):
        torch.save(model, tmp_path / "model.pt")

    model = built(name)
    average = torch.optim.swa_utils.AveragedModel(model)
    before = logits(model)
    ax.grow(model, ax.After(at), adamw(model), average, probe=PROBE, stock=False)
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    broken(model.get_submodule(f"{at}._grown.0"))
    assert logits(model).isnan().all()
    for twin in (average.module, copied, loaded):
        assert torch.equal(logits(twin), before)
        broken(twin.get_submodule(f"{at}._grown.0"))
        assert logits(twin).isnan().all()
