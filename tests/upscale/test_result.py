"""What stands in an up-scaled directory: configuration, shards, record; several kinds of models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import logits, model_of, same_bytes, save, tensors, upscaled
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from auxin import GrowthError
from auxin.cli import main
from auxin.upscale import freeze_old, new_blocks, plan_upscale, upscale

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(model_of("llama", tie_word_embeddings=True), tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.mark.parametrize("order", ["interleave", "stack", "middle", "solar"])
def test_every_order_keeps_the_logits(llama: Path, tmp_path: Path, order: str) -> None:
    plan = upscale(llama, tmp_path / "deep", blocks=2, order=order)
    assert len(plan.sources) == 6 and torch.equal(logits(tmp_path / "deep"), logits(llama))


def test_solar_is_the_one_of_the_paper(llama: Path, tmp_path: Path) -> None:
    assert plan_upscale(llama, tmp_path / "deep", order="solar").sources == (0, 1, 2, 1, 2, 3)  # m is a quarter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "gpt2", "qwen3"])
def test_several_kinds(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Norms behind the writers close their gain (at -1 where it is stored as 1 + w), sliding layers stay sliding."""
    small = {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64} if kind == "gpt2" else {}
    save(model_of(kind, dtype=dtype, **small), tmp_path / "in")
    plan = upscale(tmp_path / "in", tmp_path / "deep", blocks=3)
    assert torch.equal(logits(tmp_path / "deep"), logits(tmp_path / "in"))
    values = {value for constants in plan.constants.values() for value in constants.values()}
    assert (-1.0 in values) == (kind == "gemma2")


def test_layers_of_two_kinds_are_solved_each(tmp_path: Path) -> None:
    types = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    config = transformers.Qwen3NextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=99, layer_types=types, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    save(transformers.Qwen3NextForCausalLM(config), tmp_path / "in")
    plan = upscale(tmp_path / "in", tmp_path / "deep", blocks=2)
    written = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert written["layer_types"] == [types[source] for source in plan.sources]
    assert torch.equal(logits(tmp_path / "deep"), logits(tmp_path / "in"))
    twice = upscale(tmp_path / "in", tmp_path / "both")
    assert len({tuple(names) for names in twice.constants.values()}) == 2
    assert torch.equal(logits(tmp_path / "both"), logits(tmp_path / "in"))


def test_one_block_becomes_two(tmp_path: Path) -> None:
    save(model_of("llama", depth=1), tmp_path / "in", shards=1)
    upscale(tmp_path / "in", tmp_path / "deep")
    assert torch.equal(logits(tmp_path / "deep"), logits(tmp_path / "in"))


def test_one_file_stays_one(tmp_path: Path) -> None:
    save(model_of("qwen3"), tmp_path / "in", shards=1)
    upscale(tmp_path / "in", tmp_path / "deep", blocks=4)
    assert [name for name in os.listdir(tmp_path / "deep") if "model" in name] == ["model.safetensors"]
    assert torch.equal(logits(tmp_path / "deep"), logits(tmp_path / "in"))


def test_twice_in_a_row(llama: Path, tmp_path: Path) -> None:
    upscale(llama, tmp_path / "first", blocks=1)
    upscale(tmp_path / "first", tmp_path / "second", blocks=2)
    assert torch.equal(logits(tmp_path / "second"), logits(llama))
    assert len(new_blocks(tmp_path / "second")) == 2


def test_shards_index_and_other_files(llama: Path, tmp_path: Path) -> None:
    (llama / "original").mkdir(exist_ok=True)
    (llama / "original" / "params.json").write_text("{}")
    plan = upscale(llama, tmp_path / "deep", blocks=4)
    deep = tmp_path / "deep"
    sizes = [sum(s.size for s in plan.checkpoint.tensors.values() if s.file.name == f) for f in plan.checkpoint.shards]
    files = sorted(deep.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file in files:
        with safe_open(file, "pt") as held:
            assert held.metadata() == {"format": "pt"}
            assert sum(held.get_tensor(n).nbytes for n in held.keys()) <= max(sizes)
    index = json.loads((deep / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(deep).values())
    assert (deep / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert (deep / "original" / "params.json").exists() and (deep / "generation_config.json").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    raw, new = (json.loads((path / "config.json").read_text()) for path in (llama, deep))
    assert new == {**raw, "num_hidden_layers": 8} and list(new) == list(raw)


def test_mixed_dtypes_are_aligned(tmp_path: Path) -> None:
    model = model_of("llama", dtype=torch.bfloat16)
    model.model.norm.float()
    save(model, tmp_path / "in")
    upscale(tmp_path / "in", tmp_path / "deep", order=[0, 0, 1, 2, 3], output="keep")
    assert same_bytes(tensors(tmp_path / "deep"), upscaled(tensors(tmp_path / "in"), [0, 0, 1, 2, 3])) == []


def test_links_inside_are_read(llama: Path, tmp_path: Path) -> None:
    save(model_of("llama"), tmp_path / "in", shards=1)
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / "weights")
    (tmp_path / "in" / "model.safetensors").symlink_to("weights")
    upscale(tmp_path / "in", tmp_path / "deep", blocks=1, output="keep")
    assert not (tmp_path / "deep" / "model.safetensors").is_symlink()


def test_keep_goes_without_the_class_of_the_model(llama: Path, tmp_path: Path) -> None:
    save(model_of("llama"), tmp_path / "in")
    raw = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**raw, "architectures": ["OwnModel"]}))
    plan = upscale(tmp_path / "in", tmp_path / "deep", order=[0, 1, 1, 2, 3], output="keep")
    assert "not checked: transformers" in str(plan)
    assert same_bytes(tensors(tmp_path / "deep"), upscaled(tensors(tmp_path / "in"), [0, 1, 1, 2, 3])) == []


def test_the_plan_on_the_command_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["upscale", str(llama), str(tmp_path / "deep"), "--blocks", "2", "--dry-run"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "model.layers of 4 blocks becomes 6" in told and "0 1 1* 2 3 3*" in told
    assert "self_attn.o_proj.weight" in told and "mlp.down_proj.weight" in told
    assert "num_hidden_layers: 4 -> 6" in told
    assert os.listdir(tmp_path) == []
    assert main(arguments[:-1]) == 0
    out = capsys.readouterr()
    assert "is written; its new blocks are 2, 5" in out.out and "100 %" in out.err


def test_only_the_new_blocks_train(llama: Path, tmp_path: Path) -> None:
    upscale(llama, tmp_path / "deep", blocks=2)
    assert new_blocks(tmp_path / "deep") == ["model.layers.2", "model.layers.5"]
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "deep")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = freeze_old(model, tmp_path / "deep")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, 90, (4, 12))
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    new = {name for name in before if name.startswith(("model.layers.2.", "model.layers.5."))}
    assert moved == new and set(frozen) == before.keys() - new


def test_a_bare_body_has_the_new_blocks_too(llama: Path, tmp_path: Path) -> None:
    upscale(llama, tmp_path / "deep", blocks=1)
    body = transformers.LlamaModel.from_pretrained(tmp_path / "deep")
    freeze_old(body, tmp_path / "deep")
    assert {n.split(".")[1] for n, p in body.named_parameters() if p.requires_grad} == {"4"}


def test_a_directory_without_a_record(llama: Path) -> None:
    with pytest.raises(GrowthError, match="has no auxin.json of auxin upscale"):
        new_blocks(llama)


def test_another_network_has_no_such_blocks(llama: Path, tmp_path: Path) -> None:
    upscale(llama, tmp_path / "deep", blocks=1)
    with pytest.raises(GrowthError, match="Linear has no module model.layers.4, a new block of"):
        freeze_old(torch.nn.Linear(2, 2), tmp_path / "deep")


def test_the_package_is_imported_on_demand() -> None:
    program = "import sys, auxin.cli; print([n for n in sys.modules if n in ('transformers', 'auxin.upscale')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("number", ["01", "\u0663", "+1", "99999999999"])
def test_what_only_looks_like_the_number_of_a_block_stays_as_it_is(tmp_path: Path, number: str) -> None:
    """As 1 it would take the place of the tensor of that name."""
    path = save(model_of("llama"), tmp_path / "in", shards=1)
    held = load_file(path / "model.safetensors")
    odd = f"model.layers.{number}.mlp.up_proj.weight"
    save_file({**held, odd: torch.full((2,), 7.0)}, path / "model.safetensors", metadata={"format": "pt"})
    upscale(path, tmp_path / "out", blocks=1, output="keep")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(made.pop(odd), torch.full((2,), 7.0))
    assert same_bytes(made, upscaled(held, [0, 1, 2, 3, 3])) == []
