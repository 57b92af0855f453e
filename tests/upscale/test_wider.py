"""Wider checkpoints on disk: plain transformers opens them, and they compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import logits, model_of, save, tensors

from auxin import GrowthError
from auxin.cli import main
from auxin.upscale import new_blocks, plan_wider, upscale, widen

transformers = pytest.importorskip("transformers")
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64}
FFN = {"intermediate_size": 64}


def saved(path: Path, kind: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Path:
    torch.manual_seed(0)
    return save(model_of(kind, dtype=dtype, **fields), path / "in")


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("llama", {"ffn": 16}, FFN),
        ("llama", {"heads": 4}, {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
        ("qwen3", {"ffn": 16, "heads": 2}, FFN | {"num_attention_heads": 6, "num_key_value_heads": 2}),
        ("gemma2", {"ffn": 16}, FFN),
        ("gpt2", {"ffn": 16}, {"n_inner": 144}),
        ("bert", {"ffn": 16}, FFN),
        ("mixtral", {"heads": 2}, {"num_attention_heads": 6}),
    ],
    ids=str,
)
def test_the_logits_stay(tmp_path: Path, kind: str, more: Any, said: Any, dtype: torch.dtype) -> None:
    if kind == "mixtral" and dtype == torch.float64:
        pytest.skip("torch multiplies groups of experts in float32 at most")
    source = saved(tmp_path, kind, dtype, **(GPT2 if kind == "gpt2" else {}))
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    plan = widen(source, tmp_path / "out", **more)
    a, b = logits(source), logits(tmp_path / "out")
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * float(a.abs().max())
    assert a.dtype == b.dtype == dtype and float((a - b).abs().max()) <= limit
    assert config_of(tmp_path / "out").items() >= said.items()
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    old, new = tensors(source), tensors(tmp_path / "out")
    assert sorted(old) == sorted(new) and {n for n in old if old[n].shape != new[n].shape} == set(plan.widened)
    assert new_blocks(tmp_path / "out") == []


def test_what_makes_new_units_starts_at_random_and_what_reads_them_at_zero(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama")
    widen(source, tmp_path / "out", ffn=16)
    widen(source, tmp_path / "again", ffn=16)
    old, new, again = tensors(source), tensors(tmp_path / "out"), tensors(tmp_path / "again")
    for block in range(4):
        name = f"model.layers.{block}.mlp."
        for made in ("gate_proj", "up_proj"):
            assert torch.equal(new[f"{name}{made}.weight"][:48], old[f"{name}{made}.weight"])
            spread = float(new[f"{name}{made}.weight"][48:].std() / old[f"{name}{made}.weight"].std())
            assert 0.8 < spread < 1.25
        assert torch.equal(new[f"{name}down_proj.weight"][:, :48], old[f"{name}down_proj.weight"])
        assert not new[f"{name}down_proj.weight"][:, 48:].any()
    assert not torch.equal(new["model.layers.0.mlp.up_proj.weight"][48:], new["model.layers.1.mlp.up_proj.weight"][48:])
    assert all(torch.equal(new[name], again[name]) for name in new)


def test_wider_and_then_deeper_learns(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama", torch.float32)
    widen(source, tmp_path / "wide", ffn=16)
    upscale(tmp_path / "wide", tmp_path / "both", blocks=2)
    assert torch.allclose(logits(tmp_path / "both"), logits(source), rtol=0, atol=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 90, (2, 12))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.model.layers[0].mlp.down_proj.weight[:, 48:].abs().sum(0).all()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path, "llama")
    assert main(["upscale", str(source), str(tmp_path / "out"), "--ffn", "+16", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "model.layers of 4 blocks becomes wider" in told and "intermediate_size: 48 -> 64" in told
    assert "model.layers.*.mlp.down_proj.weight (32, 48) -> (32, 64), new entries zeros" in told
    assert not (tmp_path / "out").exists()
    assert main(["upscale", str(source), str(tmp_path / "out"), "--ffn", "16", "--blocks", "2"]) == 1
    assert "do one, and then the other with its OUT as IN" in capsys.readouterr().err
    assert main(["upscale", str(source), str(tmp_path / "out"), "--ffn", "16"]) == 0
    assert "its blocks are wider" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("gpt2", {"heads": 2}, "no field of the configuration about heads says the new width"),
        ("bert", {"heads": 2}, "no field of the configuration about heads says the new width"),
        ("llama", {"heads": 2}, "no field of the configuration about heads says the new width"),  # 32 in 6 heads
        ("llama", {"heads": 3}, "grows in steps of 2"),
        ("olmo2", {"heads": 4}, r"unit='heads', init='tile'\) keeps the function"),  # zeroed ones would never learn
        ("mixtral", {"ffn": 16}, "gate_up_proj would get wider, and the files hold it in another form"),
        ("llama", {}, "pass a whole number from 1"),
        ("llama", {"ffn": 0}, "pass a whole number from 1"),
    ],
    ids=str,
)
def test_refused_with_the_reason(tmp_path: Path, kind: str, more: Any, why: str) -> None:
    source = saved(tmp_path, kind, torch.float32, **(GPT2 if kind == "gpt2" else {}))
    with pytest.raises(GrowthError, match=why):
        plan_wider(source, tmp_path / "out", **more)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
