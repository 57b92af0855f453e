"""How new blocks should start: transformers that predict bytes of the standard library, norms behind or in front.

Every row grows the same network (depth 2, two more blocks) at the same step on the same batches; printed are the worst
loss of the 20 steps after the growth over the mean of the 20 before, and the mean loss of the last 100 steps.

    python benchmarks/new_weights.py --norm post --seeds 5
"""

import argparse
import statistics
import sysconfig
from pathlib import Path

import torch
from torch import nn

import auxin as ax

WIDTH, CONTEXT, BATCH = 48, 48, 16
BEFORE, AFTER = 400, 600


class Layer(nn.Module):
    """A causal transformer block, its norms behind the sums (as in the first transformers) or in front (as in GPT)."""

    def __init__(self, post=False):
        super().__init__()
        self.post = post
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.post:
            x = self.norm1(x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])
            return self.norm2(x + self.mlp(x))
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Bytes(nn.Module):
    def __init__(self, depth, post):
        super().__init__()
        self.embed, self.places = nn.Embedding(256, WIDTH), nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Layer(post) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x):
        x = self.embed(x) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def text():
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def run(data, seed, post, depth, edit=None, rewarm=0):
    torch.manual_seed(seed)
    model = Bytes(depth, post)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(100 + seed)
    losses = []
    for step in range(BEFORE + AFTER):
        if step == BEFORE and edit is not None:
            optimizer.zero_grad()
            probe = data[:CONTEXT].view(1, -1)
            ax.grow(model, edit, optimizer, probe=probe, seed=seed, rewarm=rewarm)
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
        batch = torch.stack([data[s : s + CONTEXT + 1] for s in starts.tolist()])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    bump = max(losses[BEFORE : BEFORE + 20]) / statistics.mean(losses[BEFORE - 20 : BEFORE])
    return bump, statistics.mean(losses[-100:])


PLAIN = {
    "depth 2, never grown": (2, None, 0),
    "depth 4 from the start": (4, None, 0),
    "copies, kept as they are": (2, ax.Duplicate("blocks", by=2, output="keep"), 0),
    "copies, kept, warmed up over 50": (2, ax.Duplicate("blocks", by=2, output="keep"), 50),
    "fresh blocks, as constructed": (2, ax.Duplicate("blocks", by=2, content="fresh", output="keep"), 0),
}
ROWS = {
    "post": PLAIN
    | {
        "copies, faded in over 20 steps": (2, ax.Duplicate("blocks", by=2, fade=20), 0),
        "copies, faded in over 100 steps": (2, ax.Duplicate("blocks", by=2, fade=100), 0),
        "copies, faded in over 400 steps": (2, ax.Duplicate("blocks", by=2, fade=400), 0),
        "fresh blocks, faded in over 100": (2, ax.Duplicate("blocks", by=2, content="fresh"), 0),
    },
    "pre": PLAIN
    | {
        "copies, last writers zero": (2, ax.Duplicate("blocks", by=2), 0),
        "the same, with the copied state": (2, ax.Duplicate("blocks", by=2, state="copy"), 0),
        "the same, warmed up over 50": (2, ax.Duplicate("blocks", by=2), 50),
        "copies stacked, last writers zero": (2, ax.Duplicate("blocks", by=2, order="stack"), 0),
        "fresh blocks, last writers zero": (2, ax.Duplicate("blocks", by=2, content="fresh"), 0),
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", choices=ROWS, default="post")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    seeds = options.seeds
    torch.set_num_threads(1)
    data = text()
    print(f"| {'two more blocks':34} | worst of 20 steps / before | last loss, {seeds} seeds |\n|---|---|---|")
    for name, (depth, edit, rewarm) in ROWS[options.norm].items():
        found = [run(data, seed, options.norm == "post", depth, edit, rewarm) for seed in range(seeds)]
        bumps, lasts = zip(*found, strict=True)
        spread = statistics.stdev(lasts) if seeds > 1 else 0.0
        shown = f"{statistics.median(bumps):.2f} (max {max(bumps):.2f})"
        print(f"| {name:34} | {shown:26} | {statistics.mean(lasts):.3f} +- {spread:.3f} |", flush=True)


if __name__ == "__main__":
    main()
