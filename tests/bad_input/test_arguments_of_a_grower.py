"""What cannot work is refused when the Grower is built, or at the call."""

import pytest
import torch
from torch import nn

import auxin as ax

EDIT = ax.Duplicate("", by=1)


def grower(**words):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    words = {"edits": EDIT, "when": ax.when.every(10)} | words
    return ax.Grower(model, torch.optim.SGD(model.parameters(), lr=0.1), **words)


def test_no_edits_are_fine_for_a_run_that_only_surgery_changes():
    assert grower(edits=[]).edits() == []


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
