"""What a wider feed-forward layer costs: grown in place, against the network built anew, loaded and mapped.

A GPT of 98 million parameters with AdamW, one of its feed-forward layers 25 % wider. Three ways, interleaved:

- grow: ``ax.grow(model, Widen(...), optimizer, probe=16 tokens)``, the analysis of the widths remembered;
- rebuild: the wider network is built, the old weights are copied into it, a new optimizer gets the mapped states;
- write: the tensors that are new (weights and both moments) are allocated and filled, and nothing else.

And the analysis of widths, first and remembered, for networks like LLaMA, BERT and ResNet-50; and the step of the
widened network over that of one that was written so by hand.

    python benchmarks/widening.py
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax
from auxin.anatomy.probe import PlanContext
from auxin.anatomy.widths.groups import trace_of

WIDTH, DEPTH, HEADS, WORDS, TIMES = 768, 12, 12, 16384, 5


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, hidden: int):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        b, t, _ = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class GPT(nn.Module):
    """A tied language model."""

    def __init__(self, hidden: tuple[int, ...]):
        super().__init__()
        self.embed, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(h) for h in hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T


def trained(hidden: tuple[int, ...], ids: Tensor) -> tuple[GPT, torch.optim.AdamW]:
    """The network after one step."""
    model = GPT(hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step(model, optimizer, ids)
    return model, optimizer


def step(model: nn.Module, optimizer: Any, ids: Tensor) -> None:
    """One step on random words."""
    logits = model(ids)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def rebuilt(model: GPT, optimizer: Any, hidden: tuple[int, ...]) -> tuple[GPT, Any]:
    """The wider network with the old weights and states in it."""
    wide = GPT(hidden)
    other = torch.optim.AdamW(wide.parameters(), lr=1e-4)
    with torch.no_grad():
        for p, q in zip(wide.parameters(), model.parameters(), strict=True):
            corner = tuple(slice(0, size) for size in q.shape)
            p[corner].copy_(q)
            state = optimizer.state[q]
            mapped = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            for key, value in mapped.items():
                value[corner].copy_(state[key])
            other.state[p] = {"step": state["step"].clone(), **mapped}
        wide.blocks[0].down.weight[:, model.blocks[0].down.in_features :] = 0
    return wide, other


def written(model: GPT, wider: int) -> None:
    """What is new, three times: weights and two moments."""
    block = model.blocks[0]
    for shape in ((wider, WIDTH), (wider,), (WIDTH, wider)):
        for old in (None, 0.0, 0.0):
            fresh = torch.randn(shape) if old is None else torch.zeros(shape)
            source = block.up.weight if shape[0] == wider and len(shape) == 2 else block.down.weight
            if len(shape) == 2:
                fresh[: source.shape[0], : source.shape[1]].copy_(source.detach())


def seconds(call: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def growth(probe: Tensor, ids: Tensor) -> None:
    """Print what a growth costs."""
    hidden = (4 * WIDTH,) * DEPTH
    model, optimizer = trained(hidden, ids)
    count = sum(p.numel() for p in model.parameters())
    wider = 5 * WIDTH
    edit = ax.Widen("blocks.0.up", to=wider)
    first = seconds(lambda: ax.grow(model, edit, optimizer, probe=probe, dry_run=True))
    taken: dict[str, list[float]] = {"grow": [], "rebuild": [], "write": []}
    for _ in range(TIMES):
        grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.every(10**6), probe=probe)
        taken["grow"].append(seconds(lambda g=grower: g.grow(edit)))
        grower.undo()
        taken["rebuild"].append(seconds(lambda: rebuilt(model, optimizer, (wider, *hidden[1:]))))
        taken["write"].append(seconds(lambda: written(model, wider)))
    median = {name: statistics.median(values) for name, values in taken.items()}
    print(f"{count / 1e6:.0f} M parameters; one feed-forward layer {4 * WIDTH} -> {wider}")
    print(
        {name: f"{1e3 * value:.0f} ms" for name, value in median.items()}, f"first, with analysis {1e3 * first:.0f} ms"
    )
    print(
        f"rebuild / grow {median['rebuild'] / median['grow']:.1f}, grow / write {median['grow'] / median['write']:.1f}"
    )
    ax.grow(model, edit, optimizer, probe=probe)
    twin, other = trained((wider, *hidden[1:]), ids)
    steps: dict[str, list[float]] = {"grown": [], "by hand": []}
    for _ in range(TIMES):
        steps["grown"].append(seconds(lambda: step(model, optimizer, ids)))
        steps["by hand"].append(seconds(lambda: step(twin, other, ids)))
    print(f"step, grown / by hand {statistics.median(steps['grown']) / statistics.median(steps['by hand']):.3f}")


def analyses() -> None:
    """Print what the analysis costs on real architectures."""
    import transformers

    size = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "vocab_size": 1000}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_hidden_layers=32))
    bert = transformers.BertModel(transformers.BertConfig(**size, num_hidden_layers=12))
    ids = {"input_ids": torch.randint(0, 999, (1, 16))}
    resnet = transformers.ResNetModel(transformers.ResNetConfig())
    image = {"pixel_values": torch.randn(1, 3, 64, 64)}
    for name, model, probe in (("llama", llama, ids), ("bert", bert, ids), ("resnet50", resnet, image)):
        context = PlanContext(model.eval(), probe)
        first, again = (seconds(lambda c=context: trace_of(c)) for _ in range(2))
        print(f"analysis of {name}: {first:.2f} s, again {1e3 * again:.1f} ms")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    growth(torch.randint(0, WORDS, (1, 16)), torch.randint(0, WORDS, (1, 32)))
    analyses()
