"""What ``upscale`` does not take, in words that help; nothing is written then, and IN stays as it is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import model_of, save
from safetensors.torch import load_file, save_file

from auxin import GrowthError
from auxin.cli import main
from auxin.upscale import upscale

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(model_of("llama"), tmp_path_factory.mktemp("checkpoint") / "llama")


def index_of(path: Path) -> Path:
    return path / "model.safetensors.index.json"


def shard(path: Path, number: int = 2) -> Path:
    return path / f"model-{number:05}-of-00004.safetensors"


def without_a_shard(path: Path) -> None:
    shard(path).unlink()


def without_its_index(path: Path) -> None:
    index_of(path).unlink()


def cut_off(path: Path) -> None:
    os.truncate(shard(path), shard(path).stat().st_size - 5)


def cut_off_in_the_header(path: Path) -> None:
    os.truncate(shard(path), 40)


def empty_shard(path: Path) -> None:
    os.truncate(shard(path), 0)


def with_bytes_behind(path: Path) -> None:
    with open(shard(path), "ab") as file:
        file.write(b"1234")


def with_a_pickle(path: Path) -> None:
    torch.save({}, path / "training_args.bin")


def only_pickles(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, path / "pytorch_model.pt")


def with_a_link_out(path: Path) -> None:
    shard(path).rename(path.parent / "elsewhere")
    shard(path).symlink_to(path.parent / "elsewhere")


def with_a_linked_directory(path: Path) -> None:
    (path.parent / "folder").mkdir(exist_ok=True)
    (path / "more").symlink_to(path.parent / "folder")


def with_an_unnamed_tensor(path: Path) -> None:
    held = load_file(shard(path))
    save_file({**held, "model.layers.0.extra": torch.ones(1)}, shard(path))


def without_a_named_tensor(path: Path) -> None:
    held = load_file(shard(path))
    held.popitem()
    save_file(held, shard(path))


def with_an_unnamed_file(path: Path) -> None:
    save_file({"x": torch.ones(1)}, path / "consolidated.safetensors")


def with_an_index_that_leads_out(path: Path) -> None:
    index = json.loads(index_of(path).read_text())
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index_of(path).write_text(json.dumps(index))


def with_a_torn_index(path: Path) -> None:
    index_of(path).write_text('{"weight_map": {')


def without_config(path: Path) -> None:
    (path / "config.json").unlink()


def without_a_block(path: Path) -> None:
    for file in path.glob("model-*.safetensors"):
        held = {n: t for n, t in load_file(file).items() if not n.startswith("model.layers.1.")}
        save_file(held, file)
    places = {n: f for n, f in json.loads(index_of(path).read_text())["weight_map"].items()}
    places = {n: f for n, f in places.items() if not n.startswith("model.layers.1.")}
    index_of(path).write_text(json.dumps({"weight_map": places}))


def of_another_depth(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 12}))


def of_an_unknown_class(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["OwnModel"]}))


def quantized(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    way = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": way}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_a_shard, "lacks model-00002-of-00004.safetensors, which its model.safetensors.index.json names"),
        (without_its_index, "and no model.safetensors.index.json"),
        (cut_off, "is cut off: it has .* its header tells of"),
        (cut_off_in_the_header, "is cut off or no safetensors file"),
        (empty_shard, "is cut off or no safetensors file"),
        (with_bytes_behind, "is damaged: it has"),
        (with_a_pickle, r"holds training_args.bin: a pickle runs code .*save_pretrained\('another/directory'\)"),
        (only_pickles, "holds pytorch_model.pt: a pickle"),
        (with_a_link_out, "is a link to .* cp -rL"),
        (with_a_linked_directory, "is a link to"),
        (with_an_unnamed_tensor, "holds model.layers.0.extra, which the index does not name there"),
        (without_a_named_tensor, "lacks .*, which the index places there"),
        (with_an_unnamed_file, "holds consolidated.safetensors beside"),
        (with_an_index_that_leads_out, r"places lm_head.weight in '../other.safetensors', which is no file of this"),
        (with_a_torn_index, "is not valid JSON"),
        (without_config, "has no config.json"),
        (without_a_block, r"no list of blocks that the configuration counts.*model.layers \(3 blocks\)"),
        (of_another_depth, "num_hidden_layers = 12.*shared, or missing"),
        (of_an_unknown_class, "has no model 'OwnModel'.*output='keep' has not"),
        (quantized, "its weights are quantized"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refused(llama: Path, tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    path = tmp_path / "in"
    shutil.copytree(llama, path)
    damage(path)
    before = listing(path)
    with pytest.raises(GrowthError, match=words):
        upscale(path, tmp_path / "out", blocks=2)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]
    assert listing(path) == before


def listing(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": "upside-down"}, "it is one of interleave, stack, middle, solar, or a list"),
        ({"order": 5}, "order=5: it is one of interleave, stack, middle, solar, or a list"),
        ({"order": [0, 1, 2]}, "in order of first use, and at least one of them again, e.g. 0,0,1,1,2,2,..."),
        ({"order": [0, 1, 2, 3]}, "at least one of them again"),
        ({"order": [0, 2, 1, 1, 3]}, "in order of first use"),
        ({"order": [0, 1, 2, 3, 4, 4]}, "each of 0 to 3"),
        ({"order": [0, 0, 1, 2, 3], "blocks": 2}, "the list adds 1 blocks, blocks=2 says otherwise"),
        ({"order": "solar", "blocks": 3}, "4 - 2m: an even number below 4, not 3"),
        ({"order": "middle", "blocks": 5}, "copies each of 4 blocks at most once"),
        ({"blocks": 10**9}, "would make 1,000,000,004 blocks, and 10,000 is the most"),
        ({"blocks": 0}, "the number of new blocks is a whole number from 1"),
        ({"output": "half"}, "it is 'zero' or 'keep'"),
        (
            {"at": "model.blocks"},
            "no tensor is called model.blocks.0 and so on; lists in this checkpoint: model.layers",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit(llama: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(GrowthError, match=words):
        upscale(llama, tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


def test_a_target_that_is_there(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(GrowthError, match="exists and is not empty"):
        upscale(llama, tmp_path / "out", blocks=2)
    assert os.listdir(tmp_path / "out") == ["notes.txt"]
    (tmp_path / "out" / "notes.txt").unlink()
    upscale(llama, tmp_path / "out", blocks=2)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_target_inside_the_source(llama: Path) -> None:
    before = sorted(os.listdir(llama))
    with pytest.raises(GrowthError, match="is inside .* which is never written to"):
        upscale(llama, llama / "deep", blocks=2)
    assert sorted(os.listdir(llama)) == before


def test_a_target_that_is_a_link(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with pytest.raises(GrowthError, match="is a link"):
        upscale(llama, tmp_path / "out", blocks=2)


def test_no_room(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(GrowthError, match=r"needs .* MB, 0.0 MB are free there"):
        upscale(llama, tmp_path / "out", blocks=2)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_gives_up_in_the_middle(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def sync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", sync)
    with pytest.raises(GrowthError, match="cannot be written: .*No space left.*Nothing was left behind"):
        upscale(llama, tmp_path / "out", blocks=2)
    assert os.listdir(tmp_path) == []


def test_a_norm_behind_the_sum_cannot_be_zeroed(tmp_path: Path) -> None:
    save(model_of("bert"), tmp_path / "in")
    with pytest.raises(GrowthError, match="no tensors of a BertLayer can be zeroed .* output='keep' copies it"):
        upscale(tmp_path / "in", tmp_path / "out", blocks=2)
    upscale(tmp_path / "in", tmp_path / "out", blocks=2, output="keep")


def test_a_depth_that_changes_every_block(tmp_path: Path) -> None:
    save(model_of("minicpm3", q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
                  num_key_value_heads=4), tmp_path / "in")  # fmt: skip
    with pytest.raises(GrowthError, match="residual_scale would be .* It would not compute the same"):
        upscale(tmp_path / "in", tmp_path / "out", blocks=2)
    kept = upscale(tmp_path / "in", tmp_path / "out", blocks=2, output="keep")
    assert "residual_scale would be" in str(kept)


def test_shared_blocks(tmp_path: Path) -> None:
    import transformers

    config = transformers.AlbertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=99,
        embedding_size=32,
    )
    save(transformers.AlbertModel(config), tmp_path / "in", shards=1)
    with pytest.raises(
        GrowthError, match="num_hidden_layers = 3.*Blocks that are shared, or missing, cannot be copied"
    ):
        upscale(tmp_path / "in", tmp_path / "out", blocks=1)


def test_a_block_that_only_stands_first(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=99)
    save(transformers.T5ForConditionalGeneration(config), tmp_path / "in")
    with pytest.raises(GrowthError, match="several lists of blocks could grow"):
        upscale(tmp_path / "in", tmp_path / "out", blocks=1)
    with pytest.raises(GrowthError, match="relative_attention_bias.* this order; try another"):
        upscale(tmp_path / "in", tmp_path / "out", order=[0, 0, 1, 2], at="encoder.block")


def test_a_list_of_blocks_that_are_tied(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    save(model_of("llama"), tmp_path / "in")
    own, LlamaForCausalLM._tied_weights_keys = LlamaForCausalLM._tied_weights_keys, {
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"
    }  # fmt: skip
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    try:
        with pytest.raises(GrowthError, match="is tied to a tensor elsewhere"):
            upscale(tmp_path / "in", tmp_path / "out", blocks=1)
    finally:
        LlamaForCausalLM._tied_weights_keys = own


def test_on_the_command_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", str(llama), str(tmp_path / "out"), "--order", "sideways"]) == 1
    assert "auxin upscale: order='sideways'" in capsys.readouterr().err
    assert main(["upscale", str(tmp_path / "none"), str(tmp_path / "out")]) == 1
    assert "is no directory" in capsys.readouterr().err
