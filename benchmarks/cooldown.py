"""How long should `plateau` stay quiet after it has fired, for what has grown to learn?

A residual MLP of one block grows to at most five on a plateau of its validation loss (patience 2, an evaluation every
10 steps of Adam), for an equal number of multiply-adds in every arm, with the same seeds. Arms differ in `cooldown`
only. The table gives, by cooldown, the final validation loss over that of cooldown 0 (geometric mean over four tasks
and the seeds, with the standard error of its logarithm), in how many of the pairs it is lower, the growths, and the
readings between a growth and the next one. Below it: how many readings after a growth the first new best came.

    python benchmarks/cooldown.py
"""

import argparse
import math
from collections.abc import Callable
from statistics import fmean, median, stdev

import torch
from torch import Tensor, nn

import auxin as ax

PATIENCE, EVERY, MOST = 2, 10, 4
COOLDOWNS = [0, 2, 4, 8, 16]


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dim: int = 32):
        super().__init__()
        self.inp, self.blocks, self.out = nn.Linear(8, dim), nn.ModuleList([Block(dim)]), nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def teacher(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        x = torch.tanh(x @ torch.randn(x.shape[1], 16, generator=generator) / 1.5)
    return x.sum(1)


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sines": lambda x: torch.sin(3 * x).sum(1),
    "products": lambda x: x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3] * x[:, 4],
    "teacher": teacher,
    "steps": lambda x: torch.sign(x[:, 0] * x[:, 1]) + torch.sign(x[:, 2] + x[:, 3]),
}


def run(task: str, seed: int, cooldown: int | None, budget: float) -> tuple[float, list[int], list[float]]:
    """Final validation loss, calls of the growths, and all readings."""
    torch.manual_seed(seed)
    x, held = torch.randn(1024, 8), torch.randn(1024, 8)
    y, wanted = TASKS[task](x)[:, None], TASKS[task](held)[:, None]
    y = y + 0.1 * torch.randn_like(y)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    when = ax.when.plateau(PATIENCE, **({} if cooldown is None else {"cooldown": cooldown}))
    edit, limit = ax.Duplicate("blocks", by=1, order="last"), ax.Limit(growths=MOST)
    grower = ax.Grower(model, optimizer, edits=edit, when=when, limit=limit, probe=x[:8])
    spent, steps, grown, readings = 0.0, 0, [], []
    while spent < budget:
        batch = torch.randint(1024, (64,))
        nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        spent, steps = spent + 1 + len(model.blocks), steps + 1
        if steps % EVERY == 0:
            with torch.no_grad():
                readings.append(nn.functional.mse_loss(model(held), wanted).item())
            if grower.step(readings[-1]):
                grown.append(len(readings))
    return fmean(readings[-5:]), grown, readings


def first_best(grown: list[int], readings: list[float]) -> list[float]:
    """For each growth, after how many readings there was a new best; infinite where another growth came first."""
    found = []
    for at, end in zip(grown, [*grown[1:], len(readings)], strict=True):
        best = min(readings[:at])
        found.append(next((n - at + 1.0 for n in range(at, end) if readings[n] < best), math.inf))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--budget", type=float, default=6000, help="blocks and ends, times steps")
    parser.add_argument("--cooldowns", type=int, nargs="+", default=COOLDOWNS, help="the first is compared with")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [(task, seed) for task in TASKS for seed in range(asked.seeds)]
    plain: dict[tuple[str, int], float] = {}
    print("cooldown | loss / loss at the first (se of its log) | lower in | growths | readings between growths")
    late: dict[int, list[float]] = {}
    for cooldown in asked.cooldowns:
        done = {pair: run(*pair, cooldown, asked.budget) for pair in pairs}
        plain = plain or {pair: found[0] for pair, found in done.items()}
        logs = [math.log(done[pair][0] / plain[pair]) for pair in pairs]
        gaps = [b - a for _, grown, _ in done.values() for a, b in zip(grown, grown[1:], strict=False)]
        lower = sum(log < 0 for log in logs)
        error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
        count = fmean(len(grown) for _, grown, _ in done.values())
        print(
            f"{cooldown:8} | {math.exp(fmean(logs)):.3f} ({error:.3f}) | {lower}/{len(pairs)} | {count:.1f} "
            f"| {median(gaps) if gaps else math.nan}",
            flush=True,
        )
        late[cooldown] = [n for _, grown, readings in done.values() for n in first_best(grown, readings)]
    longest = late[max(asked.cooldowns)]
    print(
        f"a new best comes after {median(longest)} readings (median of {len(longest)} growths at the longest cooldown)"
    )
    for share in (0.75, 0.9):
        print(f"  {share:.0%}: {sorted(longest)[int(share * (len(longest) - 1))]}")


if __name__ == "__main__":
    main()
