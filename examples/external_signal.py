"""The sign to grow comes from outside of the training loop: from a thread, from a file, from a function of your own.

    python examples/external_signal.py

In a real run the thread would be a web page or a notebook cell, the file would come from `touch run/grow` in a shell,
and the function would look at whatever you watch: the memory that is free, the hour, the amount of new data.
"""

import functools
import tempfile
import threading
from pathlib import Path

import torch
from torch import nn

import auxin as ax

STEPS = 200


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def train(when, outside=None):
    """Train a small network; `outside(step)` is the world around it. Returns the steps at which it grew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), Block(16), nn.Linear(16, 1))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(256, 4)
    y = x.sin().sum(1, keepdim=True)
    edit = ax.Insert("", functools.partial(Block, 16), index=-1)  # one block more, in front of the last layer
    grower = ax.Grower(model, opt, edits=edit, when=when, probe=x)
    grown = []
    for step in range(STEPS):
        if outside is not None:
            outside(step)
        loss = nn.functional.mse_loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if change := grower.step(loss.item()):
            print(f"  step {step}: {change}")
            grown.append(step)
    return grown


def from_a_thread():
    print("when.signal(), set from another thread at step 50:")
    signal = ax.when.signal()

    def outside(step):
        if step == 50:
            threading.Thread(target=signal.set).start()

    return train(signal, outside)


def from_a_file():
    print("when.file(...), the file appears at step 100:")
    with tempfile.TemporaryDirectory() as run:
        sign = Path(run) / "grow"
        grown = train(ax.when.file(sign), lambda step: sign.touch() if step == 100 else None)
        print(f"  in the directory of the run: {[path.name for path in Path(run).iterdir()]}")
    return grown


def from_a_function():
    print("any function of a reading, here one that looks at data which arrive outside:")
    samples = []

    def enough_new_data(reading):
        return len(samples) >= 1000 * (1 + reading.growths)

    return train(enough_new_data, lambda step: samples.extend(range(16)))


def main():
    grown = [from_a_thread(), from_a_file(), from_a_function()]
    print("grown at steps", grown)
    return grown


if __name__ == "__main__":
    main()
