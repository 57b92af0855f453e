"""Eight hidden units more for a small network on the digits: TINY and GradMax from auxin, and gromo beside them.

64-4-10, ReLU, batches of 64, SGD 0.05 with momentum 0.9; 20 epochs, + 8 units, 10 epochs more; five seeds. All methods
go on from the same 20 epochs, on the same order of batches. No scale is set by hand: auxin searches the amplitude on
the training loss; gromo's scale is the best of a grid of ours (it has none by itself), on the training loss too.

Then the processor time of statistics, solve and apply on 512-512-512, + 64 units, 2,000 samples.

    python benchmarks/digits_growth.py            # needs scikit-learn and gromo 0.1.0
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax
from auxin.statistics import Pair, measured

SEEDS, BEFORE, AFTER, BATCH, MORE = range(5), 20, 10, 64, 8
GRID = [0.0, *(2 ** (e / 4) for e in range(-16, 25))]  # its scale goes to both factors


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=0.3, stratify=y, random_state=0)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
    return x.float(), y, x_test.float(), y_test


DATA = digits()


def network(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, epochs: float, order: torch.Generator) -> None:
    x, y = DATA[:2]
    batches = -(-len(x) // BATCH)
    left = round(epochs * batches)
    while left > 0:
        for rows in torch.randperm(len(x), generator=order).split(BATCH)[:left]:
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        left -= batches


@torch.no_grad()
def losses(net: nn.Module) -> tuple[float, float, float]:
    """Training loss, test loss, test accuracy."""
    x, y, x_test, y_test = DATA
    z = net(x_test)
    right = float((z.argmax(1) == y_test).double().mean())
    return float(F.cross_entropy(net(x), y)), float(F.cross_entropy(z, y_test)), right


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def evidence() -> ax.Evidence:
    x, y = DATA[:2]
    return ax.Evidence(lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x, y)])


def by_auxin(init: str) -> Callable[[nn.Sequential, torch.optim.Optimizer], nn.Module]:
    def grow(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> nn.Module:
        ax.grow(net, ax.Widen("0", by=MORE, init=init), optimizer, probe=DATA[0][:64], evidence=evidence())
        return net

    return grow


def gromo_copy(net: nn.Sequential) -> nn.Module:
    from gromo.containers.growing_mlp import GrowingMLP

    hidden = net[0].out_features
    twin = GrowingMLP(net[0].in_features, net[2].out_features, hidden, 1, nn.ReLU(), device=torch.device("cpu"))
    with torch.no_grad():
        for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            theirs.copy_(mine)
    return twin


def gromo_updates(twin: nn.Module, batches: list[tuple[Tensor, Tensor]], loss: Callable[..., Tensor], k: int) -> None:
    """Statistics and solve, as its own training loop does them (sums over samples), with its TINY flags."""
    twin.init_computation()
    for x, y in batches:
        twin.zero_grad()
        loss(twin(x), y).backward()
        twin.update_computation()
    twin.compute_optimal_updates(maximum_added_neurons=k, compute_delta=False, use_covariance=True, use_projection=True)
    twin.reset_computation()


def by_gromo(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> nn.Module:
    x, y = DATA[:2]
    twin = gromo_copy(net)
    gromo_updates(twin, [(x, y)], functools.partial(F.cross_entropy, reduction="sum"), MORE)
    twin.dummy_select_update()
    tried = []
    with torch.no_grad():
        for scale in GRID:
            twin.set_scaling_factor(scale)
            tried.append((float(F.cross_entropy(twin.extended_forward(x), y)), scale))
    twin.set_scaling_factor(min(tried)[1])
    twin.apply_change()
    twin.zero_grad()
    return twin


def unchanged(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> nn.Module:
    return net


METHODS: dict[str, Callable[[nn.Sequential, torch.optim.Optimizer], nn.Module]] = {
    "no growth": unchanged,
    "auxin zero": by_auxin("zero"),
    "auxin gradmax": by_auxin("gradmax"),
    "auxin tiny": by_auxin("tiny"),
    "gromo TINY": by_gromo,
}


def one(method: str, seed: int) -> list[float]:
    torch.manual_seed(seed)
    net = network(4)
    optimizer = sgd(net)
    train(net, optimizer, BEFORE, torch.Generator().manual_seed(seed))
    row = [losses(net)[0]]
    grown = METHODS[method](net, optimizer)
    row.append(losses(grown)[0])
    if grown is not net:
        optimizer = sgd(grown)
    order = torch.Generator().manual_seed(1000 + seed)
    train(grown, optimizer, 1, order)
    row.append(losses(grown)[0])
    train(grown, optimizer, AFTER - 1, order)
    return [*row, *losses(grown)]


def anew(seed: int, epochs: float) -> list[float]:
    torch.manual_seed(seed)
    net = network(4 + MORE)
    train(net, sgd(net), epochs, torch.Generator().manual_seed(seed))
    return [float("nan")] * 3 + [*losses(net)]


def processor_time() -> dict[str, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    x, y = torch.randn(2000, 512), torch.randn(2000, 512)
    batches = list(zip(x.split(500), y.split(500), strict=True))

    def loss(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        each = (z - y).square().sum(1)
        return each.mean() if reduction == "mean" else each.sum()

    given = ax.Evidence(lambda m, b: loss(m(b[0]), b[1]), batches)

    def plain() -> None:
        for a, b in batches:
            loss(net(a), b).backward()

    def auxin_parts() -> None:
        pair = Pair("0", "2", direct=True)
        new = ax.score.tiny(measured(net, given, [pair], quiet=True)[pair], 64, joint=False)
        wider = [torch.cat([net[0].weight, new.A[:-1].T.float()]), torch.cat([net[2].weight, new.O.float()], 1)]
        assert wider[0].shape == (576, 512) and wider[1].shape == (512, 576)

    def auxin_whole() -> None:
        twin = copy.deepcopy(net).requires_grad_()
        twin.zero_grad()
        ax.grow(twin, ax.Widen("0", by=64, init="tiny"), probe=x[:64], evidence=given)

    def gromo_whole() -> None:
        twin = gromo_copy(net)
        gromo_updates(twin, batches, functools.partial(loss, reduction="sum"), 64)
        twin.dummy_select_update()
        twin.set_scaling_factor(1.0)
        twin.apply_change()

    rows = {
        "a plain forward and backward pass": plain,
        "gromo: statistics, solve, apply": gromo_whole,
        "auxin: statistics, solve, apply": auxin_parts,
        "auxin: Widen, with the search of the amplitude and the proof": auxin_whole,
    }
    found = {}
    print("\nprocessor time, 512-512-512, + 64 units, 2,000 samples, one thread, median of 5:")
    for name, run in rows.items():
        run()
        net.zero_grad()
        spent = []
        for _ in range(5):
            begin = time.process_time()
            run()
            spent.append(time.process_time() - begin)
            net.zero_grad()
        found[name] = statistics.median(spent)
        print(f"  {name:70} {1000 * found[name]:6.0f} ms")
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(__doc__)
    print(f"torch {torch.__version__}, auxin {ax.__version__}\n")
    head = ("train before", "right after", "+ 1 epoch", "+ 10 epochs", "test", "accuracy")
    print(f"{'':24}" + "".join(f"{name:>14}" for name in head))

    def show(name: str, rows: list[list[float]]) -> list[float]:
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        print(f"{name:24}" + "".join(f"{value:14.4f}" for value in means))
        return means

    found = {method: show(method, [one(method, seed) for seed in SEEDS]) for method in METHODS}
    equal = (BEFORE * 4 + AFTER * 12) / 12
    show(f"anew, 12, {equal:.1f} epochs", [anew(seed, equal) for seed in SEEDS])
    show("anew, 12, 30 epochs", [anew(seed, 30) for seed in SEEDS])
    mine, theirs = found["auxin tiny"], found["gromo TINY"]
    targets = {
        f"right after, at most gromo's {theirs[1]:.4f}": mine[1] <= theirs[1],
        "after 10 epochs, at most 0.0746": mine[3] <= 0.0746,
        "accuracy, at least 0.960": mine[5] >= 0.960,
    }
    print()
    for target, met in targets.items():
        print(f"  {'met   ' if met else 'MISSED'}  {target}")
    spent = processor_time()
    met = 2 * spent["auxin: statistics, solve, apply"] <= spent["gromo: statistics, solve, apply"]
    print(f"\n  {'met   ' if met else 'MISSED'}  statistics, solve and apply, at most half of gromo's processor time")


if __name__ == "__main__":
    main()
