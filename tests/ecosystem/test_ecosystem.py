"""A few companions of other packages of each kind; all of them with `make companions`, which installs the packages."""

import multiprocessing

import pytest
import write_table
from their_averages import AVERAGES
from their_optimizers import names
from their_schedules import SCHEDULES

FEW = (
    "lion_pytorch.Lion",  # a state per parameter
    "schedulefree.AdamWScheduleFree",  # counts in its groups
    "muon.SingleDeviceMuonWithAuxAdam",  # two kinds of groups
    "prodigyopt.Prodigy",  # flat states, one rate for all groups
    "timm.optim.Lookahead",  # stands around another
    "timm.optim.Lamb",
)
RIGHT = {"lion_pytorch.Lion", "schedulefree.AdamWScheduleFree", "muon.SingleDeviceMuonWithAuxAdam", "timm.optim.Lamb"}


@pytest.mark.parametrize("name", [*FEW, *AVERAGES, *SCHEDULES])
def test_right_or_refused_by_name(name, tmp_path):
    _, row = write_table.trial((name, str(tmp_path)))
    if row["save, load"].verdict == "right":
        with multiprocessing.get_context("spawn").Pool(1) as other:
            row["save, load"] = other.apply(write_table.load, ((name, str(tmp_path)),))[1]
    assert not [(column, one.why) for column, one in row.items() if one.verdict == "wrong"]
    if name in RIGHT or name in AVERAGES:
        assert {one.verdict for one in row.values()} == {"right"}


def test_there_are_enough_of_them():
    assert len(names()) >= 40 and len(AVERAGES) >= 5 and len(SCHEDULES) >= 6
