"""A run of days: refused growths need not end it, what is taken back is told, and a wrong place of the call at once."""

import json
import warnings

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.probation import TakenBack

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


GOOD, BAD = ax.Duplicate("blocks", by=1), ax.Insert("blocks", nn.Identity, index=9)


def built(**words):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    words = {"edits": GOOD, "when": ax.when.every(2), "probe": X[:4]} | words
    return model, optimizer, ax.Grower(model, optimizer, **words)


def backward(model, scale=1.0):
    (scale * model(X).square().mean()).backward()


def train(model, optimizer):
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


# Refused growths


def test_by_default_a_refused_growth_ends_the_run():
    model, optimizer, grower = built(edits=[BAD, GOOD], when=ax.when.at([1]))
    with pytest.raises(ax.GrowthError, match="index is a whole number"):
        grower.step()
    assert grower.refused == []


def test_a_refused_edit_is_set_aside_with_one_warning_and_the_run_goes_on(tmp_path):
    model, optimizer, grower = built(edits=[BAD, GOOD], on_refused="warn", log=tmp_path / "log")
    train(model, optimizer)
    with pytest.warns(UserWarning, match=r"Insert\(at='blocks'.*was refused, and is not chosen any more: .*index is"):
        assert [grower.step(), grower.step()] == [None, None]
    assert [edit for edit, _ in grower.refused] == [BAD] and "whole number" in grower.refused[0][1]
    assert len(model.blocks) == 1 and grower.waiting_for is None and not grower.done
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grower.step() is None and grower.step()
    assert len(model.blocks) == 2
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    told = [line["waiting"] for line in lines if line["kind"] == "decision" and line["waiting"]]
    assert len(told) == 1 and told[0].startswith("refused, and set aside: Insert(at='blocks'")


def test_what_was_set_aside_stays_so_after_a_resume(tmp_path):
    words = {"edits": [BAD, GOOD], "on_refused": "warn"}
    model, optimizer, grower = built(**words)
    with pytest.warns(UserWarning, match="was refused"):
        grower.step(), grower.step()
    ax.save(grower, tmp_path)
    model, optimizer, again = built(**words)
    ax.load(tmp_path, again)
    assert again.refused == grower.refused and again.edits() == [GOOD]
    again.step()
    assert again.step() and len(model.blocks) == 2


def test_a_grower_with_nothing_left_is_done():
    _, _, grower = built(edits=BAD, on_refused="warn", when=ax.when.every(1))
    with pytest.warns(UserWarning, match="was refused"):
        assert grower.step() is None
    assert grower.done and grower.step() is None


def test_edits_of_a_function_are_set_aside_too():
    model, _, grower = built(edits=lambda model: [BAD, GOOD], on_refused="warn", when=ax.when.every(1))
    with pytest.warns(UserWarning, match="was refused"):
        assert grower.step() is None
    assert grower.step() and len(model.blocks) == 2


def test_what_a_user_raises_and_growths_by_hand_are_not_swallowed():
    _, _, grower = built(on_refused="warn", on_growth=lambda change: 1 / 0, when=ax.when.every(1))
    with pytest.raises(ZeroDivisionError):
        grower.step()
    with pytest.raises(ax.GrowthError, match="whole number"):
        grower.grow(BAD)
    assert grower.refused == []


def test_a_bad_moment_and_a_limit_are_no_refusals():
    model, optimizer, grower = built(on_refused="warn", when=ax.when.every(1), limit=ax.Limit(parameters=400))
    train(model, optimizer)
    with pytest.warns(UserWarning, match="inside autocast"), torch.autocast("cpu"):
        assert grower.step() is None
    assert grower.step() and grower.step() is None
    assert grower.refused == [] and grower.done


def test_a_word_that_there_is_not():
    with pytest.raises(ax.GrowthError, match="on_refused='ignore': pass 'raise' or 'warn'"):
        built(on_refused="ignore")


def test_states_of_earlier_versions_load():
    """They held the edits that a probation had rolled back, without a reason."""
    model, _, grower = built()
    state = grower.state_dict()
    state["refused"] = [{"type": "auxin.edits.duplicate:Duplicate", **vars(GOOD)}]
    grower.load_state_dict(state)
    assert grower.refused == [(GOOD, "probation")] and grower.done


# A probation that takes back


def judged(**words):
    probation = ax.Probation(calls=2, window=3)
    model, optimizer, grower = built(when=ax.when.at([4]), probation=probation, **words)
    said = []
    for call in range(1, 9):
        train(model, optimizer)
        said.append(grower.step(10.0 - call + (5.0 if len(model.blocks) > 1 else 0.0)))
    return model, grower, said


def test_step_says_what_a_probation_takes_back():
    model, grower, said = judged()
    assert [type(one).__name__ for one in said] == ["NoneType"] * 3 + [
        "Change",
        "NoneType",
        "TakenBack",
        "NoneType",
        "NoneType",
    ]
    taken = said[5]
    assert isinstance(taken, TakenBack) and not taken and taken.entry == grower.undone[0]
    assert str(taken).startswith(
        "taken back at call 6 (probation: 5 behind the run without it): blocks.1 <- copy of bl"
    )
    assert len(model.blocks) == 1 and grower.refused == [(GOOD, "probation: 5 behind the run without it")]


def test_the_log_says_it_too(tmp_path):
    judged(log=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["why"] for line in lines if line["kind"] == "undone"] == ["probation: 5 behind the run without it"]


def test_the_call_that_takes_back_grows_nothing():
    """What has fired at it is decided at the next call."""
    probation, edits = ax.Probation(calls=2, window=3), [GOOD, ax.After("blocks.0")]
    said = []
    when = lambda reading: len(said) in (3, 5)  # noqa: E731
    model, optimizer, grower = built(edits=edits, when=when, probation=probation)
    for call in range(1, 8):
        train(model, optimizer)
        said.append(grower.step(10.0 - call + (5.0 if len(model.blocks) > 1 else 0.0)))
    assert isinstance(said[5], TakenBack) and said[6] and said[6].edit.at == "blocks.0"


# Moments


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught]


def before_the_step(model, optimizer, grower, calls=30):
    for _ in range(calls):
        optimizer.zero_grad()
        backward(model)
        grower.step()
        optimizer.step()


@pytest.mark.parametrize("fires", [1, 2, 5])
def test_a_call_before_the_optimizer_steps_is_told_at_once_and_once(fires):
    model, optimizer, grower = built(when=ax.when.at([fires]))
    words = warned(lambda: before_the_step(model, optimizer, grower, calls=max(fires, 2)))
    assert (
        len(words) == 1 and "where grower.step is called: not now" in words[0] and "grow right after optim" in words[0]
    )
    assert warned(lambda: before_the_step(model, optimizer, grower)) == [] and len(model.blocks) == 1
    assert "no optimizer step has used" in grower.waiting_for


def test_a_call_inside_autocast_is_told_at_its_first():
    model, optimizer, grower = built(when=ax.when.at([3]))

    def run(calls):
        for _ in range(calls):
            train(model, optimizer)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                grower.step()

    words = warned(lambda: run(3))
    assert len(words) == 1 and "a growth waits where grower.step is called: not now: inside autocast" in words[0]
    assert warned(lambda: run(30)) == []


def test_a_call_between_unscale_and_update_is_told_at_its_first():
    torch.manual_seed(0)
    model, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.Adam(model.parameters())
    grower = ax.Grower(model, optimizer, scaler, edits=GOOD, when=ax.when.at([2]), probe=X[:4])

    def run():
        for _ in range(4):
            scaler.scale(model(X).square().mean()).backward()
            scaler.step(optimizer)
            grower.step()
            scaler.update()
            optimizer.zero_grad()

    words = warned(run)
    assert len(words) == 1 and "scaler.update() has not run; grow after scaler.update()" in words[0]


@pytest.mark.parametrize("fires", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("micro", [2, 4])
def test_accumulation_waits_without_a_word(fires, micro):
    model, optimizer, grower = built(when=ax.when.at([fires]))

    def run():
        for call in range(1, 13):
            backward(model)
            if call % micro == 0:
                optimizer.step()
            grower.step()
            if call % micro == 0:
                optimizer.zero_grad()

    assert warned(run) == [] and len(model.blocks) == 2


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("fires", [3, 4])
def test_a_step_that_a_scaler_skips_waits_without_a_word(fires, to_none):
    torch.manual_seed(0)
    model, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.Adam(model.parameters())
    grower = ax.Grower(model, optimizer, scaler, edits=GOOD, when=ax.when.at([fires]), probe=X[:4])

    def run():
        for call in range(1, 7):
            optimizer.zero_grad(set_to_none=to_none)
            scaler.scale((float("inf") if call in (1, 3, 4) else 1.0) * model(X).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            grower.step()

    assert warned(run) == [] and len(model.blocks) == 2


def test_gradients_set_to_zero_after_the_step_are_no_bad_moment():
    model, optimizer, grower = built(when=ax.when.at([3]))

    def run():
        for _ in range(4):
            backward(model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            grower.step()

    assert warned(run) == [] and len(model.blocks) == 2


def test_an_accumulation_that_is_left_over_at_every_call_is_told():
    """Ten batches, a step every four: whoever calls at the end of such epochs never calls at a good moment."""
    model, optimizer, grower = built(when=ax.when.every(2))

    def epoch():
        for batch in range(1, 11):
            backward(model)
            if batch % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
        grower.step()

    words = warned(lambda: [epoch() for _ in range(3)])
    assert len(words) == 1 and "or after zero_grad()" in words[0]
