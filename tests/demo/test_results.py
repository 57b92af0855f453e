"""The table and the sentence follow the numbers, whichever way they go."""

import pytest
import torch

from auxin.demo.results import endings, evaluate, printed, sentence, table
from auxin.demo.series import Task
from auxin.demo.training import Job, Outcome

TASK = Task("example", [torch.arange(1.0, 9.0)], torch.full((1, 2), 100.0), ["a"], season=2)


def outcome(depth: int, seed: int, off: float, grows: bool = False) -> Outcome:
    """A run whose forecast is wrong by ``off``; a grown one started at 1 block."""
    return Outcome(Job(1 if grows else depth, seed, grows), depth, 1000 * depth, 1e9, 10, 1.0, [[100 + off] * 2])


def results(grown: float = 4.0, deep: float = 3.0, shallow: float = 6.0):
    runs = [outcome(1, seed, shallow + seed) for seed in range(2)]
    runs += [outcome(4, seed, deep + seed) for seed in range(2)]
    runs += [outcome(3, seed, grown + seed, grows=True) for seed in range(3)]
    return evaluate(TASK, runs, seeds=2, published={"Theta": 13.85})


def test_rows() -> None:
    found = results()
    assert found.best == 4 and found.start == 1 and found.members == 3
    assert len(found.grown.scores) == 2, "the third grown network is in the ensemble only"
    assert found.grown.scores[0] == pytest.approx(200 * 4 / 204, rel=1e-4)
    assert found.gained == pytest.approx((200 * 6 / 206 + 200 * 7 / 207 - 200 * 4 / 204 - 200 * 5 / 205) / 2, rel=1e-4)
    assert found.ensemble.scores == pytest.approx([200 * 5 / 205], rel=1e-4)
    assert found.flops_of_trying == 2e9 and found.ensemble.flops == 3e9
    names = [row.name for row in found.rows]
    assert names[0] == "seasonal naive" and names[-1] == "Theta" and "best of depths 1, 4: all tried" in names


def test_the_sentence_says_what_the_numbers_say() -> None:
    text = sentence(results())
    assert "from 1 block to 3 blocks" in text and "worse than the best fixed depth (4 blocks" in text
    assert "points better than the depth that it started from" in text and "had no need to grow" in text
    assert "Theta 13.85" in text and "at 0.500 of the training FLOPs" in text


def test_the_sentence_where_growing_did_not_pay() -> None:
    text = sentence(results(grown=8.0))
    assert "Growing did not pay here" in text and "worse than the depth that it started from" in text


def test_the_sentence_where_the_grown_one_is_best() -> None:
    text = sentence(results(grown=1.0))
    assert "better than the best fixed depth" in text and "no need to grow" not in text


def test_the_printed_table_is_aligned() -> None:
    lines = printed(table(results())).splitlines()
    assert "against depth 1" in lines[0] and set(lines[1]) == {"-"}
    assert any(line.startswith("grown from depth 1") and line.rstrip().endswith("-1.89") for line in lines), lines


def test_three_lines() -> None:
    assert endings(results()).splitlines() == [
        "started from  6.29  fixed 1 block",
        "grown         4.40  3 blocks",
        "best rival    3.44  fixed 4 blocks, the best of 2 depths",
    ]
