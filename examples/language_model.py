"""A model of bytes learns Python from the sources of the standard library, and grows from 2 to 6 layers as it does.

    python examples/language_model.py        # some minutes on two cores; --quick: seconds, means nothing

It grows in the stable phase of the learning rate, by copies that start at zero; the decay begins when a limit keeps it
from growing again. Networks that have 6 or 2 layers from the start get the same training FLOPs, and their own decay.
Printed are bits per byte of the averaged weights on files that none of them has seen.
"""

import math
import sys
import sysconfig
import tempfile
from pathlib import Path
from statistics import mean

import torch
from torch import nn

import auxin as ax

LENGTH, BATCH, DIM = 128, 16, 96


class GPT(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, DIM), nn.Embedding(LENGTH, DIM)
        kind = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, **kind) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 256)

    def forward(self, text):
        x = self.bytes(text) + self.places.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for block in self.blocks:
            x = block(x, mask, is_causal=True)
        return self.head(self.norm(x))


def sources():
    """The standard library as two long rows of bytes: every twentieth file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = [bytearray(file.read_bytes()) for file in files if "site-packages" not in file.parts]
    parts = [text for i, text in enumerate(texts) if i % 20], texts[::20]
    return [torch.frombuffer(bytearray().join(part), dtype=torch.uint8) for part in parts]


def windows(text, count):
    return text[torch.randint(len(text) - LENGTH, (count, 1)) + torch.arange(LENGTH + 1)].long()


def loss_of(model, window):
    return nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def flops_of(model):
    """One training step: 6 for each byte and weight, 12 for each byte, byte that it looks at, channel and layer."""
    weights = sum(p.numel() for p in model.parameters()) - (256 + LENGTH) * DIM
    return BATCH * LENGTH * (6 * weights + 12 * LENGTH * DIM * len(model.blocks))


def train(depth, data, steps, log=None):
    """Train and print how well it does; returns its FLOPs. With `log`, a directory, it grows after each quarter."""
    torch.manual_seed(0)
    model, grower, spent = GPT(depth), None, 0
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    sched = ax.schedule.wsd(opt, warmup=steps // 20, decay=steps // 4, total=None if log else steps)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    if log:
        limit, probe = sum(p.numel() for p in GPT(6).parameters()), windows(data[0], BATCH)[:, :-1]
        terms = {"when": ax.when.every(steps // 4), "limit": ax.Limit(parameters=limit), "probe": probe, "log": log}
        grower = sched.grower = ax.Grower(model, opt, sched, ema, edits=ax.Duplicate("blocks", by=2), **terms)
    for step in range(steps):
        loss = loss_of(model, windows(data[0], BATCH))
        loss.backward()
        opt.step()
        opt.zero_grad()
        sched.step()
        ema.update_parameters(model)
        spent += flops_of(model)
        if grower and (change := grower.step(loss.item())):
            print(f"  step {step}: {change}", flush=True)
    torch.manual_seed(1)  # the same windows for each network
    with torch.no_grad():
        bits = mean(loss_of(ema, windows(data[1], 64)).item() for _ in range(min(16, steps // 4))) / math.log(2)
    print(f"{depth} -> {len(model.blocks)} layers: {bits:.3f} bits per byte, {steps} steps, {spent / 1e12:.2f} TFLOP")
    return spent


def main(steps):
    data, log = sources(), tempfile.mkdtemp()
    spent = train(2, data, steps, log)
    for depth in (6, 2):
        train(depth, data, spent // flops_of(GPT(depth)))
    print(f"the grown run: auxin report {log}")


if __name__ == "__main__":
    main(12 if "--quick" in sys.argv else 800)
