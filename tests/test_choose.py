import json

import pytest

from auxin import choose
from auxin.arguments import checked_chooser
from auxin.errors import GrowthError

EDITS = ["deeper", "wider", "longer"]


def test_first_is_always_the_first() -> None:
    assert [choose.first(EDITS, None) for _ in range(3)] == ["deeper"] * 3


def test_cycle_goes_round() -> None:
    pick = choose.cycle()
    assert [pick(EDITS, None) for _ in range(5)] == ["deeper", "wider", "longer", "deeper", "wider"]


@pytest.mark.parametrize("pick", [choose.first, choose.cycle()])
def test_nothing_to_choose_from_is_none(pick) -> None:
    assert pick([], None) is None


def test_an_empty_list_takes_no_turn() -> None:
    pick = choose.cycle()
    pick([], None)
    assert pick(EDITS, None) == "deeper"


def test_cycle_survives_a_list_that_changes_its_length() -> None:
    pick = choose.cycle()
    picked = [pick(edits, None) for edits in (EDITS, EDITS, EDITS[:2], EDITS[:1])]
    assert picked == ["deeper", "wider", "deeper", "deeper"]


def test_two_cycles_do_not_share_their_place() -> None:
    one, other = choose.cycle(), choose.cycle()
    one(EDITS, None)
    assert other(EDITS, None) == "deeper"


def test_a_restored_cycle_goes_on_where_it_was() -> None:
    whole, before, after = choose.cycle(), choose.cycle(), choose.cycle()
    expected = [whole(EDITS, None) for _ in range(7)]
    picked = [before(EDITS, None) for _ in range(4)]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert picked + [after(EDITS, None) for _ in range(3)] == expected


@pytest.mark.parametrize("kind", ["cycle", "by_trial", "by_gain", "by_race", "least_change"])
def test_a_chooser_that_was_not_built_is_refused(kind) -> None:
    with pytest.raises(GrowthError, match=rf"choose={kind} is not a chooser yet.*choose\.{kind}\(\)"):
        checked_chooser(getattr(choose, kind))


@pytest.mark.parametrize("kind", ["by_trial", "by_gain", "by_race"])
def test_one_that_trains_or_looks_at_data_is_refused_without_them(kind) -> None:
    built = getattr(choose, kind)()
    with pytest.raises(GrowthError, match=rf"{kind}\(.*evidence=auxin.Evidence\(loss, batches\)"):
        checked_chooser(built)
    checked_chooser(built, evidence=object())
    checked_chooser(choose.by_trial(score=lambda model: 1.0, steps=lambda grower: None))


def test_the_state_of_something_else_is_refused() -> None:
    with pytest.raises(GrowthError, match=r"holds \['best'\], expected \['turn'\]: it is another chooser's"):
        choose.cycle().load_state_dict({"best": 1})
