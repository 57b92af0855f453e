"""Does a growth cost what it touches? One ``grower.step`` that grows, beside one training step, at 8 to 1,024 blocks.

    python benchmarks/growth_scaling.py [--against PATH_TO_ANOTHER_SRC] [--depths 8 512] [--rounds 5]

A residual MLP of width 16 with AdamW, a schedule and an average grows by one block; each growth is proved on a probe.
Each round is a process of its own that trains, grows four times with training steps between and prints the medians;
the first growth is left out. With ``--against`` the rounds of both builds alternate. A figure is the median over the
rounds; seconds are those of the processor, so that other processes on the machine count little.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import auxin as ax

DEPTHS = (8, 32, 128, 512, 1024)
GROWTHS = 4


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth: int, dim: int = 16) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(8, dim), nn.Linear(dim, 1)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.networks.append(self)
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Counted:
    networks: list[nn.Module] = []  # one entry for each forward


def one_round(depth: int) -> dict[str, float]:
    """Medians of one process: seconds of a training step and of a growth; forwards per growth, the average's apart."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net(depth)
    inputs = torch.randn(64, 8)
    targets = torch.sin(3 * inputs).sum(1, keepdim=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = torch.optim.swa_utils.AveragedModel(model)
    grower = ax.Grower(
        model,
        optimizer,
        schedule,
        average,
        edits=ax.Duplicate("blocks", by=1),
        when=ax.when.every(1),
        probe=inputs,
    )

    def train() -> float:
        started = time.process_time()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        optimizer.zero_grad()
        return time.process_time() - started

    def grow() -> float:
        started = time.process_time()
        assert grower.step() is not None
        return time.process_time() - started

    for _ in range(3):
        train()
    grow()
    steps, growths, forwards, of_average = [], [], [], []
    for _ in range(GROWTHS):
        steps += [train() for _ in range(4)][1:]
        Counted.networks.clear()
        growths.append(grow())
        forwards.append(sum(network is model for network in Counted.networks))
        of_average.append(len(Counted.networks) - forwards[-1])
    return {
        "step": statistics.median(steps),
        "growth": statistics.median(growths),
        "forwards": statistics.median(forwards),
        "of_average": statistics.median(of_average),
    }


def in_a_process(depth: int, source: str | None) -> dict[str, float]:
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if source is not None:
        environment["PYTHONPATH"] = source
    command = [sys.executable, __file__, "--one", str(depth)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", help="the src folder of another build")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one_round(args.one)))
        return
    ours = str(Path(ax.__file__).parents[1])
    builds = {"this build": ours} | ({"other build": args.against} if args.against else {})
    print(
        f"{'blocks':>6}  {'':12}{'training step':>14}{'growth':>12}{'growth / step':>15}{'forwards':>10}"
        f"{'of average':>12}{'faster':>9}"
    )
    for depth in args.depths:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in builds}
        for turn in range(args.rounds):
            for name, source in list(builds.items())[:: 1 if turn % 2 else -1]:
                found[name].append(in_a_process(depth, source))
        for name, rounds in found.items():
            keys = ("step", "growth", "forwards", "of_average")
            step, growth, forwards, of_average = (statistics.median(r[key] for r in rounds) for key in keys)
            ratio = statistics.median(r["growth"] / r["step"] for r in rounds)
            faster = ""
            if name != "this build":
                pairs = zip(rounds, found["this build"], strict=True)
                faster = f"{statistics.median(r['growth'] / mine['growth'] for r, mine in pairs):.1f}x"
            print(
                f"{depth:6}  {name:12}{1e3 * step:11.1f} ms{1e3 * growth:9.1f} ms{ratio:15.2f}{forwards:10.0f}"
                f"{of_average:12.0f}{faster:>9}",
                flush=True,
            )


if __name__ == "__main__":
    main()
