"""What cannot work is refused when the Grower is built, or at the call."""

import pytest
import torch
from torch import nn

import auxin as ax

EDIT = ax.Duplicate("", by=1)


def grower(**words):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    words = {"edits": EDIT, "when": ax.when.every(10), "probe": torch.ones(3, 2)} | words
    return ax.Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), **words)


@pytest.mark.parametrize("edits", [[], (), iter([])])
def test_no_edits_beside_a_trigger_are_told(edits):
    with pytest.warns(UserWarning, match=r"holds no edit: nothing grows but by grower.grow\(edit\)"):
        assert grower(edits=edits).edits() == []
    assert grower(edits=lambda model: []).edits() == []


def test_without_edits_and_trigger_a_run_is_grown_by_hand():
    by_hand = grower(edits=None, when=None)
    assert "grown by hand" in repr(by_hand) and by_hand.step(1.0) is None and not by_hand.done
    by_hand.grow(EDIT)
    assert len(by_hand.model) == 3 and by_hand.step(1.0) is None


@pytest.mark.parametrize(("words", "why"), [({"edits": None}, "needs edits="), ({"when": None}, "needs when=")])
def test_edits_and_trigger_go_together(words, why):
    with pytest.raises(ax.GrowthError, match=why):
        grower(**words)


NEED_ONE = {
    "a copy": (EDIT, r"output='zero'\) needs one batch to find which weights must be zero: pass probe=batch"),
    "a copy of several": ([ax.Duplicate("", by=1, output="keep"), EDIT], r"output='zero'\) needs one batch"),
    "one growth by two": ([[ax.Duplicate("", by=1, output="keep"), EDIT]], r"output='zero'\) needs one batch"),
    "a new layer": (ax.Insert("", nn.Identity), r"Insert\(at=''\): init='preserve' needs one batch.*init='default', "),
    "any layer behind": (ax.After("0"), r"After\(at='0'\): to choose a layer that fits it needs one batch"),
    "a layer behind": (ax.After("0", nn.Identity), r"After\(at='0'\): init='preserve' needs one batch"),
    "another": (ax.Replace("0", nn.Identity, init="preserve"), r"Replace\(at='0'\): init='preserve' needs one batch"),
    "a width": (ax.Widen("0", by=1), r"which tensors share a width is seen in a forward; pass probe=batch"),
    "a fade": (ax.Repeat("", fade=3), r"Repeat\(at='', fade=3\) needs one batch: pass probe=batch; or fade=0"),
    "a slow waking": (ax.Wake("0", fade=3), r"Wake\(at='0', fade=3\): a fade-in needs one batch.*or fade=0"),
}


@pytest.mark.parametrize("name", NEED_ONE)
def test_a_probe_that_is_missing_is_asked_for_when_a_grower_is_built(name):
    edits, match = NEED_ONE[name]
    with pytest.raises(ax.GrowthError, match=match):
        grower(edits=edits, probe=None)


def test_edits_that_need_no_probe_do_without():
    edits = [ax.Duplicate("", output="keep"), ax.Insert("", nn.Identity, init="default"), ax.Remove("0"), ax.Wake("0")]
    assert grower(edits=[*edits, ax.Repeat(""), ax.Untie("")], probe=None).edits()


def test_more_blocks_than_there_are_and_a_range_behind_the_end_are_refused_when_a_grower_is_built():
    with pytest.raises(ax.GrowthError, match=r"there are 2 blocks; order='last' copies at most that many.*lambda"):
        grower(edits=ax.Duplicate("", by=3, order="last"))
    with pytest.raises(ax.GrowthError, match=r"'' holds 2 blocks; blocks=\(i, j\) names those from i to j - 1"):
        grower(edits=ax.Repeat("", blocks=(1, 3)))


class Own:
    def plan(self, model, context):
        raise AssertionError("not asked for a plan")

    def check(self, model):
        raise ax.GrowthError("no place for my own edit.")

    needs_probe = "my own edit looks at a batch"


def test_edits_of_ones_own_say_what_they_need():
    with pytest.raises(ax.GrowthError, match="no place for my own edit..*edits=lambda model"):
        grower(edits=Own())
    with pytest.warns(UserWarning, match="no place for my own edit. As long as no growth makes that place"):
        with pytest.raises(ax.GrowthError, match="my own edit looks at a batch"):
            grower(edits=[ax.Wake("0"), Own()], probe=None)


def test_functions_without_an_argument():
    with pytest.raises(ax.GrowthError, match="write it as edits=lambda model"):
        grower(edits=lambda: [EDIT])
    with pytest.raises(ax.GrowthError, match="write it as when=lambda reading"):
        grower(when=lambda: True)
    grower(edits=lambda model: [], when=lambda reading: False)


@pytest.mark.parametrize("metric", ["0.5", b"1", True])
def test_a_metric_that_is_no_number(metric):
    one = grower()
    with pytest.raises(ax.GrowthError, match="not a number"):
        one.step(metric)
    with pytest.raises(ax.GrowthError, match="loss is .* not a number"):
        one.step(loss=metric)
    assert one.calls == 0


def test_a_limit_that_is_a_number():
    with pytest.raises(ax.GrowthError, match=r"limit=3: pass auxin.Limit\(parameters"):
        grower(limit=3)
