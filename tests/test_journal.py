"""A journal as a sequence: entries, slices that replay, equality."""

import pytest
import torch
from torch import nn

import auxin as ax


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


def built():
    return nn.Sequential(Block())


@pytest.fixture
def journal():
    torch.manual_seed(0)
    model = built()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    edit = ax.Duplicate("", by=1)
    grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.every(1), probe=torch.randn(2, 4))
    for loss in (3.0, float("nan"), 1.0):
        assert grower.step(loss)
    return grower.journal


def test_an_index_gives_an_entry(journal):
    assert len(journal) == 3 and [*journal] == [journal[0], journal[1], journal[2]]
    assert journal[-1] is journal[2] and journal[-1].metrics == {"metric": 1.0}
    with pytest.raises(IndexError):
        journal[3]


@pytest.mark.parametrize(
    ("part", "expected"),
    [(slice(2), [0, 1]), (slice(1, None), [1, 2]), (slice(None, None, 2), [0, 2]), (slice(-1, None), [2])],
)
def test_a_slice_is_a_journal_of_its_own(journal, part, expected):
    sliced = journal[part]
    assert isinstance(sliced, ax.Journal) and [*sliced] == [journal[i] for i in expected]
    sliced.entries.clear()
    assert len(journal) == 3


@pytest.mark.parametrize(("end", "depth"), [(0, 1), (1, 2), (2, 3), (-1, 3), (None, 4)])
def test_a_slice_replays_up_to_there(journal, end, depth):
    model = ax.replay(built(), journal[:end])
    assert len(model) == depth


def test_the_rest_of_a_journal_replays_on_what_the_first_part_gave(journal):
    model = ax.replay(built(), journal[:1])
    assert len(ax.replay(model, journal[1:])) == 4


def test_journals_are_equal_by_what_they_say(journal):
    assert journal == ax.Journal([*journal]) and journal[:2] == journal[:2]
    assert journal != journal[:2] and journal != [*journal] and journal[:0] == ax.Journal()
