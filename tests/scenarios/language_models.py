"""Five tiny language models of transformers with random weights, and what is asked of each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IDS = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))
WORDS = dict(vocab_size=41, bos_token_id=0, eos_token_id=1, pad_token_id=2)
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
HEADS = dict(num_key_value_heads=1, head_dim=8, sliding_window=4, layer_types=KINDS)


class Kind(NamedTuple):
    """Names of the classes in transformers, where the blocks are, and the fields of the configuration."""

    model: str
    config: str
    at: str
    fields: dict[str, Any]


KNOWN = {
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", "model.layers", SIZES),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", "model.layers", SIZES | HEADS | {"use_sliding_window": True}),
    "gemma3": Kind("Gemma3ForCausalLM", "Gemma3TextConfig", "model.layers", SIZES | HEADS),
    "gpt2": Kind("GPT2LMHeadModel", "GPT2Config", "transformer.h", dict(n_embd=16, n_layer=3, n_head=2)),
    "bert": Kind("BertLMHeadModel", "BertConfig", "bert.encoder.layer", SIZES | {"is_decoder": True}),
}


def built(name: str, **fields: Any) -> Any:
    """The model in eval mode, every parameter moved by noise, so that no zero or one hides anything."""
    import transformers

    kind = KNOWN[name]
    config = getattr(transformers, kind.config)(**{**kind.fields, **WORDS, **fields})
    torch.manual_seed(0)
    model = getattr(transformers, kind.model)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


def blocks_of(name: str, model: nn.Module) -> nn.ModuleList:
    """The list of blocks."""
    found = model.get_submodule(KNOWN[name].at)
    assert isinstance(found, nn.ModuleList)
    return found


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Without decay, so that only gradients move anything."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)


def logits(model: Callable[..., Any]) -> Tensor:
    """All tokens at once, without a cache."""
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def cached(model: Callable[..., Any]) -> Tensor:
    """Token by token, each step seeing the past through the cache only."""
    past, found = None, []
    with torch.no_grad():
        for token in IDS.split(1, dim=1):
            out = model(token, past_key_values=past, use_cache=True)
            past, found = out.past_key_values, [*found, out.logits]
    return torch.cat(found, dim=1)


def tokens(model: Any, **options: Any) -> Tensor:
    """What it writes on, greedily."""
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, **options)


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    """Some steps of plain training on the words themselves."""
    losses = []
    for _ in range(count):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ran(blocks: nn.ModuleList, run: Callable[[], Any]) -> list[int]:
    """Positions of the blocks that ran, in the order in which they did."""
    order: list[int] = []
    handles = [block.register_forward_hook(lambda *_, i=i: order.append(i)) for i, block in enumerate(blocks)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return order
