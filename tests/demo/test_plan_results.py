"""The table, the three lines and the sentence follow the numbers, whichever way they go; a run leaves all behind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import auxin as ax
from auxin.cli import main
from auxin.demo.demand import CYCLE, DAY, Demand
from auxin.demo.electricity import run_electricity
from auxin.demo.forecaster import Forecaster
from auxin.demo.more_compute import PLANS, Setting
from auxin.demo.plan_results import AS_JUDGED, OLD, Ended, PlanResults, Seed, endings, evaluate, sentence, table
from auxin.demo.screen import PlainScreen
from auxin.verdict import Plan, Verdict


def demand() -> Demand:
    time = torch.arange(3 * CYCLE * DAY)
    return Demand(torch.stack([(time * (2 * torch.pi / DAY)).sin(), (time / 9).sin(), (time % 7 < 5).float()], 1))


def verdict(name: str) -> Verdict:
    plans = tuple(Plan(one, "", 1000, 100, (), 0.3, (0.2, 0.4), float(one == name)) for one in PLANS)
    return Verdict(plans, name, None, 0.1, 0.9, 50e9, {"races": 10e9}, 1, 1.0)


def results(grow: float, judged: tuple[str, str] = ("grow", "grow")) -> PlanResults:
    """Forecasts of two seeds that are off by so much; 0.3 going on, 0.2 anew."""
    data, runs = demand(), []
    for seed, plan in enumerate(judged):
        off = {OLD: 0.4, "go on": 0.3, "grow": grow, "start anew": 0.2, AS_JUDGED: 0.25}
        ended = {
            name: Ended(6, 1000, 50e9, 0.1, (data.test.actual + wrong + seed / 100).tolist())
            for name, wrong in off.items()
        }
        runs.append(Seed(verdict(plan), ended))
    return evaluate(data, Setting(), runs)


def test_where_the_judgement_is_right() -> None:
    found = results(grow=0.1)
    assert (found.best, found.rival, found.judged, found.right) == ("grow", "start anew", "grow", 2)
    assert found.errors["go on"] == pytest.approx([0.09, 0.31**2], rel=1e-4) and found.cost == pytest.approx(0.2)
    assert found.naive < 1e-9, "the same every day"
    text = sentence(found)
    assert "auxin judged: grow (2 of 2), for 20 % of the FLOPs that were added" in text
    assert "the best plan in 2 of 2 runs" in text and "better than starting anew" in text


def test_where_it_is_wrong() -> None:
    found = results(grow=0.35, judged=("go on", "start anew"))
    assert (found.best, found.right) == ("start anew", 1)
    text = sentence(found)
    assert "go on (1 of 2), start anew (1 of 2)" in text and "the best plan is to start anew" in text
    assert "worse than going on" in text and "worse than starting anew" in text


def test_three_lines_and_a_table() -> None:
    found = results(grow=0.1)
    assert [line.split()[0] for line in endings(found).splitlines()] == ["started", "grown", "best"]
    assert "starting anew, 50 GFLOP more" in endings(found)
    content = table(found)
    names = ["as a day ago", OLD, "go on", "grow", "start anew", f"{AS_JUDGED} (judging paid)"]
    assert [row[0] for row in content["rows"]] == names
    assert all(len(row) == len(content["columns"]) for row in content["rows"])


def test_a_run_from_end_to_end(tmp_path: Path, capsys) -> None:
    setting = replace(Setting(), dim=4, spent=20e6, added=1.0, batch=(1, 288), pilot_batch=(8, 96), warmup=2)
    found = run_electricity(demand(), setting, 1, tmp_path / "out", PlainScreen())
    shown = capsys.readouterr().err
    assert "price: " in shown and "started from" in shown and "best rival" in shown
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "checkpoint",
        "journal.json",
        "metrics.jsonl",
        "report.html",
    }
    journal = json.loads((tmp_path / "out" / "journal.json").read_text())
    assert len(journal) == 1 and len(journal[0]["added"]) == 3
    network = Forecaster(4, 3)
    ax.load(tmp_path / "out" / "checkpoint", network)
    data = demand()
    assert data.test.error(data.test.forecast(network)) == pytest.approx(found.errors["grow"][0])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "as a day ago" in page and "blocks.5" in page and "<svg" in page


def test_full_is_for_the_whole_demo(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--full", "--csv", "x.csv", "--target", "y", "--horizon", "3"])
    assert "--full belongs to the demo without --csv" in capsys.readouterr().err
