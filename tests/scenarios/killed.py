"""A run that grows three times and saves as it goes; run as a script it is killed in the middle, or goes on.

`killed.py FOLDER` trains, saves every few steps, and kills itself. `killed.py FOLDER resume` goes on from there.
"""

import functools
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from growing import Block, Net, ema_of
from torch import nn

import auxin as ax

GROWTHS, KILL_AT, SAVE_EVERY, AFTER = 30, 40, 7, 20  # three growths at 10, 20, 30; killed 10 steps after the last


class Run:
    """A plain loop with everything in it that could come back wrong."""

    def __init__(self):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = Net(dim=8, depth=1, dropout=0.1)
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=100)
        self.ema = ema_of(self.model, 0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=9)
        self.grower = ax.Grower(
            self.model,
            self.optimizer,
            self.schedule,
            self.ema,
            self.scaler,
            edits=[ax.Duplicate("blocks", by=1), ax.Insert("blocks", functools.partial(Block, 8, 0.1), index=0)],
            when=ax.when.every(10),
            choose=ax.choose.cycle(),
            limit=ax.Limit(growths=3),
            probe=torch.linspace(-1, 1, 20).reshape(4, 5),
        )

    def step(self) -> float:
        """One step on data that comes from all three generators."""
        x = torch.randn(16, 5) + random.random() + float(np.random.rand())
        y = x.sin().sum(1, keepdim=True)
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.grower.step(loss.item())
        with torch.no_grad():
            averaged = nn.functional.mse_loss(self.ema.module.eval()(x), y)
        return [loss.item().hex(), averaged.item().hex(), self.scaler.get_scale()]


def killed(folder: Path) -> None:
    run = Run()
    for number in range(1, 1000):
        run.step()
        if number == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        if number % SAVE_EVERY == 0:
            ax.save(run.grower, folder, extra={"steps": number})


def resumed(folder: Path) -> None:
    run = Run()
    extra = ax.load(folder, run.grower)
    losses = [run.step() for _ in range(AFTER)]
    weights = {name: list(p.shape) for name, p in run.model.named_parameters()}
    print(json.dumps({"steps": extra["steps"], "losses": losses, "parameters": weights}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    (resumed if "resume" in sys.argv else killed)(Path(sys.argv[1]))
