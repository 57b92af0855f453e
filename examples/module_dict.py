"""Add layers under names of their own to an `nn.ModuleDict` while it trains.

    python examples/module_dict.py

The order of the names is the order in which they run. `before=` says where a new one goes; without it, it comes last.
"""

from functools import partial

import torch
from torch import nn

import auxin as ax


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"inputs": nn.Linear(10, 20), "outputs": nn.Linear(20, 40)})

    def forward(self, x):
        for name, layer in self.layers.items():
            x = layer(x) if name == "outputs" else torch.relu(layer(x))
        return x


def train(model, opt, steps=300):
    """Fit sines of sums of the inputs."""
    for _ in range(steps):
        x = torch.randn(64, 10)
        wanted = (x + x.roll(1, 1)).repeat(1, 4).sin()
        loss = nn.functional.mse_loss(model(x), wanted)
        opt.zero_grad()
        loss.backward()
        opt.step()
    opt.zero_grad()
    print(f"  {' -> '.join(model.layers)}: loss {loss.item():.3f}")


def main():
    torch.manual_seed(0)
    model = Net()
    opt = torch.optim.AdamW(model.named_parameters(), lr=3e-3)
    probe = torch.randn(8, 10)
    train(model, opt)
    for name, before in (("middle", "outputs"), ("early", "middle")):
        edit = ax.Insert("layers", partial(nn.Linear, 20, 20), key=name, before=before)
        print(ax.grow(model, edit, opt, probe=probe))
        train(model, opt)
    print(ax.grow(model, ax.Remove("layers.early"), opt, probe=probe))  # and out again, with its optimizer state
    train(model, opt)
    ax.verify(model, opt)
    print(opt.param_groups[0]["param_names"])


if __name__ == "__main__":
    main()
