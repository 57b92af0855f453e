"""Lists that are not the only one, are named otherwise in the files, or begin with blocks of another kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save

from auxin import GrowthError
from auxin.upscale import upscale

transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
IDS = torch.arange(12)[None]


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**VISION)), {"pixel_values": torch.randn(1, 3, 32, 32)}


def llava() -> Any:
    """Two lists of three blocks, and a configuration with a section for each."""
    text, vision = {**TEXT, "model_type": "llama"}, {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=98)
    return transformers.LlavaForConditionalGeneration(config), {"input_ids": IDS}


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 3}
    config = transformers.T5Config(**sizes, vocab_size=99, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}


def convnext() -> Any:
    sizes = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 3, 1], "image_size": 64, "patch_size": 4}
    return transformers.ConvNextModel(transformers.ConvNextConfig(**sizes)), {"pixel_values": torch.randn(1, 3, 64, 64)}


def deepseek() -> Any:
    """The first block is dense, the others hold experts."""
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
    sizes = {**TEXT, **ranks, **experts, "num_key_value_heads": 4, "topk_group": 1, "first_k_dense_replace": 1}
    return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**sizes)), {"input_ids": IDS}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (vit, {}),
        (llava, {"at": "language_model.model.layers"}),
        (t5, {"at": "decoder.block", "order": [0, 1, 1, 2]}),
        (convnext, {"at": "encoder.stages.2.layers"}),
        (deepseek, {"order": [0, 1, 1, 2, 2]}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_deeper_one_computes_the_same(tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    model, batch = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    save(model, tmp_path / "in")
    plan = upscale(tmp_path / "in", tmp_path / "deep", **options)
    outputs = []
    for path in (tmp_path / "in", tmp_path / "deep"):
        found, told = type(model).from_pretrained(path, output_loading_info=True)
        assert not any(told.values()), told
        with torch.no_grad():
            outputs.append(found.eval()(**batch)[0])
    assert torch.equal(*outputs)
    assert sum(p.numel() for p in found.parameters()) > sum(p.numel() for p in model.parameters())
    assert len(plan.new) == len(plan.sources) - 3


def test_a_kind_of_block_that_the_configuration_counts_from_the_start(tmp_path: Path) -> None:
    save(deepseek()[0], tmp_path / "in")
    with pytest.raises(GrowthError, match=r"model.layers.1 \(from 0\): mlp.down_proj.weight .* this order"):
        upscale(tmp_path / "in", tmp_path / "deep", order=[0, 0, 1, 2])


def test_two_lists_and_none_is_named(tmp_path: Path) -> None:
    save(llava()[0], tmp_path / "in")
    with pytest.raises(GrowthError, match="several lists of blocks could grow .* name one, at="):
        upscale(tmp_path / "in", tmp_path / "deep")
