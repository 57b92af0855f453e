"""A run with all that a kill could tear apart, and the loop around it that docs/resume.md tells to write.

Dropout, a data order that is shuffled anew in each epoch by a generator of its own, a schedule, an average, blocks that
fade in and warm up. It grows every 7 steps and saves every 3, so that kills fall into both.
"""

import functools
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import auxin as ax

STEPS, AFTER = 48, 20  # of a whole run; and how many more are compared behind its last checkpoint
GROW_EVERY, SAVE_EVERY, GROWTHS = 7, 3, 7
SAMPLES, BATCH = 40, 8
AT = ("epoch", "batch", "steps", "shuffled_from")


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(dim), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(self.drop(torch.relu(self.up(self.norm(x)))))


class Post(nn.Module):
    """A norm behind the sum: no zeros make it the identity, so it fades in."""

    def __init__(self, dim=8):
        super().__init__()
        self.inner, self.drop, self.norm = nn.Linear(dim, dim), nn.Dropout(0.1), nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(x + self.drop(torch.relu(self.inner(x))))


class Net(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.entry, self.exit = nn.Linear(5, dim), nn.Linear(dim, 1)
        self.blocks = nn.ModuleList([Block(dim)])

    def forward(self, x):
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return self.exit(x)


class Run:
    def __init__(self, scaler=False, **words):
        torch.manual_seed(0)
        self.x = torch.randn(SAMPLES, 5)
        self.y = self.x.sin().sum(1, keepdim=True)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=STEPS + AFTER + 10)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.order = torch.Generator().manual_seed(1)
        self.shuffled_from = self.order.get_state()  # where the order of this epoch comes from
        self.epoch, self.batch, self.steps = 0, 0, 0
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        self.grower = ax.Grower(
            self.model,
            self.optimizer,
            self.schedule,
            self.ema,
            *([self.scaler] if scaler else []),
            edits=[ax.Duplicate("blocks", by=1, fade=5), ax.Insert("blocks", functools.partial(Post, 8), fade=5)],
            choose=ax.choose.cycle(),
            when=ax.when.every(GROW_EVERY),
            limit=ax.Limit(growths=GROWTHS),
            probe=self.x[:4],
            rewarm=3,
            **words,
        )

    def save(self, folder, keep_last=2):
        ax.save(self.grower, folder, extra={name: getattr(self, name) for name in AT}, keep_last=keep_last)

    def load(self, folder):
        """Go on where ``folder`` has a checkpoint, or begin."""
        if any(Path(folder).glob("checkpoint-*")):
            at = ax.load(folder, self.grower)
            self.epoch, self.batch, self.steps, self.shuffled_from = (at[name] for name in AT)

    def train(self, until):
        """Yield the loss and that of the average after each step, up to step ``until``."""
        while True:
            self.order.set_state(self.shuffled_from)
            for index in torch.randperm(SAMPLES, generator=self.order).split(BATCH)[self.batch :]:
                if self.steps == until:
                    return
                yield self.step(self.x[index], self.y[index])
            self.epoch, self.batch, self.shuffled_from = self.epoch + 1, 0, self.order.get_state()

    def step(self, x, y):
        loss = nn.functional.mse_loss(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.batch, self.steps = self.batch + 1, self.steps + 1
        self.grower.step(loss.item())
        with torch.no_grad():
            averaged = nn.functional.mse_loss(self.ema.module.eval()(x), y)
        return loss.item(), averaged.item()
