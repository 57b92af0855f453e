"""What does it cost to make the optimizer anew at every growth? Small networks on blobs, Iris, Wine and breast cancer.

inputs-2-classes, ReLU, SGD 0.01 with momentum 0.9, batches of 16; a hidden unit more after every epoch, 14 times; then
as many epochs as make 30. All on the same order of batches:

- "kept": `auxin.grow` with the optimizer, whose momentum goes on;
- "lost": the same growths, and a new optimizer after each, as one writes it by hand;
- "no growth", and "all from the start": 2 and 16 hidden units.

Accuracy on the third of the data that is held out: after the last growth, and at the end; means over the seeds. Nothing
was tuned.

    python benchmarks/lost_momentum.py [--seeds N]            # needs scikit-learn
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax

EPOCHS, GROWTHS, START, BATCH = 30, 14, 2, 16
Data = tuple[Tensor, Tensor]
WAYS = ("kept", "lost", "no growth", "all from the start")


def data() -> dict[str, Data]:
    from sklearn import datasets

    sources: dict[str, Callable[..., tuple]] = {
        "blobs": lambda: datasets.make_blobs(300, 8, centers=5, cluster_std=4.0, random_state=0),
        "Iris": lambda: datasets.load_iris(return_X_y=True),
        "Wine": lambda: datasets.load_wine(return_X_y=True),
        "breast cancer": lambda: datasets.load_breast_cancer(return_X_y=True),
    }
    found = {}
    for name, load in sources.items():
        x, y = load()
        found[name] = torch.as_tensor(x).float(), torch.as_tensor(y).long()
    return found


def parts(x: Tensor, y: Tensor, seed: int) -> tuple[Data, Data]:
    """To train on and held out, standardised by the first."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held = len(x) // 3
    train, test = order[held:], order[:held]
    x = (x - x[train].mean(0)) / x[train].std(0)
    return (x[train], y[train]), (x[test], y[test])


def accuracy(net: nn.Module, part: Data) -> float:
    with torch.no_grad():
        return float((net(part[0]).argmax(1) == part[1]).double().mean())


def run(way: str, train: Data, test: Data, seed: int) -> tuple[float, float]:
    """Accuracy after the last growth, and at the end."""
    torch.manual_seed(seed)
    hidden, classes = START + GROWTHS * (way == "all from the start"), int(train[1].max()) + 1
    net = nn.Sequential(nn.Linear(train[0].shape[1], hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def made() -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    optimizer, order, middle = made(), torch.Generator().manual_seed(seed), 0.0
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(train[0]), generator=order).split(BATCH):
            F.cross_entropy(net(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch < GROWTHS and way in ("kept", "lost"):
            ax.grow(net, ax.Widen("0", by=1), optimizer, probe=train[0][:BATCH], seed=epoch)
            optimizer = optimizer if way == "kept" else made()
        if epoch == GROWTHS:
            middle = accuracy(net, test)
    return middle, accuracy(net, test)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, auxin {ax.__version__}; {len(seeds)} seeds; epoch {GROWTHS + 1} / epoch {EPOCHS}\n"
    )
    print(f"{'':16}" + "".join(f"{way:>22}" for way in WAYS))
    for name, (x, y) in data().items():
        told = []
        for way in WAYS:
            pairs = [run(way, *parts(x, y, seed), seed) for seed in seeds]
            told.append(" / ".join(f"{statistics.mean(column):.3f}" for column in zip(*pairs, strict=True)))
        print(f"{name:16}" + "".join(f"{one:>22}" for one in told), flush=True)


if __name__ == "__main__":
    main()
