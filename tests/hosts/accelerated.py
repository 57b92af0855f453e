"""Small loops under Accelerate: a residual network, fixed data."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import auxin as ax
from auxin.hosts.accelerate import Grower

torch.set_num_threads(1)

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
Y = torch.sin(3 * X).sum(1, keepdim=True)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dim=16, depth=1):
        super().__init__()
        self.inp, self.out = nn.Linear(8, dim), nn.Linear(dim, 1)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Run:
    """What ``accelerator.prepare`` returned, and a Grower around it; without ``grows`` nothing of auxin."""

    def __init__(self, depth=1, grows=True, accelerator=None, **options):
        torch.manual_seed(0)
        AcceleratorState._reset_state(True)
        self.accelerator = Accelerator(cpu=True, **(accelerator or {}))
        model = Net(depth=depth)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
        prepared = self.accelerator.prepare(model, optimizer, scheduler, loader)
        self.model, self.optimizer, self.scheduler, self.loader = self.prepared = prepared
        own = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.at([1, 3]), "probe": X[:8]}
        parts = (self.accelerator, self.model, self.optimizer, self.scheduler)
        self.grower = Grower(*parts, **{**own, **options}) if grows else None

    def epoch(self):
        """The losses of one epoch; then the Grower is told the last one."""
        losses = []
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.mse_loss(self.model(x), y)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                losses.append(loss.item())
        if self.grower is not None:
            self.grower.step(losses[-1])
        return losses

    def save(self, path):
        self.accelerator.save_state(str(path))
        return str(path)

    def moments(self):
        inner = self.optimizer.optimizer
        return {
            name: inner.state[p]["exp_avg"].clone() for name, p in self.model.named_parameters() if p in inner.state
        }
