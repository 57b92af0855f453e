"""Tiny random checkpoints of transformers in several shards, and the slow way of up-scaling one."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
EXTRA = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertModel",
    "minicpm3": "MiniCPM3ForCausalLM",
}
LISTS = ([0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3])


def model_of(kind: str, depth: int = 4, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model whose every parameter is moved by noise, so that no zero or one hides anything."""
    import transformers

    cls = getattr(transformers, CLASSES[kind])
    config = cls.config_class(**{**SIZES, "num_hidden_layers": depth, **EXTRA.get(kind, {}), **fields})
    model = cls(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.to(dtype).eval()


def save(model: Any, path: Path, shards: int = 4) -> Path:
    """As save_pretrained, in exactly so many shards."""
    model.save_pretrained(path, max_shard_size="100GB")
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards > 1:
        split(path, shards)
    return path


def split(path: Path, shards: int) -> None:
    whole = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, places = list(whole), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: whole[name] for name in part}, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors(path: Path) -> dict[str, Tensor]:
    """Everything that the shards hold; each tensor stands where the index says."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return load_file(path / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    found = {file: load_file(path / file) for file in set(places.values())}
    assert sorted(places) == sorted(name for held in found.values() for name in held)
    return {name: found[file][name] for name, file in places.items()}


def upscaled(old: dict[str, Tensor], sources: Sequence[int]) -> dict[str, Tensor]:
    """The slow, obvious twin: everything in memory, every copy by its name."""
    new = {name: t for name, t in old.items() if not re.search(r"\.\d+\.", name)}
    for position, source in enumerate(sources):
        for name, t in old.items():
            head, found, rest = name.partition(f".{source}.")
            if found and not re.search(r"\.\d+$|\.\d+\.", head):
                new[f"{head}.{position}.{rest}"] = t
    return new


def same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names that differ."""
    differ = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        equal = a.dtype == b.dtype and a.shape == b.shape
        if not equal or not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            differ.append(name)
    return differ


def logits(path: Path) -> Tensor:
    """Of stock transformers, in eval mode, on fixed words."""
    import transformers

    name = json.loads((path / "config.json").read_text())["architectures"][0]
    model, told = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    ids = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model.eval()(ids, use_cache=False)
    return out.logits if "logits" in out else out.last_hidden_state
