"""What choosers have weighed: in the ledger, through save and load, in the log and on the page."""

import json

import pytest
import torch
from test_auto import begun, small
from test_races import data, evidence
from torch import nn

import auxin as ax
from auxin.ledger import ENOUGH_STEPS, Decision
from auxin.report import Report

torch.set_num_threads(1)

EDITS = [ax.Widen("0", by=2), ax.Widen("0", by=6), ax.Widen("nowhere", by=1)]


def decided(choose, **words):
    """One decision of a Grower, behind ten steps."""
    model = small()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    words = {"edits": EDITS, "when": ax.when.at([1]), "choose": choose, "probe": data()[0], **words}
    with pytest.warns(UserWarning, match="nowhere"):
        grower = ax.Grower(model, opt, evidence=evidence(), **words)
    grower.evidence.train(model, [opt], 10)
    change = grower.step()
    return grower, change


def test_a_race_says_what_was_predicted_what_came_of_it_and_what_it_cost():
    grower, change = decided(ax.choose.by_race(rivals=1))
    (decision,) = grower.ledger.decisions
    race, (looks,) = grower.choose.races[0], grower.choose.looks
    as_it_is, raced, looked_at, not_had = decision.options
    assert (decision.call, decision.step, decision.chosen) == (1, 10 + race.steps, race.winner) and change is not None
    assert as_it_is.edit == "as it is" and as_it_is.obtained == race.branches[0].score and as_it_is.predicted is None
    assert raced.obtained == race.branches[1].score and raced.predicted == looks[0].gain
    assert looked_at.obtained is None and looked_at.predicted == looks[1].gain
    assert "nowhere" in not_had.why_not and not_had.parameters is None
    spent = grower.ledger.flops
    assert decision.flops == spent["races"] + spent["probing"] + spent["evaluation"] > 0 and decision.seconds > 0


@pytest.mark.parametrize("choose", [ax.choose.by_gain(), ax.choose.by_trial(steps=3)], ids=["by_gain", "by_trial"])
def test_the_other_choosers_do_too(choose):
    grower, change = decided(choose)
    (decision,) = grower.ledger.decisions
    named = [option.edit for option in decision.options]
    assert named[-3:] == ["Widen('0', by=2)", "Widen('0', by=6)", "Widen('nowhere', by=1)"]
    assert decision.options[-1].why_not and decision.flops > 0
    assert decision.steps == getattr(choose, "steps", None)
    assert f"Widen('0', by={change.edit.by})" == named[decision.chosen]


def test_what_stays_as_it_is_is_a_decision_too():
    grower, change = decided(ax.choose.by_gain(least=1e9))
    assert change is None and grower.ledger.decisions[0].chosen is None
    grower, change = decided(ax.choose.by_trial(steps=1, margin=1e9))
    assert change is None and grower.ledger.decisions[0].chosen == 0


def test_they_are_saved_and_loaded(tmp_path):
    grower, _ = decided(ax.choose.by_race())
    ax.save(grower, tmp_path / "run")
    model = small()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    words = {"edits": EDITS[:2], "when": ax.when.at([1]), "probe": data()[0]}
    again = ax.Grower(model, opt, evidence=evidence(), choose=ax.choose.by_race(), **words)
    ax.load(tmp_path / "run", again)
    assert again.ledger == grower.ledger and isinstance(again.ledger.decisions[0], Decision)
    page = Report.read(tmp_path / "run").html()
    assert "What was weighed" in page and "What the run has spent" in page


def test_the_log_and_the_page_tell_of_them(tmp_path):
    _, _, _, grower = begun(log=tmp_path / "run", steps=600)
    grower.train()
    grower.log.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    weighed = [one for line in lines if line["kind"] == "decision" for one in line.get("weighed", ())]
    assert weighed == grower.ledger.state_dict()["decisions"] and len(weighed) == len(grower.races) > 0
    assert lines[-1]["kind"] == "ledger" and lines[-1]["flops_by_kind"] == grower.ledger.flops
    page = Report.read(tmp_path / "run").html()
    for option in grower.ledger.decisions[0].options:
        assert option.edit.replace("'", "&#x27;") in page or option.edit in page
    assert page.count(">chosen after") == len(weighed) and "probing" in page
    assert f"steps, where a verdict wants {ENOUGH_STEPS}" in page  # the first races are shorter than that
    assert page.count("growth_pays") == len(weighed)  # a race and its growth are one row, with the trigger
    assert Report.of(grower).html().count(">chosen after") == len(weighed)


def test_the_page_of_a_run_that_weighs_nothing_has_no_such_table():
    model = small()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    grower = ax.Grower(model, opt, edits=EDITS[0], when=ax.when.every(1), probe=data()[0])
    assert grower.step() and not grower.ledger.decisions
    assert "What was weighed" not in Report.of(grower).html()


def test_what_brings_nothing_new_has_no_predicted_gain():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 1))
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    x, y = torch.randn(16, 6), torch.randn(16, 1)
    evidence = ax.Evidence(lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), [(x, y)], validation=[(x, y)])
    words = {"edits": ax.Repeat("1"), "when": ax.when.every(1), "choose": ax.choose.by_gain(), "probe": x}
    grower = ax.Grower(net, opt, evidence=evidence, **words)
    assert grower.step() is None
    assert [one.predicted for one in grower.ledger.decisions[0].options if "Repeat" in one.edit] == [None]
