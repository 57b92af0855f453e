"""Every tensor of an up-scaled checkpoint, byte by byte: against a slow twin, and mergekit where it is there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LISTS, logits, model_of, same_bytes, save, split, tensors, upscaled
from safetensors.torch import save_file

from auxin.upscale import upscale

pytest.importorskip("transformers")

MERGEKIT = os.environ.get("AUXIN_MERGEKIT") or (sys.executable if importlib.util.find_spec("mergekit") else None)
# The check of transformers 5 that mergekit 0.1.5 runs into, since it does not lengthen layer_types; tensors only here.
RUN = """
import transformers
transformers.Qwen3Config.validate = lambda self: None
from mergekit.scripts.run_yaml import main
main()
"""


@pytest.fixture(scope="module", params=["llama", "qwen3", "mixtral", "mixtral fused"])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    kind, _, fused = request.param.partition(" ")
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    model = model_of(kind, dtype=torch.bfloat16)
    save(model, path, shards=1 if fused else 4)
    if fused:  # as the modules of transformers 5 name them, experts in one tensor
        state = {name: t.contiguous() for name, t in model.state_dict().items()}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        split(path, 4)
    return path


@pytest.mark.parametrize("sources", LISTS, ids=str)
def test_bytes_are_those_of_the_slow_twin(checkpoint: Path, tmp_path: Path, sources: list[int]) -> None:
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    plan = upscale(checkpoint, tmp_path / "deep", order=sources, output="keep")
    assert same_bytes(tensors(tmp_path / "deep"), upscaled(tensors(checkpoint), sources)) == []
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(sources) == len(plan.sources)
    logits(tmp_path / "deep")


@pytest.mark.parametrize("sources", LISTS, ids=str)
def test_zeroed_copies_leave_the_logits_as_they_were(checkpoint: Path, tmp_path: Path, sources: list[int]) -> None:
    plan = upscale(checkpoint, tmp_path / "deep", order=sources)
    assert torch.equal(logits(tmp_path / "deep"), logits(checkpoint))
    found, kept = tensors(tmp_path / "deep"), upscaled(tensors(checkpoint), sources)
    differ = same_bytes(found, kept)
    zeroed = {f"model.layers.{p}.{name}" for p in plan.new for name in plan.constants[sources[p]]}
    assert set(differ) == zeroed and zeroed
    assert all(not found[name].any() for name in zeroed)


@pytest.mark.skipif(MERGEKIT is None, reason="set AUXIN_MERGEKIT to a Python that has mergekit")
@pytest.mark.parametrize("sources", LISTS, ids=str)
def test_bytes_are_those_of_the_passthrough_of_mergekit(
    checkpoint: Path, tmp_path: Path, sources: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    slices = [{"sources": [{"model": str(checkpoint), "layer_range": [s, s + 1]}]} for s in sources]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    arguments = [str(MERGEKIT), "-c", RUN, str(recipe), str(tmp_path / "theirs")]
    subprocess.run(arguments, check=True, capture_output=True, timeout=110)
    upscale(checkpoint, tmp_path / "ours", order=sources, output="keep")
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    if "model.layers.0.block_sparse_moe.gate.weight" in ours:  # mergekit writes the experts in one tensor
        ours = fused(ours)
    assert same_bytes(ours, theirs) == []
    with capsys.disabled():
        print(f"\n{checkpoint.parent.name}, {sources}: {len(ours)} tensors, 0 differ from mergekit's")


def fused(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a Mixtral file as the modules of transformers 5 hold them."""
    new = {n.replace("block_sparse_moe", "mlp"): t for n, t in old.items() if ".experts." not in n}
    for layer in sorted({n.split(".experts.")[0] for n in old if ".experts." in n}):
        count = len({n for n in old if n.startswith(f"{layer}.experts.") and n.endswith("w1.weight")})
        w1, w2, w3 = ([old[f"{layer}.experts.{i}.w{k}.weight"] for i in range(count)] for k in (1, 2, 3))
        at = layer.replace("block_sparse_moe", "mlp")
        new[f"{at}.experts.gate_up_proj"] = torch.stack([torch.cat(p) for p in zip(w1, w3, strict=True)])
        new[f"{at}.experts.down_proj"] = torch.stack(w2)
    return new
