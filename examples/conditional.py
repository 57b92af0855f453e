"""A layer that is built in from the start and switched on later: 10 -> 20, and 20 -> 40 once it is awake.

    python examples/conditional.py

People write `if self.use_extra: x = self.extra(x)`. Then nothing says whether the optimizer knows the layer, and a
checkpoint does not say whether it was on. `Dormant` and `Wake` are that switch with everything kept in step: asleep the
layer costs nothing and stays as it is, to the bit; awake, the network is the plain one with the layer in its place.
"""

import torch
from torch import nn

import auxin as ax


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(10, 20)
        self.extra = ax.Dormant(nn.Linear(20, 40))

    def forward(self, x):
        return self.extra(torch.tanh(self.first(x)))


def fit(model, opt, ema):
    """One epoch of 20 steps: sines of the inputs, as many as the network has outputs now."""
    for _ in range(20):
        x = torch.randn(64, 10)
        out = model(x)
        loss = nn.functional.mse_loss(out, x.repeat(1, 4)[:, : out.shape[1]].sin())
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema.update_parameters(model)
    return loss.item()


def main():
    torch.manual_seed(0)
    model = Net()
    opt = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    ema = torch.optim.swa_utils.AveragedModel(model)
    grower = ax.Grower(
        model,
        opt,
        ema,
        edits=ax.Wake("extra", outputs=True),  # the width of the output changes: that has to be asked for
        when=ax.when.plateau(patience=3, min_delta=1e-3),
        limit=ax.Limit(growths=1),
        probe=torch.randn(8, 10),
    )
    asleep = model.extra.layer.weight.clone()
    for epoch in range(40):
        loss = fit(model, opt, ema)
        if change := grower.step(loss):
            print(f"epoch {epoch}, loss {loss:.3f}: {change}")
            print("  as it was when it was built:", torch.equal(model.extra.weight, asleep))
            print("  outputs now:", tuple(model(torch.randn(1, 10)).shape))
    print(f"epoch {epoch}, loss {loss:.3f}")
    grower.verify()
    print(model)


if __name__ == "__main__":
    main()
