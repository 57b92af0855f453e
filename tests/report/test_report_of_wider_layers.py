"""Bars of layers that get wider on the way step up, through renames by growths in between."""

import re

import torch
from torch import nn

import auxin as ax
from auxin.report import Report
from auxin.report.lineage import read_layers

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_bars_step_up(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Sequential(Block(), Block()), nn.Linear(6, 1))
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    edits = [ax.Widen("1.*.up", by=8), ax.Duplicate("1", by=1, order="middle"), ax.Widen("1.0.up", by=4)]
    x, never = torch.randn(5, 3), ax.when.every(10**6)
    grower = ax.Grower(net, opt, edits=edits, when=never, probe=x, log=tmp_path / "run")
    for edit in edits:
        for _ in range(4):
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
            grower.step(1.0)
        grower.grow(edit)
    opt.step()
    grower.step(1.0)
    report = Report.read(tmp_path / "run")
    layers = {layer.path: layer for layer in read_layers(report.run.growths, report.run.shapes)}
    told = {path: [(growth.number, units) for growth, units in layer.widened] for path, layer in layers.items()}
    born = next(path for path, layer in layers.items() if layer.birth is not None)
    old = next(path for path in ("1.1", "1.2") if path != born)
    assert told["1.0"] == [(1, 8), (3, 16)] and told[old] == [(1, 8)] and told[born] == []
    assert [layers[path].units for path in ("1.0", old, born)] == [20, 16, 16]
    page = report.html()
    chart = page[page.index('id="layer-chart-step') :].partition("</svg>")[0]
    heights = [float(h) for h in re.findall(r'<rect class="bar[^>]* height="([\d.]+)"', chart)]
    assert sorted(heights)[-6:] == [10.4, 10.4, 20.8, 20.8, 20.8, 26.0]
    assert "8 → 16 → 20" in page and "steps up where the layer was widened" in page
    assert "4 from the start, 1 grown, 2 widened. " in page
    shapes = ("1.0-1.up.weight (8, 6) → (16, 6)", "1.0-1.up.bias (8,) → (16,)", "1.0-1.down.weight (6, 8) → (6, 16)")
    assert f">{'; '.join(shapes)}</span>" in page


def test_several_edits_as_one_growth_are_told_apart(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Sequential(Block(), Block()), nn.Linear(6, 1))
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    x, never = torch.randn(5, 3), ax.when.every(10**6)
    grower = ax.Grower(net, opt, edits=ax.Duplicate("1"), when=never, probe=x, log=tmp_path / "run")
    grower.step(1.0)
    grower.grow([ax.Widen("1.*.up", by=8), ax.Duplicate("1", by=1, order="last")])
    grower.grow([ax.Duplicate("1", by=1, order="last"), ax.Widen("1.0.up", by=4), ax.Widen("1.0.up", by=4)])
    grower.step(1.0)
    report = Report.read(tmp_path / "run")
    layers = {layer.path: layer for layer in read_layers(report.run.growths, report.run.shapes)}
    told = {path: [(growth.number, units) for growth, units in layer.widened] for path, layer in layers.items()}
    assert told["1.0"] == [(1, 8), (2, 16)] and told["1.1"] == [(1, 8)] and layers["1.0"].units == 24
    page = report.html()
    assert "Widen 1.*.up, Duplicate 1" in page and "Several" not in page
