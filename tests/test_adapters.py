"""Adapters of PEFT on a network that grows: what a saved file does not hold is said when it is saved."""

import copy
import pickle
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import auxin as ax

peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

IDS = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(2))
PROBE = {"input_ids": IDS}
ALL, QUERIES = ["q_proj", "o_proj", "down_proj"], ["q_proj"]  # frozen zeros cut off the second: such a copy fades in
LACKS = r"save_pretrained writes the adapters, and not what auxin has changed below them \(.*{}.*merge_and_unload"
FADES = r"save_pretrained: .*model.layers.2 fades in, and is open to 0\.\d+\. .* Save when the fade is over"


def base():
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))


def adapted(targets=ALL):
    return peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=targets))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(model, optimizer, steps=3):
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def grown(model, at="base_model.model.model.layers", **options):
    optimizer = optimizer_of(model)
    ax.grow(model, ax.Duplicate(at, by=1, **options), optimizer, probe=PROBE)
    trained(model, optimizer)
    return optimizer


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def silent(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return call(*args)


def test_saving_adapters_says_that_the_block_below_is_not_saved(tmp_path):
    """As PEFT reloads it, another function; what the warning names gives the same one."""
    model = adapted()
    silent(model.save_pretrained, tmp_path / "before")
    grown(model)
    expected = logits(model)
    with pytest.warns(UserWarning, match=LACKS.format(r"base_model.model.model.layers.2")):
        model.save_pretrained(tmp_path / "adapters")
    assert not torch.allclose(
        logits(peft.PeftModel.from_pretrained(base(), tmp_path / "adapters")), expected, atol=1e-3
    )
    whole = model.merge_and_unload()
    silent(whole.save_pretrained, tmp_path / "whole")
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path / "whole")), expected, atol=1e-5)


IN_A_NEW_PROCESS = """
import sys
import peft, torch, transformers
base, adapters, file = sys.argv[1:]
model = transformers.LlamaForCausalLM.from_pretrained(base)
model = peft.PeftModel.from_pretrained(model, adapters) if adapters else model
ids, expected = torch.load(file)
assert len(model.get_submodule("base_model.model.model" if adapters else "model").layers) == 3
assert torch.allclose(model.eval()(ids).logits, expected, atol=1e-5)
"""


@pytest.mark.parametrize(("apart", "targets"), [(True, QUERIES), (False, ALL)], ids=["apart", "merged"])
def test_what_the_warning_names_is_the_same_function_in_a_new_process(apart, targets, tmp_path):
    model = adapted(targets)
    optimizer = grown(model, fade=2)
    torch.save((IDS, logits(model)), tmp_path / "expected.pt")
    if apart:
        with pytest.warns(UserWarning, match=r"copy.deepcopy\(model\).unload\(\).save_pretrained\(base\)"):
            model.save_pretrained(tmp_path / "adapters")
        silent(copy.deepcopy(model).unload().save_pretrained, tmp_path / "base")
        trained(model, optimizer)
    else:
        silent(model.merge_and_unload().save_pretrained, tmp_path / "base")
    words = tmp_path / "base", tmp_path / "adapters" if apart else "", tmp_path / "expected.pt"
    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, *map(str, words)], check=True)


def test_a_run_that_auxin_saves_trains_on_in_adapters_of_a_new_model(tmp_path):
    def run():
        model = adapted()
        words = {"edits": ax.Duplicate("base_model.model.model.layers", by=1), "when": ax.when.every(1)}
        return model, ax.Grower(model, optimizer_of(model), probe=PROBE, **words)

    model, grower = run()
    assert grower.step() is not None
    trained(model, grower.companions[0])
    ax.save(grower, tmp_path / "run")
    other, going_on = run()
    ax.load(tmp_path / "run", going_on)
    for one, optimizer in ((model, grower.companions[0]), (other, going_on.companions[0])):
        trained(one, optimizer)
    assert torch.equal(logits(other), logits(model))


def by_the_trainer(model, path):
    arguments = transformers.TrainingArguments(path, report_to=[], use_cpu=True, save_strategy="no")
    transformers.Trainer(model, arguments).save_model(path)


def in_an_adapter_of_its_own_name(model, path):
    model.save_pretrained(path, selected_adapters=["default"])


def a_copy(model, path):
    copy.deepcopy(model).save_pretrained(path)


def from_a_pickle(model, path):
    pickle.loads(pickle.dumps(model)).save_pretrained(path)


def without_safetensors(model, path):
    model.save_pretrained(path, safe_serialization=False)


@pytest.mark.parametrize(
    "save", [by_the_trainer, in_an_adapter_of_its_own_name, a_copy, from_a_pickle, without_safetensors]
)
def test_every_way_of_saving_adapters_says_it(save, tmp_path):
    model = adapted()
    grown(model)
    with pytest.warns(UserWarning, match=LACKS.format("layers.2")):
        save(model, str(tmp_path))


def test_grown_inside_of_the_wrapper(tmp_path):
    model = adapted()
    grown(model.base_model.model, at="model.layers")
    with pytest.warns(UserWarning, match=LACKS.format("model.layers.2")):
        model.save_pretrained(tmp_path)


def removed(model):
    ax.grow(model, ax.Remove("base_model.model.model.layers.0"), optimizer_of(model), probe=PROBE)


def replaced(model):
    with ax.surgery(model, optimizer_of(model)):
        model.base_model.model.lm_head = torch.nn.Linear(8, 5, bias=False)


def resized(model):
    with ax.surgery(model, optimizer_of(model)):
        head = model.base_model.model.lm_head
        head.weight.data = torch.cat([head.weight.data, torch.zeros(2, 8)])
        head.out_features = 32


@pytest.mark.parametrize(
    ("change", "where"), [(removed, r"model.layers.0 \(gone\)\)"), (replaced, "lm_head"), (resized, "lm_head")]
)
def test_other_changes_below_adapters_are_no_more_in_the_file(change, where, tmp_path):
    model = adapted()
    change(model)
    with pytest.warns(UserWarning, match=LACKS.format(where)):
        model.save_pretrained(tmp_path)


def test_what_adapters_hold_themselves_needs_no_warning(tmp_path):
    """Adapters that are put in by surgery, dry runs, growths that were undone, and a thawed bias."""
    model, optimizer = adapted(), None
    with ax.surgery(model):
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=ALL))
    ax.grow(model, ax.Duplicate("base_model.model.model.layers", by=1), optimizer_of(model), probe=PROBE, dry_run=True)
    optimizer = optimizer_of(model)
    words = {"edits": ax.Duplicate("base_model.model.model.layers", by=1), "when": ax.when.every(1), "probe": PROBE}
    grower = ax.Grower(model, optimizer, **words)
    assert grower.step() is not None
    grower.undo()
    silent(model.save_pretrained, tmp_path)
    assert all("save_pretrained" not in vars(config) for config in model.peft_config.values())


def test_a_second_growth_adds_to_what_is_named(tmp_path):
    model = adapted()
    optimizer = grown(model)
    with ax.surgery(model, optimizer):
        model.base_model.model.lm_head = torch.nn.Linear(8, 5, bias=False).requires_grad_(False)
    ax.grow(model, ax.Duplicate("base_model.model.model.layers", by=1), optimizer, probe=PROBE, dry_run=True)
    with pytest.warns(UserWarning, match=LACKS.format(r"layers.2, base_model.model.lm_head")):
        model.save_pretrained(tmp_path)


# ---- while a block fades in


def test_merged_and_saved_while_a_block_fades_in(tmp_path):
    model = adapted(QUERIES)
    optimizer = grown(model, fade=6)
    assert any(name.endswith("auxin_gate") for name, _ in model.named_buffers())
    whole = copy.deepcopy(model).merge_and_unload()
    expected = logits(model)
    assert torch.allclose(logits(whole), expected, atol=1e-5)  # in this process it goes on as it is
    with pytest.warns(UserWarning, match=FADES):
        whole.save_pretrained(tmp_path / "fading")
    assert not torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path / "fading")), expected, atol=1e-4)
    with pytest.warns(UserWarning, match=FADES):
        model.save_pretrained(tmp_path / "adapters")
    model.train()
    trained(model, optimizer)
    whole = model.merge_and_unload()
    silent(whole.save_pretrained, tmp_path / "whole")
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path / "whole")), logits(whole), atol=1e-5)
    assert not whole.model.layers[2]._state_dict_pre_hooks


def test_a_stock_model_saved_while_a_block_fades_in(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = BertForSequenceClassification(BertConfig(**sizes))
    optimizer = optimizer_of(model)
    ax.grow(model, ax.Duplicate("bert.encoder.layer", by=1, fade=9), optimizer, probe=PROBE, stock=False)
    silent(model.state_dict)  # a checkpoint of a Grower keeps the gate
    silent(copy.deepcopy, model)
    with pytest.warns(UserWarning, match=r"save_pretrained: bert.encoder.layer.2 fades in, and is open to 0\."):
        model.save_pretrained(tmp_path)


def test_a_grower_keeps_the_gate_when_it_saves():
    model = adapted(QUERIES)
    optimizer = optimizer_of(model)
    words = {"edits": ax.Duplicate("base_model.model.model.layers", by=1, fade=6), "when": ax.when.every(1)}
    grower = ax.Grower(model, optimizer, probe=PROBE, **words)
    assert grower.step() is not None
    trained(model, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        silent(ax.save, grower, f"{folder}/run")
