"""Whether growing has helped: what the page says at its top, and the row of each growth."""

import json
import math
import re

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.cli import main
from auxin.report import Report
from auxin.report.lineage import read_layers
from auxin.report.log import from_metrics, read_log
from auxin.report.verdict import rising, steps_of, verdict

EDIT = {"type": "auxin.edits.duplicate:Duplicate", "at": "blocks"}


def reading(call, value, flops=0.0, **more):
    places = {"call": call, "step": call, "flops": flops, "seconds": call, "parameters": 10}
    return {"kind": "reading", **places, "metric": value, "metrics": {}, **more}


def growth(call, number=0, **more):
    entry = {"id": number, "edit": EDIT, "added": [{"path": f"blocks.{number + 1}"}]}
    entry |= {"parameters": {"before": 10, "after": 20}}
    return {"kind": "growth", "call": call, "step": call, "number": number, "entry": {**entry, **more}, "line": "x"}


def decision(call, options=(), chosen=None, reason="at(counts=[2])"):
    weighed = [{"options": list(options), "chosen": chosen, "flops": 1.0}] if options else []
    line = {"kind": "decision", "call": call, "step": call, "fired": True, "chosen": "Duplicate", "weighed": weighed}
    return {**line, "reason": reason, "waiting": None}


def run_of(*lines):
    return from_metrics(lines)


FELL = [reading(1, 1.0), reading(2, 0.8), decision(2), growth(2), reading(3, 0.9), reading(4, 0.5, flops=7e6)]


def test_without_a_branch_the_verdict_says_what_is_not_known():
    said = verdict(run_of(*FELL))
    assert said.startswith("Best metric 0.5000 at step 4, against 0.8000 before the first growth.")
    assert "No branch without growth was run, so how much of it growing has brought is not known." in said


def test_what_is_never_better_again_did_not_help():
    said = verdict(run_of(*FELL[:-1]))
    assert said == (
        "Growing did not help: nothing after the first growth is better than before. Best metric 0.8000 at step 2."
    )


@pytest.mark.parametrize(
    ("obtained", "words"),
    [(0.6, "Growing helped: 1 of 1"), (0.9, "Growing did not help: 0 of 1")],
)
def test_a_branch_that_did_not_grow_decides(obtained, words):
    options = [{"edit": "as it is", "obtained": 0.7}, {"edit": "Duplicate('blocks')", "obtained": obtained}]
    lines = [reading(1, 1.0), reading(2, 0.8), decision(2, options, 1), growth(2), reading(3, 0.5)]
    assert verdict(run_of(*lines)).startswith(f"{words} growths ended below a branch that did not grow")
    page = Report(run_of(*lines), "a run").html()
    assert "Branch not grown" in page and '<td class="n">0.7000</td>' in page


def test_the_branch_that_did_not_grow_is_what_the_end_is_held_against():
    """Not a reading of the untrained network, where there was no other before the growth."""
    options = [{"edit": "as it is", "obtained": 0.7}, {"edit": "Duplicate('blocks')", "obtained": 0.6}]
    said = verdict(run_of(reading(1, 9.0), decision(2, options, 1), growth(2), reading(3, 0.5)))
    assert said.endswith("Best metric 0.5000 at step 3, against 0.7000 in the first branch that did not grow.")


def test_nothing_is_marked_where_everything_is_worse():
    page = Report(run_of(*FELL[:4], reading(3, 0.9)), "a run").html()
    assert "+0.100" in page and '<tr class="marked">' not in page


def test_of_two_growths_one_is_compared():
    options = [{"edit": "as it is", "obtained": 0.7}, {"edit": "Duplicate('blocks')", "obtained": 0.6}]
    lines = [*FELL[:3], growth(2), reading(3, 0.7), decision(3, options, 1), growth(3, 1), reading(4, 0.5)]
    assert "1 of 1 growths" in verdict(run_of(*lines)) and "; 1 more was not compared." in verdict(run_of(*lines))


def test_a_run_in_which_nothing_grew_and_one_in_which_nothing_was_measured():
    assert verdict(run_of(reading(1, 2.0), reading(2, 1.5))) == (
        "Best metric 1.500 at step 2. Nothing has grown in this run."
    )
    assert verdict(run_of(growth(2))) == ""
    assert verdict(run_of(reading(1, None), growth(1))) == ""


@pytest.mark.parametrize(
    ("reason", "name", "up"),
    [
        ("plateau(patience=2, mode='max')", "dice", True),
        ("plateau(patience=2, mode='min')", "accuracy", False),
        ("at(counts=[3])", "val_accuracy", True),
        ("at(counts=[3])", "val_loss", False),
    ],
)
def test_which_way_is_better_is_said_by_the_trigger_or_the_name(reason, name, up):
    run = run_of(reading(1, 0.5, name=name), decision(1, reason=reason), growth(1), reading(2, 0.7))
    assert run.given == name and rising(run, name) is up
    assert f"Best {name} {'0.7000 at step 2' if up else '0.5000 at step 1'}" in verdict(run)


def test_before_after_and_the_cost_of_each_growth():
    lines = [*FELL, growth(4, 1), reading(5, 0.6, flops=9e6), reading(6, math.nan, flops=1e7)]
    first, second = steps_of(run_of(*lines), "metric", False)
    assert (first.before, first.after, second.before, second.after) == (0.8, 0.5, 0.5, 0.6)
    page = Report(run_of(*lines), "a run").html()
    (marked,) = re.findall(r'<tr class="marked">(.*?)</tr>', page)
    assert ">0.5000<" in marked and ">-0.300<" in marked


def test_growths_of_a_journal_stand_between_the_readings_around_them():
    log = [{"step": step, "validation": 1 / step} for step in (1, 2, 4, 8)]
    entries = [{"at": {"optimizer_steps": 2}, "edit": EDIT, "added": [{"path": "blocks.1"}]}]
    page = Report.from_metrics(entries, log, title="a").html()
    (marked,) = re.findall(r'<tr class="marked">(.*?)</tr>', page)
    assert ">0.5000<" in marked and ">0.1250<" in marked and ">-0.375<" in marked


def test_the_ratio_of_a_growth_is_that_of_its_chart():
    flow = {"kind": "flow", "growth": 0, "dead": []}
    flows = [{**flow, "step": 3, "ratios": {"blocks.1": 0.1}}, {**flow, "step": 4, "ratios": {"blocks.1": 0.25}}]
    page = Report(run_of(*FELL[:3], growth(2, gradient_ratio=9.0), *flows), "a run").html()
    assert ">0.250×<" in page and "9.00×" not in page
    assert ">9.00× (probe)<" in Report(run_of(*FELL[:3], growth(2, gradient_ratio=9.0)), "a run").html()
    two = [{**flow, "step": 3, "ratios": {"blocks.1": 0.1, "blocks.2": 0.3}}]
    assert ">0.100 to 0.300×<" in Report(run_of(*FELL[:3], growth(2), *two), "a run").html()


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell])
def test_a_recurrent_layer_is_as_wide_as_its_hidden_state(layer):
    shapes = {f"rnn.{name}": tuple(p.shape) for name, p in layer(5, 7).named_parameters()}
    assert [(one.path, one.units) for one in read_layers([], shapes)] == [("rnn", 7)]


def test_one_with_a_projection_too():
    shapes = {f"rnn.{name}": tuple(p.shape) for name, p in nn.LSTM(5, 7, proj_size=3).named_parameters()}
    assert [one.units for one in read_layers([], shapes)] == [7]


def test_numbers_that_are_written_out_stand_on_the_right_and_a_row_is_marked():
    table = {"columns": ["", "mean", "seeds", "what"], "marked": [1]}
    table["rows"] = [["a", "1,234.50", "–", "1 block"], ["grown", "+2.1", "0.1 0.2", "2"]]
    page = Report.from_metrics([], [{"step": 0, "loss": 1.0}], title="a", table=table).html()
    assert '<td class="n">1,234.50</td><td class="n">–</td><td>1 block</td>' in page
    assert '<tr class="marked"><th scope="row">grown</th>' in page


def test_auto_has_a_curve_and_seconds(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    batches = [(x[i : i + 16], x[i : i + 16].sum(1, keepdim=True)) for i in range(0, 64, 16)]
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    evidence = ax.Evidence(lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), batches, validation=batches)
    grower = ax.auto(model, optimizer, evidence=evidence, budget=3e5, when=ax.when.at([10**9]), log=str(tmp_path))
    grower.train()
    run = read_log(tmp_path / "metrics.jsonl")
    assert sum(map(math.isfinite, run.readings.metrics["validation"])) > 5
    assert verdict(run).startswith("Best validation loss ")
    page = Report.read(tmp_path).html()
    assert "No loss was recorded" not in page and grower.ledger.seconds["training"] > 0


def test_seconds_that_nobody_has_counted_are_not_zero():
    run = run_of(reading(1, 1.0), {"kind": "ledger", "flops_by_kind": {"training": 5.0}, "seconds_by_kind": {}})
    assert ">not timed<" in Report(run, "a run").html()


def test_the_compute_of_a_run_counts_what_no_reading_counts():
    spent = {"kind": "ledger", "flops_by_kind": {"training": 4e9, "races": 2e9}, "seconds_by_kind": {}}
    before = Report(run_of({**reading(1, 1.0), "flops": 4e9}), "a run").html()
    after = Report(run_of({**reading(1, 1.0), "flops": 4e9}, spent), "a run").html()
    assert "<dt>Compute</dt><dd>4 GFLOP</dd>" in before and "<dt>Compute</dt><dd>6 GFLOP</dd>" in after


def test_the_command_prints_plain_data(tmp_path, capsys):
    lines = [json.dumps(line) + "\n" for line in FELL]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert main(["report", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"].startswith("Best metric 0.5000") and told["better"] == "min"
    (row,) = told["growths"]
    assert (row["best_before"], row["best_after"], row["branch_grown"]) == (0.8, 0.5, None)
    assert row["parameters"] == {"before": 10, "after": 20} and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("command", ["demo", "report", "upscale", "doctor"])
def test_the_help_of_each_command_has_an_example_and_the_exit_statuses(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"auxin {command} " in said.partition("example")[2] and "Exit status: 0 where" in said
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert f"  auxin {command} " in said and "exit status: 0 where all went well; 1 where" in said
