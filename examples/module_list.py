"""Append layers to an `nn.ModuleList` while it trains, and put one more in the middle.

    python examples/module_list.py

10 -> 20 -> 30 -> 40 at the end, where the outputs change; then a layer 30 -> 30 in between, which starts as the
identity and changes nothing until it has learnt something.
"""

from functools import partial

import torch
from torch import nn

import auxin as ax


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10, 20)])

    def forward(self, x):
        for layer in self.layers:  # whatever is in the list runs, so it may grow
            x = torch.relu(layer(x))
        return x


def train(model, opt, steps=200):
    """Fit absolute values of the inputs, as many as the network has outputs now."""
    for step in range(steps):
        x = torch.randn(64, 10)
        out = model(x)
        loss = nn.functional.mse_loss(out, x.repeat(1, 4)[:, : out.shape[1]].abs())
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step in (0, steps - 1):
            print(f"  {len(model.layers)} layers, {out.shape[1]} outputs, loss {loss.item():.3f}")
    opt.zero_grad()


def main():
    torch.manual_seed(0)
    model = Net()
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    probe = torch.randn(8, 10)
    train(model, opt)
    for edit in (
        ax.Insert("layers", partial(nn.Linear, 20, 30), init="default", outputs=True),
        ax.Insert("layers", partial(nn.Linear, 30, 40), init="default", outputs=True),
        ax.Insert("layers", partial(nn.Linear, 30, 30), index=2),  # init="preserve" is the default
    ):
        print(ax.grow(model, edit, opt, probe=probe))
        train(model, opt)
    ax.verify(model, opt)
    print([tuple(layer.weight.shape) for layer in model.layers])


if __name__ == "__main__":
    main()
