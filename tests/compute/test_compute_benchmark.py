"""The runner of benchmarks/compute, at toy size."""

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("scipy")

from ask import Plans, line
from run import Benchmark, OutOfTime, print_tables, write_curves
from scipy import stats
from settings import BadSetting, Config, key_of, read
from store import Store
from table import interval, paired, reached, saved, winner
from training import Learner, Trainer, edit_of

import auxin as ax

COMPUTE = Path(__file__).parent.parent.parent / "benchmarks" / "compute"
TOY = """
title = "toy"
budgets = [1.0]
task = { name = "sources", length = 32, batch = 1 }
network = { width = 16 }
unit = { depth = 2, steps = 6 }
sweep = { rate = [1e-3, 1e-2], seeds = [7] }
report = { seeds = [0, 1], reference = "go on", plans = ["go on", "grow"] }
savings = { target = "go on", budget = 1.0, within = 0.1, rows = ["grow"] }

[[gains]]
of = "grow"
over = ["anew"]
budget = 1.0

[training]
warmup = 2
decay = 0.5
betas = [0.9, 0.95]
clip = 1.0
device = "cpu"
precision = "float32"
compile = false

[[rows]]
name = "go on"
depth = 1
stages = [{ flops = [1, 0], rate = 1e-3, weight_decay = 0.0 }, { flops = [0, 1] }]

[[rows]]
name = "grow"
depth = 1
stages = [
  { flops = [1, 0], rate = 1e-3, weight_decay = 0.0 },
  { flops = [0, 1], edit = [{ do = "Duplicate", at = "blocks", content = "fresh", output = "keep" }] },
]

[[rows]]
name = "anew"
depth = 2
fixed = true
stages = [{ flops = [0, 1] }]
"""


class Planted:
    """Stands for a Trainer: says what the loss of a run is, and counts the runs."""

    def __init__(self, loss: Any):
        self.loss, self.runs = loss, []

    def unit(self, run: dict, steps: int) -> float:
        return 100.0

    def carry_out(self, run: dict) -> dict[str, Any]:
        self.runs.append(run)
        loss = self.loss(run)
        flops = sum(stage["flops"] for stage in run["stages"])
        test = loss if run["test"] else None
        return {
            "validation": loss,
            "test": test,
            "flops": flops,
            "seconds": {"training": 0.0},
            "curve": [[flops, loss]],
        }


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "toy.toml"
    path.write_text(TOY)
    return read(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(path: Path) -> list[dict]:
    held = lines(path)
    for one in held:
        one["result"].pop("seconds", None)
    return held


def ended(config: Config, path: Path, trainer: Any, **limits: Any) -> Benchmark:
    benchmark = Benchmark(config, Store(path), trainer, **limits)
    benchmark.run()
    return benchmark


@pytest.mark.long
def test_it_goes_on_where_it_stopped_and_ends_the_same(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, seeds=(0,), sweep={**config.sweep, "rate": [1e-2]})
    ended(config, tmp_path / "whole", Trainer(tmp_path))
    with pytest.raises(OutOfTime):
        ended(config, tmp_path / "parts", Trainer(tmp_path), runs=4)
    assert len(lines(tmp_path / "parts")) == 5  # the unit, and four runs
    ended(config, tmp_path / "parts", Trainer(tmp_path))
    assert without_seconds(tmp_path / "parts") == without_seconds(tmp_path / "whole")


def test_what_is_known_is_not_run_again_and_a_changed_setting_is(config: Config, tmp_path: Path) -> None:
    planted = Planted(lambda run: run["seed"] + run["rate"])
    ended(config, tmp_path / "rows", planted)
    ended(config, tmp_path / "rows", again := Planted(planted.loss))
    assert len(planted.runs) == 3 * 2 + 3 * 2 and not again.runs
    ended(dataclasses.replace(config, seeds=(0, 1, 2)), tmp_path / "rows", again)
    assert [run["seed"] for run in again.runs] == [2, 2, 2]
    before = {key_of(run) for run in planted.runs}
    assert len(before) == len(planted.runs)
    ended(
        dataclasses.replace(config, training={**config.training, "clip": 2.0}),
        tmp_path / "rows",
        other := Planted(planted.loss),
    )
    assert len(other.runs) == len(planted.runs) and not before & {key_of(run) for run in other.runs}


def test_rows_of_one_seed_are_paired(config: Config, tmp_path: Path) -> None:
    trainer, settings = Trainer(tmp_path), config.first_settings()

    def learner(row: str, seed: int) -> Learner:
        run = config.run(config.row(row), 1.0, settings, seed, 1e9)
        return Learner(run, trainer.case(run["task"]))

    go_on, grow, anew, other = learner("go on", 0), learner("grow", 0), learner("anew", 0), learner("go on", 1)
    for step in range(3):
        assert all(torch.equal(a, b) for a, b in zip(go_on.batch(step), anew.batch(step), strict=True))
        assert not torch.equal(go_on.batch(step)[0], other.batch(step)[0])
    assert not torch.equal(go_on.batch(0)[0], go_on.batch(1)[0])
    weights = [copy.deepcopy(one.model.state_dict()) for one in (go_on, grow, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


def test_rows_go_on_from_one_old_network_that_none_of_them_changes(config: Config, tmp_path: Path) -> None:
    trainer, unit = Trainer(tmp_path), 4e6
    runs = [config.run(config.row(name), 1.0, config.first_settings(), 0, unit) for name in ("grow", "go on", "grow")]
    first, go_on, again = (trainer.carry_out(run) for run in runs)
    assert len(trainer._begun) == 1
    assert first["curve"] == again["curve"] and first["test"] == again["test"]
    alone = Trainer(tmp_path).carry_out(runs[1])
    assert alone["curve"] == go_on["curve"] and alone["validation"] == go_on["validation"]


def test_a_run_spends_its_budget_and_no_more_and_a_growth_is_paid_for(config: Config, tmp_path: Path) -> None:
    trainer, unit = Trainer(tmp_path), 6e6
    run = config.run(config.row("grow"), 1.0, config.first_settings(), 0, unit)
    result = trainer.carry_out(run)
    learner = Learner(run, trainer.case(run["task"]))
    small = learner.cost()
    learner.grow(run["stages"][1])
    large = learner.cost()
    assert learner.spent > 0 and small < large
    assert 2 * unit - large < result["flops"] <= 2 * unit
    steps = int(unit / small)
    steps += int((2 * unit - steps * small - learner.spent) / large)
    assert result["steps"] == steps and result["blocks"] == 2


def test_the_rate_falls_to_nothing_over_the_last_part_and_old_networks_keep_theirs(
    config: Config, tmp_path: Path
) -> None:
    seen = []

    class Watched(Learner):
        def train(self, until, rate, curve):
            seen.append([rate(spent) for spent in (0.0, 1e7, 1.5e7, 1.75e7, 2e7)])
            return super().train(until, rate, curve)

    class WatchedTrainer(Trainer):
        def begun(self, run):
            learner = super().begun(run)
            learner.__class__, learner.spent = Watched, 1e7
            return learner

    run = config.run(config.row("go on"), 1.0, {"rate": 0.1, "dropout": 0.0, "weight_decay": 0.0}, 0, 1e7)
    WatchedTrainer(tmp_path).carry_out(run)
    assert seen == [pytest.approx([0.1, 0.1, 0.1, 0.05, 0.0])]


def test_a_killed_run_leaves_whole_lines(tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text(TOY)
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(COMPUTE / "run.py"), str(tmp_path / "toy.toml"), "--out", str(out)]
    paths = os.pathsep.join([str(Path(ax.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.read_bytes().endswith(b"\n") and len(lines(out)) > 2


def test_a_line_that_was_cut_off_is_written_over(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    ended(config, out, Planted(lambda run: 1.0))
    whole = without_seconds(out)
    out.write_bytes(out.read_bytes()[:-40])
    assert len(Store(out).results) == len(whole) - 1
    ended(config, out, again := Planted(lambda run: 1.0))
    assert len(again.runs) == 1 and without_seconds(out) == whole


def test_every_row_has_the_same_sweep_and_it_goes_beyond_its_end(config: Config, tmp_path: Path) -> None:
    best = {"go on": 1e-3, "grow": 1e-1, "anew": 1e-5}
    depths = {(1, 2): "go on", (1, 3): "grow", (2, 1): "anew"}

    def loss(run: dict) -> float:
        edits = sum("edit" in stage for stage in run["stages"])
        row = depths[run["depth"], len(run["stages"]) + edits]
        return abs(math.log10(run["rate"]) - math.log10(best[row])) + abs(run["dropout"] - 0.2)

    sweep = {**config.sweep, "rate": [1e-3, 1e-2], "dropout": [0.0, 0.2], "extend": 1}
    benchmark = ended(dataclasses.replace(config, sweep=sweep), tmp_path / "rows", planted := Planted(loss))
    found = {row.name: benchmark.settings(row, 1.0) for row in config.rows}
    assert {name: one["rate"] for name, one in found.items()} == {"go on": 1e-3, "grow": 1e-1, "anew": 1e-4}
    assert all(one["dropout"] == 0.2 for one in found.values())
    assert not [run for run in planted.runs if run["test"] and run["seed"] in config.sweep["seeds"]]


def test_a_setting_that_diverges_is_not_chosen(config: Config, tmp_path: Path) -> None:
    benchmark = ended(config, tmp_path / "rows", Planted(lambda run: None if run["rate"] == 1e-2 else 2.0))
    assert benchmark.settings(config.rows[0], 1.0)["rate"] == 1e-3


def test_a_row_takes_over_the_settings_of_another(config: Config, tmp_path: Path) -> None:
    rows = (*config.rows, dataclasses.replace(config.row("anew"), name="under-tuned", depth=3, settings_of="go on"))
    config = dataclasses.replace(config, rows=rows)
    benchmark = ended(
        config, tmp_path / "rows", planted := Planted(lambda run: abs(run["rate"] - 1e-3 * run["depth"] ** 4))
    )
    assert benchmark.settings(config.row("anew"), 1.0)["rate"] == 1e-2
    assert benchmark.settings(config.row("under-tuned"), 1.0)["rate"] == 1e-3
    assert not [run for run in planted.runs if run["depth"] == 3 and not run["test"]]


def test_the_table_of_known_results(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = {(1, 2): 2.0, (1, 3): 1.5, (2, 1): 1.25}

    def loss(run: dict) -> float:
        row = run["depth"], len(run["stages"]) + sum("edit" in stage for stage in run["stages"])
        return end[row] + (0.01 if row[1] == 3 else -0.01) * run["seed"]

    benchmark = ended(config, tmp_path / "rows", Planted(loss))
    benchmark.trainer = None
    capsys.readouterr()
    print_tables(benchmark)
    text = capsys.readouterr().out
    rows = {line[2:44].strip(): line[44:].split() for line in text.splitlines() if line.startswith("  ")}
    assert rows["go on"][:2] == ["1.9950", "2"]

    assert "  grow                                       1.5050     2    -0.4900 +- 0.1271" in text
    assert "best fixed size in hindsight               1.2450     2    -0.7500 +- 0.0000" in text
    assert "of go on, grow: grow\n" in text
    assert "How much lower 'grow' ends at budget 1 than\n  anew" in text and "-0.2600 +- 0.1271 (2 seeds)" in text
    write_curves(benchmark, tmp_path / "curves.csv")
    told = (tmp_path / "curves.csv").read_text().splitlines()
    assert told[0] == "row,budget,seed,flops,training loss" and told[1] == "go on,1.0,0,200.0,2.0" and len(told) == 7


def test_half_a_table_of_half_of_the_results(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OutOfTime):
        ended(config, tmp_path / "rows", Planted(lambda run: 1.0), runs=8)
    benchmark = Benchmark(config, Store(tmp_path / "rows"), None)
    capsys.readouterr()
    print_tables(benchmark)
    text = capsys.readouterr().out
    assert "go on" in text and "grow" in text and "  anew" not in text


def test_paired_intervals_are_those_of_scipy() -> None:
    ours, theirs = {0: 1.0, 1: 2.0, 2: 4.0, 9: 50.0}, {0: 0.5, 1: 2.5, 2: 3.0, 8: 9.0}
    mean, half, count = paired(ours, theirs)
    known = stats.ttest_rel([1.0, 2.0, 4.0], [0.5, 2.5, 3.0]).confidence_interval()
    assert count == 3 and (mean - half, mean + half) == pytest.approx((known.low, known.high))
    assert interval([3.0]) == (3.0, math.inf, 1)


def test_savings_are_interpolated_between_ends() -> None:
    points = [(100.0, 3.0), (400.0, 2.0)]
    assert reached(points, 2.5) == pytest.approx(200.0)
    assert reached(points, 2.0) == pytest.approx(400.0)
    assert reached(points, 3.5) == 100.0 and reached(points, 1.9) is None
    parts, missed = saved({0: points, 1: points, 2: points}, {0: (1000.0, 2.5), 1: (800.0, 1.0), 3: (1.0, 1.0)}, 0.0)
    assert parts == [pytest.approx(0.8)] and missed == 1
    assert saved({0: points}, {0: (1000.0, 2.5)}, 0.2)[0] == [pytest.approx(0.9)]


def test_a_winner_is_one_only_beyond_the_interval() -> None:
    sure = {"a": {0: 1.0, 1: 1.1, 2: 1.2}, "b": {0: 2.0, 1: 2.1, 2: 2.3}}
    assert winner(sure) == ("a", True)
    assert winner({**sure, "c": {0: 0.9, 1: 1.4, 2: 1.3}}) == ("a", False)


def test_edits_are_written_as_tables() -> None:
    edit = edit_of({"do": "Repeat", "at": "blocks", "blocks": [0, 1]}, 16)
    assert edit == ax.Repeat("blocks", blocks=(0, 1))
    assert edit_of({"do": "Insert", "at": "blocks", "layer": "dilated", "index": 3}, 16).layer(index=3).before == 16


def test_the_rows_that_a_verdict_judges_are_found_by_what_they_do() -> None:
    for name in ("more_demand", "more_digits", "more_bytes"):
        plans = Plans.of(read(COMPUTE / f"{name}.toml"))
        assert (plans.go_on.name, plans.grow.name, plans.anew.name) == ("go on", "grow", "start anew")


def test_a_verdict_is_right_where_it_names_the_winner_or_sees_no_difference() -> None:
    told = {0: {"winner": "grow", "price": 0.08}, 1: {"winner": "no difference", "price": 0.1}}
    assert "right 1 of 2, price 10.0% at most: grow, no difference" in line(1.0, ("grow", True), told)
    assert "right 1 of 2" in line(1.0, ("go on", False), told)
    assert "right 0 of 2" in line(1.0, ("go on", True), told)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds = [7]", "seeds = [1, 7]", r"seeds \[1\] are swept and reported"),
        ('reference = "go on"', 'reference = "gone"', "there is no row 'gone'; there are 'go on', 'grow', 'anew'"),
        ('name = "anew"', 'name = "grow"', "two rows have one name"),
        ("fixed = true", "fixd = true", "row 'anew': fixd is not known"),
        ('title = "toy"', "", "'title' is missing"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in TOY
    (tmp_path / "toy.toml").write_text(TOY.replace(old, new))
    with pytest.raises(BadSetting, match=said):
        read(tmp_path / "toy.toml")


@pytest.mark.parametrize("path", sorted(COMPUTE.glob("*.toml")), ids=lambda path: path.stem)
def test_the_configurations_are_well_formed(path: Path) -> None:
    config = read(path)
    assert len(config.seeds) >= 5
    for row in config.rows:
        assert row.tune_at is None or row.tune_at in row.budgets
        for stage in row.stages:
            for words in stage.get("edit", []):
                edit_of(words, row.width)
        shares = [sum(stage["flops"][n] for stage in row.stages) for n in (0, 1)]
        assert shares in ([0, 1], [1, 1]), row.name


@pytest.mark.long
def test_the_one_for_a_gpu_runs_at_toy_size(tmp_path: Path) -> None:
    config = read(COMPUTE / "h200.toml", device="cpu")
    task = {**config.task, "length": 64, "batch": 1, "head": 8, "pattern": "*.py"}
    row = dataclasses.replace(config.row("late jump: 1 -> 12"), width=16)
    config = dataclasses.replace(config, task=task, training={**config.training, "compile": False})
    result = Trainer(tmp_path).carry_out(config.run(row, 1.0, config.first_settings(), 0, 5e7))
    assert result["blocks"] == 12 and math.isfinite(result["test"]) and result["steps"] > 2
