"""What does waking a layer do to a run? Loss right after it, the worst one that follows, and the end; five seeds.

A regression network of width 32 trains for 1,000 steps. Its sleeping layer wakes at step 300, or was awake from the
start, or never wakes. The layer is a plain Linear + Tanh, or a residual block whose last weights are zero at the start.
"""

import statistics

import torch
from torch import nn

import auxin as ax

STEPS, AT, WIDTH = 1000, 300, 32


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.down.weight), nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


LAYERS = {"Linear + Tanh": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), "residual, last zero": Residual}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.extra, self.head = nn.Linear(8, WIDTH), layer, nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.extra(torch.tanh(self.first(x))))


def run(kind: str, when: str, seed: int) -> list[float]:
    """Losses of all steps, on a test set."""
    torch.manual_seed(500 + seed)
    layer = LAYERS[kind]()
    torch.manual_seed(seed)  # the rest is the same network for both kinds of layer
    model = Net(layer if when == "awake from the start" else ax.Dormant(layer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = torch.Generator().manual_seed(1000 + seed)
    wanted = torch.randn(8, 4, generator=data)
    test = torch.randn(512, 8, generator=data)
    losses = []
    for step in range(STEPS):
        if step == AT and when.startswith("woken"):
            ax.grow(model, ax.Wake("extra"), optimizer, probe=test[:32])
        x = torch.randn(64, 8, generator=data)
        with torch.no_grad():
            losses.append(nn.functional.mse_loss(model(test), (test @ wanted).sin()).item())
        loss = nn.functional.mse_loss(model(x), (x @ wanted).sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main() -> None:
    torch.set_num_threads(1)
    print("| layer | | loss right after / before | worst of 20 steps / before | steps until as before | end |")
    print("|---|---|---|---|---|---|")
    for kind in LAYERS:
        for when in ("never woken", "woken at step 300", "awake from the start"):
            rows = []
            for seed in range(5):
                losses = run(kind, when, seed)
                before = losses[AT - 1]
                back = next((i for i, loss in enumerate(losses[AT:]) if loss <= before), STEPS - AT)
                rows.append((losses[AT] / before, max(losses[AT : AT + 20]) / before, back, losses[-1]))
            right, worst, back, end = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"| {kind} | {when} | {right:.2f} | {worst:.2f} | {back:.0f} | {end:.3f} |")


if __name__ == "__main__":
    main()
