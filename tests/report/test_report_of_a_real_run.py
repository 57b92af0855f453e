"""A network that grows, is rolled back and resumed, while its log is written; and the page of it."""

import re
from pathlib import Path

import pytest
import torch
from pages import of_class, parsed, section, svg, table_of, words
from torch import nn

import auxin as ax
from auxin.report import Report

DOCUMENT = Path(__file__).parents[2] / "docs" / "report.md"


class Block(nn.Module):
    def __init__(self, dim: int = 8):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 24), nn.Linear(24, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def build(log: Path | None) -> ax.Grower:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(Block()), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    words = {"edits": ax.Duplicate("1", by=1), "when": ax.when.at([3, 8, 14]), "probe": torch.randn(8, 4)}
    return ax.Grower(model, optimizer, **words, keep=True, log=log)


def train(grower: ax.Grower, calls: int) -> None:
    for _ in range(2 * calls):
        loss = grower.model(torch.randn(16, 4)).square().mean()
        loss.backward()
        grower.optimizers[0].step()
        grower.optimizers[0].zero_grad()
        if grower.optimizer_steps % 2 == 0:
            grower.step(loss.item(), accuracy=0.5)


def test_the_page_tells_what_the_grower_did(tmp_path: Path) -> None:
    grower = build(tmp_path)
    train(grower, 10)  # grows at calls 3 and 8
    grower.undo()
    train(grower, 12)
    report = Report.of(grower, "A run")
    run = report.run
    assert [(g.at.step, g.undone and g.undone.step) for g in run.growths] == [(6.0, None), (16.0, 20.0), (28.0, None)]
    assert [g.why for g in run.growths] == ["", "undo()", ""]
    kept = [g.entry["fingerprint"] for g in run.kept]
    assert kept == [entry.fingerprint for entry in grower.journal]
    (_, live), (_, aside) = run.branches()
    steps = run.readings.columns["step"]
    assert [steps[at] for at in live] == [*range(2, 42, 2)] and [steps[at] for at in aside] == [18, 20]
    page = parsed(report.html())
    assert [row[0] for row in table_of(section(page, "decisions"))] == ["1", "2", "3"]
    bars = of_class(svg(page, "layer-chart-step"), "layer")
    assert [words(bar.find("title")).split(":")[0] for bar in bars] == ["0", "1.0", "1.1", "1.2", "1.2", "2"]
    heights = [float(bar.find("rect").get("height")) for bar in bars]
    assert heights == pytest.approx([26 * 8 / 24, 26, 26, 26, 12, 3], abs=0.06)  # 8, 24, 24, 24, unknown and 1 units
    again = Report.read(tmp_path, "A run")
    assert [g.entry for g in again.run.growths] == [g.entry for g in run.growths] and again.run.notes == []


def test_a_resumed_run_is_one_page(tmp_path: Path) -> None:
    grower = build(tmp_path / "log")
    train(grower, 5)
    ax.save(grower, tmp_path / "last")
    train(grower, 4)  # grows at call 8, and is lost
    grower.log.close()
    resumed = build(tmp_path / "log")
    ax.load(tmp_path / "last", resumed)
    train(resumed, 10)
    run = Report.of(resumed).run
    assert list(run.readings.columns["step"]) == [*range(2, 32, 2)]
    assert [growth.at.step for growth in run.growths] == [6.0, 16.0, 28.0]
    assert [g.entry["fingerprint"] for g in run.kept] == [entry.fingerprint for entry in resumed.journal]
    assert run.notes == ["4 readings were made again after a resume; the later ones are shown."]
    seconds = list(run.readings.columns["seconds"])
    assert seconds == sorted(seconds)


def test_a_grower_without_a_log(tmp_path: Path) -> None:
    grower = build(None)
    train(grower, 10)
    report = Report.of(grower)
    assert [growth.at.step for growth in report.run.growths] == [6.0, 16.0]
    assert report.run.end.step == 20
    assert "This run keeps no log" in words(of_class(parsed(report.html()), "notes")[0])


def test_the_code_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code in re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(DOCUMENT), "exec"), namespace)
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert len(namespace["report"].run.kept) == 2  # type: ignore[attr-defined]
