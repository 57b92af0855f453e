"""Do predicted gains order candidates as training does? Rank correlation over many edits of three small networks.

An MLP and a small CNN on the digits, a small GPT on bytes of Python's own standard library, each trained a while with
AdamW. Then, for every candidate (one width or all of a kind, by several amounts, one block more here or there):

- predicted: the gain by which `choose.by_gain` chooses, loss per step;
- one step: what one real optimizer step on everything takes off the loss on validation data, with the batch that comes
  next, and the mean over the eight that do;
- 128 steps: the same after 128 steps on the same batches.

Spearman's rank correlation of predicted and obtained, for each seed; 1 is the same order. Nothing was tuned on it.

    python benchmarks/predicted_gain.py [--seeds N]            # needs scikit-learn
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from gpt import GPT
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax
from auxin.race import probed, shown

STEPS, NEXT, LATER = 200, 8, 128


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(x / 16).float()[order], torch.as_tensor(y)[order]


def of_digits(image: bool) -> ax.Evidence:
    x, y = digits()
    x = x.view(-1, 1, 8, 8) if image else x
    batches = list(zip(x.split(64), y.split(64), strict=True))
    return ax.Evidence(lambda m, b: F.cross_entropy(m(b[0]), b[1]), batches[:16], validation=batches[16:])


def of_bytes() -> ax.Evidence:
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join((folder / f"{name}.py").read_bytes() for name in ("argparse", "ast", "inspect", "typing"))
    ids = torch.tensor(list(text))
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    batches = list(rows.split(16))[:72]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    return ax.Evidence(loss, batches[:64], validation=batches[64:])


class Block(nn.Module):
    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Sequential(Block(), Block()), nn.Linear(24, 10))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((1, 6), (6, 8), (8, 8)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
    )


def gpt() -> nn.Module:
    return GPT(depth=3, dim=32, heads=4, length=64)


MLP_EDITS = [
    *(ax.Widen(at, by=by) for at in ("0", "2.0.up", "2.1.up", "2.*.up") for by in (4, 8, 16, 32)),
    *(ax.Duplicate("2", by=by, order=order) for by in (1, 2) for order in ("last", "interleave", "stack")),
]
CNN_EDITS = [
    *(ax.Widen(at, by=by) for at in ("0", "3", "6", "11") for by in (2, 4, 8, 16)),
    *(ax.After(at) for at in ("0", "2", "5", "8", "11")),
]
GPT_EDITS = [
    *(ax.Widen(at, by=by) for at in ("blocks.0.up", "blocks.1.up", "blocks.2.up", "blocks.*.up") for by in (16, 64)),
    *(ax.Duplicate("blocks", by=by, order=order) for by in (1, 2) for order in ("last", "interleave")),
    *(ax.Widen("tokens", by=by) for by in (8, 16)),
    *(ax.After(at) for at in ("blocks.0", "blocks.2", "norm")),
]


def ranks(values: list[float]) -> Tensor:
    """Ranks, equal ones in the middle of theirs."""
    v = torch.tensor(values, dtype=torch.float64)
    return ((v.unsqueeze(1) > v).double() + 0.5 * (v.unsqueeze(1) == v).double()).sum(1)


def spearman(a: list[float], b: list[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def compared(build, evidence: ax.Evidence, edits: list, seed: int) -> list[tuple[float, ...]]:
    """By candidate: predicted, and obtained after one step, the mean of such steps, and after many."""
    torch.manual_seed(seed)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    evidence.train(net, [optimizer], STEPS)
    probe = evidence.batches[0]
    probe = probe[0] if isinstance(probe, tuple) else probe
    grower = ax.Grower(net, optimizer, edits=edits, when=ax.when.every(10**9), probe=probe, evidence=evidence)
    before = evidence.validate(net)
    rows = []
    for edit in edits:
        look = probed(grower, edit, 8)
        if look.why_not:
            raise SystemExit(f"{edit}: {look.why_not}")
        obtained = []
        for steps, skipped in [*((1, number) for number in range(NEXT)), (LATER, 0)]:
            with grower.trial(edit):
                evidence.train(net, [optimizer], steps, STEPS + skipped)
                obtained.append(before - evidence.validate(net))
        rows.append((look.gain, obtained[0], statistics.mean(obtained[:-1]), obtained[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="every candidate")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, auxin {ax.__version__}; {STEPS} steps before\n"
    )
    networks = {
        "MLP on the digits": (mlp, of_digits(False), MLP_EDITS),
        "CNN on the digits": (cnn, of_digits(True), CNN_EDITS),
        "GPT on bytes": (gpt, of_bytes(), GPT_EDITS),
    }
    for name, (build, evidence, edits) in networks.items():
        begin, found = time.process_time(), []
        for seed in range(arguments.seeds):
            rows = compared(build, evidence, edits, seed)
            predicted, *obtained = (list(column) for column in zip(*rows, strict=True))
            found.append([spearman(predicted, one) for one in obtained])
            for edit, row in zip(edits, rows, strict=True):
                if arguments.show:
                    print("   ", " ".join(f"{value:10.6f}" for value in row), shown(edit))
        print(f"{name}, {len(edits)} candidates ({time.process_time() - begin:.0f} s)")
        whats = ("one step, next batch", f"one step, mean of {NEXT}", f"{LATER} steps")
        for what, values in zip(whats, zip(*found, strict=True), strict=True):
            mean = statistics.mean(values)
            asked = "" if what.startswith(str(LATER)) else f"   {'met' if mean >= 0.8 else 'MISSED'}: at least 0.8"
            print(f"  {what:24} {mean:5.2f} ({', '.join(f'{value:.2f}' for value in values)}){asked}")


if __name__ == "__main__":
    main()
