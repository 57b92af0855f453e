"""Append layers to an `nn.Sequential` while it trains: 10 -> 20, then 20 -> 30, then 30 -> 40.

    python examples/sequential.py

The output of the network grows with it, so each growth says `outputs=True`. Optimizer, schedule and average keep step.
"""

from functools import partial

import torch
from torch import nn

import auxin as ax


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 20))

    def forward(self, x):
        return self.layers(x)


def train(model, opt, sched, ema, steps=200):
    """Fit sines of the inputs, as many as the network has outputs now."""
    for step in range(steps):
        x = torch.randn(64, 10)
        out = model(x)
        loss = nn.functional.mse_loss(out, x.repeat(1, 4)[:, : out.shape[1]].sin())
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        ema.update_parameters(model)
        if step in (0, steps - 1):
            print(f"  {out.shape[1]} outputs, loss {loss.item():.3f}")
    opt.zero_grad()


def main():
    torch.manual_seed(0)
    model = Net()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sched = torch.optim.lr_scheduler.ExponentialLR(opt, 0.999)
    ema = torch.optim.swa_utils.AveragedModel(model)
    probe = torch.randn(8, 10)
    train(model, opt, sched, ema)
    for layer in (nn.Tanh, partial(nn.Linear, 20, 30), nn.Tanh, partial(nn.Linear, 30, 40)):
        edit = ax.Insert("layers", layer, init="default", outputs=True)
        print(ax.grow(model, edit, opt, sched, ema, probe=probe))
        if layer is not nn.Tanh:
            train(model, opt, sched, ema)
    ax.verify(model, opt, sched, ema)  # nothing was lost: every tensor trains, once, and is averaged
    print(model.layers)


if __name__ == "__main__":
    main()
