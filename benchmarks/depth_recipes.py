"""The recipes of docs/methods/ that grow in depth, on one toy at equal FLOPs, beside networks of fixed depth.

A residual network learns, from fresh batches, a teacher of eight random residual blocks. Every row spends the same
FLOPs of training, those of 400 steps of 8 blocks (checks of growths are not counted); the learning rate is constant,
and falls to 0 over the last fifth of them. The first table is of training on a task after another one: half of these
FLOPs, by a network of 4 blocks that has spent all of them on the old task; its inputs lie elsewhere.

    python benchmarks/depth_recipes.py --seeds 3
"""

import argparse
import copy
import math
import statistics

import torch
from torch import nn

import auxin as ax

BATCH, RATE, WARMUP, STEPS, DEEP = 128, 5e-3, 20, 400, 8


class Block(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def network(depth):
    blocks = [Block(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(depth)]
    return nn.Sequential(nn.Linear(8, 16), nn.Sequential(*blocks), nn.Linear(16, 4))


def cost(depth):
    """Multiply-adds of a sample, forward."""
    return depth * 2 * 16 * 16 + 8 * 16 + 16 * 4


class Task:
    """What a teacher says of random inputs, in units of its standard deviation."""

    shift = 0.0

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.teacher = network(DEEP).requires_grad_(False)
        self.x = torch.randn(4096, 8) + self.shift
        y = self.teacher(self.x)
        self.mean, self.std = y.mean(0), y.std(0)
        self.y = self.told(self.x)

    def told(self, x):
        return (self.teacher(x) - self.mean) / self.std

    def batch(self, generator):
        x = torch.randn(BATCH, 8, generator=generator) + self.shift
        return x, self.told(x)

    @torch.no_grad()
    def loss(self, net):
        return (net(self.x) - self.y).square().mean().item()


def train(net, task, seed, plan=(), part=1.0, rate=RATE):
    """Spend part of the budget; ``plan``: (part of that, what grows then) in order. Returns losses around growths."""
    budget = part * STEPS * cost(DEEP)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    generator, plan, spent, step, around = torch.Generator().manual_seed(1000 + seed), list(plan), 0, 0, []
    while spent < budget:
        if plan and spent >= plan[0][0] * budget:
            optimizer.zero_grad()
            before = task.loss(net)
            ax.grow(net, plan.pop(0)[1], optimizer, probe=task.x[:64], seed=seed)
            around.append((before, task.loss(net)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / WARMUP, (1 - spent / budget) / 0.2)
        x, y = task.batch(generator)
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent, step = spent + cost(len(net[1])), step + 1
    return around


def more(by, **words):
    return ax.Duplicate("1", by=by, **words)


STAGES = (1 / 12, 1 / 4, 1 / 2)
RECIPES = {
    "8 blocks throughout": (8, []),
    "2 -> 8 at a quarter, zeroed copies": (2, [(0.25, more(6))]),
    "2 -> 8 at a quarter, stacked (G_stack)": (2, [(0.25, more(6, order="stack", output="keep"))]),
    "2 -> 4 -> 6 -> 8, last group (gradual)": (2, [(t, more(2, order="last", output="keep")) for t in STAGES]),
    "2 -> 4 -> 6 -> 8, middle group (MIDAS)": (2, [(t, more(2, order="middle", output="keep")) for t in STAGES]),
    "1 -> 8 at 80 % of steps, fresh (late jump)": (1, [(0.4, more(7, content="fresh", output="keep"))]),
    "2 -> 8 passes at a quarter (Repeat)": (2, [(0.25, ax.Repeat("1", times=4))]),
    "the same, own weights from 0.6 on (Untie)": (2, [(0.25, ax.Repeat("1", times=4)), (0.6, ax.Untie("1"))]),
    "4 -> 6 at a quarter, overlapping (DUS)": (4, [(0.25, more(None, order=[0, 1, 2, 1, 2, 3], output="keep"))]),
    "2 blocks throughout": (2, []),
    "4 blocks throughout": (4, []),
}


def paired(losses, beside):
    """The geometric mean of the ratios, seed by seed, and its standard error in parts."""
    logs = [math.log(one / other) for one, other in zip(losses, beside, strict=True)]
    return f"{math.exp(statistics.mean(logs)):.2f} +- {statistics.stdev(logs) / math.sqrt(len(logs)):.2f}"


def fixed_budget(seeds):
    print(f"{'recipe':44s} {'loss':7s} {'beside 8':13s} before -> right after growths; {seeds} seeds", flush=True)
    deep = []
    for name, (depth, plan) in RECIPES.items():
        losses, around = [], []
        for seed in range(seeds):
            task = Task(seed)
            torch.manual_seed(100 + seed)
            net = network(depth)
            around.append(train(net, task, seed, plan))
            losses.append(task.loss(net))
        deep = deep or losses
        jumps = [[statistics.mean(pair[k] for pair in growth) for k in (0, 1)] for growth in zip(*around, strict=True)]
        shown = ", ".join(f"{before:.3f} -> {after:.3f}" for before, after in jumps)
        print(f"{name:44s} {statistics.mean(losses):.4f}  {paired(losses, deep):13s} {shown}", flush=True)


def least_important(net, task):
    """The two blocks without which the loss rises least."""
    rises = []
    for i in range(len(net[1])):
        without = copy.deepcopy(net)
        del without[1][i]
        rises.append(task.loss(without))
    return sorted(range(len(rises)), key=rises.__getitem__)[:2]


class Elsewhere(Task):
    """Another teacher, of inputs around (2, ..., 2): two standard deviations from the other ones in every direction."""

    shift = 2.0


def new_task(seeds):
    """Half of the budget on a new task, by a network of 4 blocks that has learned another."""
    frozen = "copies evenly, old frozen (LLaMA Pro)", "copies of the least important, old frozen (ADEPT)"
    rows = {name: [] for name in ("before", "all trains", "all trains at a tenth of the rate", *frozen)}
    for seed in range(seeds):
        old = Task(seed)
        new = Elsewhere(500 + seed)
        torch.manual_seed(100 + seed)
        base = network(4)
        train(base, old, seed)
        for name, losses in rows.items():
            net = copy.deepcopy(base)
            if name in frozen:
                least = least_important(net, old)
                edit = ax.Duplicate(
                    "1", order=[0, 1, 1, 2, 3, 3] if name == frozen[0] else sorted([0, 1, 2, 3, *least])
                )
                optimizer = torch.optim.AdamW(net.parameters())
                grower = ax.Grower(net, optimizer, edits=edit, when=ax.when.every(1), probe=old.x[:64])
                grower.step()
                grower.freeze_old()
            if name != "before":
                train(net, new, seed, part=0.5, rate=RATE / (10 if "tenth" in name else 1))
            losses.append((old.loss(net), new.loss(net)))
    print(f"{'training on a new task':52s} loss on the old one    on the new one; {seeds} seeds, mean +- sd")
    for name, losses in rows.items():
        shown = [f"{statistics.mean(one):.3f} +- {statistics.stdev(one):.3f}" for one in zip(*losses, strict=True)]
        print(f"{name:52s} {shown[0]:22s} {shown[1]}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    new_task(chosen.seeds)
    print()
    fixed_budget(chosen.seeds)
