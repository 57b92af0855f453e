"""A post-norm encoder, of which no zeroing makes the identity, grows through the gate."""

import copy
from pathlib import Path

import bert
import pytest
import torch
from torch import nn

import anew
import auxin as ax
from auxin.gate import gated, open_gate
from auxin.ramp import ramps_on


def gates(model):
    return {path: float(block.auxin_gate) for path, block in gated(model)}


@pytest.mark.parametrize("edit", ["duplicate", "insert"])
def test_difference_zero_then_every_tensor_learns_then_it_is_folded(edit):
    run = bert.Run()
    run.train(3)
    before, averaged = run.outputs(), run.outputs(run.average)
    given = run.edit if edit == "duplicate" else ax.Insert("layers", bert.Layer, index=1, fade=bert.FADE)
    old = {id(p) for p in run.model.parameters()}
    change = run.grower.grow(given)
    new = [(n, p) for n, p in run.model.named_parameters() if id(p) not in old]
    assert change.max_difference == 0.0 and f"fades in over {bert.FADE} optimizer steps" in str(change)
    assert torch.equal(run.outputs(), before) and torch.equal(run.outputs(run.average), averaged)
    born = {n: p.detach().clone() for n, p in new}
    run.train(1)
    assert list(gates(run.model).values()) == [pytest.approx(1 / bert.FADE)]
    run.train(1)
    dead = [n for n, p in new if p.grad is None or not p.grad.any()]
    assert not dead, f"no gradient at the second step: {dead}"
    run.train(bert.FADE - 3)
    opened = copy.deepcopy(run.model)
    for _, block in gated(opened):
        block.auxin_gate.fill_(1.0)
    assert gates(run.model) == gates(run.average.module) and len(gates(run.model)) == 1
    run.train(1)
    assert not gates(run.model) and not gates(run.average.module)
    plain = bert.Bert(depth=3)
    plain.load_state_dict(run.model.state_dict())  # a network written by hand
    assert torch.equal(run.outputs(plain), run.outputs())
    opened.load_state_dict(run.model.state_dict(), strict=False)
    error = float((run.outputs(opened) - run.outputs()).norm() / run.outputs().norm())
    print(f"{edit}: folded, the outputs differ by {error:.1e} (relative); {len(new)} new tensors, all with a gradient")
    assert error <= 1e-6
    assert all(not torch.equal(p, born[n]) for n, p in new)
    run.grower.verify()
    assert not ramps_on(run.optimizer) and not run.grower.state_dict()["ramps"]
    run.train(2)


@pytest.mark.parametrize("rewarm", [0, 9])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_resumed_in_mid_fade_in_another_process_to_the_bit(tmp_path, steps, rewarm):
    run = bert.Run(rewarm=rewarm)
    run.train(2)
    run.grower.grow(run.edit)
    run.train(steps)
    ax.save(run.grower, tmp_path / "run")
    wanted = run.train(10)
    here = Path(__file__).parent
    done = anew.run(here / "bert.py", tmp_path / "run", rewarm, 10, cwd=here)
    assert done.stdout.split() == wanted, done.stderr


def test_loaded_for_inference_in_mid_fade(tmp_path):
    run = bert.Run()
    run.grower.grow(run.edit)
    run.train(3)
    ax.save(run.grower, tmp_path)
    fresh = bert.Bert()
    ax.load(tmp_path, fresh)
    assert torch.equal(run.outputs(fresh), run.outputs()) and gates(fresh) == gates(run.model)


def test_a_state_dict_of_the_grower_alone_goes_on(tmp_path):
    run = bert.Run(rewarm=4)
    run.grower.grow(run.edit)
    run.train(2)
    torch.save(
        [x.state_dict() for x in (run.grower, run.model, run.optimizer, run.schedule, run.average)], tmp_path / "s"
    )
    state = torch.get_rng_state()
    wanted = run.train(8)
    again = bert.Run(rewarm=4)
    parts = (again.grower, again.model, again.optimizer, again.schedule, again.average)
    for part, saved in zip(parts, torch.load(tmp_path / "s", weights_only=True), strict=True):
        part.load_state_dict(saved)
    torch.set_rng_state(state)
    assert again.train(8) == wanted and not gates(again.model)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_averages_gate_is_the_networks(use_buffers):
    run = bert.Run(use_buffers=use_buffers)
    run.grower.grow(run.edit)
    for _ in range(bert.FADE - 1):
        run.train(1)
        assert gates(run.average.module) == gates(run.model) != {}
    run.train(1)
    assert not gates(run.average.module)


def test_undo_at_once_in_a_trial_and_behind_the_fold():
    run = bert.Run(keep=True)
    run.train(2)
    hooks = len(run.optimizer._optimizer_step_post_hooks), len(run.optimizer._optimizer_step_pre_hooks)
    before = run.outputs()
    state = torch.get_rng_state()
    wanted = run.train(1)
    for after in ("at once", "trial", "mid-fade", "folded"):
        run = bert.Run(keep=True)
        run.train(2)
        if after == "trial":
            with run.grower.trial(run.edit):
                run.train(2)
        else:
            run.grower.grow(run.edit)
            run.train({"at once": 0, "mid-fade": 2, "folded": bert.FADE + 1}[after])
            run.grower.undo()
        assert torch.equal(run.outputs(), before) and not gates(run.model) and not gates(run.average.module)
        assert (len(run.optimizer._optimizer_step_post_hooks), len(run.optimizer._optimizer_step_pre_hooks)) == hooks
        assert ramps_on(run.optimizer) is None and torch.equal(torch.get_rng_state(), state)
        assert run.train(1) == wanted


def test_a_trial_in_mid_fade_leaves_the_fade_where_it_was():
    run, other = bert.Run(rewarm=5), bert.Run(rewarm=5)
    for one in (run, other):
        torch.manual_seed(3)
        one.grower.grow(one.edit)
        one.train(2)
        if one is run:
            state = torch.get_rng_state()
            with one.grower.trial(one.edit):
                one.train(bert.FADE)
            assert torch.equal(torch.get_rng_state(), state)
        losses = one.train(bert.FADE)
    del losses
    pairs = zip(run.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_second_growth_while_the_first_fades():
    run = bert.Run()
    run.grower.grow(run.edit)
    run.train(2)
    before = run.outputs()
    run.grower.grow(ax.Duplicate("layers", order=[0, 0, 1, 2, 2], fade=bert.FADE))
    assert torch.equal(run.outputs(), before)
    assert sorted(gates(run.model).values()) == [0.0, 0.0, pytest.approx(2 / bert.FADE)]
    ramps = run.grower.state_dict()["ramps"]
    assert [r["names"] for r in ramps] == [["layers.3"], ["layers.1", "layers.4"]]
    run.train(4)
    assert sorted(gates(run.model)) == ["layers.1", "layers.4"]
    run.train(2)
    assert not gates(run.model) and ramps_on(run.optimizer) is None


def test_a_block_that_fades_in_is_removed():
    run = bert.Run()
    run.grower.grow(run.edit)
    run.train(2)
    run.grower.grow(ax.Remove("layers.2"))
    assert run.grower.state_dict()["ramps"] == [] and not gates(run.model)
    run.train(bert.FADE)
    assert ramps_on(run.optimizer) is None


class Wavy(nn.Module):
    """No residual: sin(W x)."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.sin(self.inner(x))


class InPlace(Wavy):
    """Writes into what it is given."""

    def forward(self, x):
        x.add_(1.0)
        return torch.nn.functional.layer_norm(x + self.inner(x), (4,))


def test_a_block_without_a_residual():
    model, x = nn.Sequential(Wavy(), Wavy()), torch.randn(3, 4)
    before = model(x)
    change = ax.grow(model, ax.Insert("", Wavy, index=1), torch.optim.SGD(model.parameters(), lr=0.1), probe=x)
    assert torch.equal(model(x), before) and change.gates == ("1",)


REFUSED = {  # where the edit is written, or where it is carried out
    "needs an optimizer": (
        lambda: ax.Insert("", Wavy),
        False,
        "fades in over optimizer steps, and no optimizer was given",
    ),
    "fade=0": (lambda: ax.Insert("", Wavy, fade=0), True, "or a fade-in: fade=100"),
    "negative": (lambda: ax.Insert("", Wavy, fade=-1), True, "fade=-1 is a number of optimizer steps"),
    "no number": (lambda: ax.Duplicate("", by=1, fade=2.5), True, "fade=2.5"),
    "in place": (lambda: ax.Insert("", InPlace), True, "cannot keep the function and still learn"),
    "copy, fade=0": (lambda: ax.Duplicate("", by=1, fade=0), True, "it can fade in: fade=100"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_everything(name):
    edit, with_optimizer, wording = REFUSED[name]
    model = nn.Sequential(Wavy(), Wavy())
    optimizer = torch.optim.AdamW(model.parameters())
    before = [(n, id(p)) for n, p in model.named_parameters()]
    with pytest.raises(ax.GrowthError, match=wording):
        ax.grow(model, edit(), *([optimizer] if with_optimizer else []), probe=torch.randn(3, 4))
    assert [(n, id(p)) for n, p in model.named_parameters()] == before
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("schedule", ["OneCycleLR", "WSD"])
def test_a_fade_in_longer_than_the_run(schedule):
    model = nn.Sequential(Wavy(), Wavy())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if schedule == "WSD":
        scheduler = ax.schedule.wsd(optimizer, warmup=2, decay=5, total=50)
    else:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)
    with pytest.raises(ax.GrowthError, match=f"fade=51 is longer than the run: {schedule} ends in 50 steps"):
        ax.grow(model, ax.Insert("", Wavy, fade=51), optimizer, scheduler, probe=torch.randn(3, 4))
    assert len(model) == 2 and not optimizer._optimizer_step_post_hooks
    ax.grow(model, ax.Insert("", Wavy, fade=50), optimizer, scheduler, probe=torch.randn(3, 4))


def test_an_average_built_in_mid_fade_is_named():
    run = bert.Run()
    run.grower.grow(run.edit)
    run.train(1)
    other = torch.optim.swa_utils.AveragedModel(run.model)
    run.train(bert.FADE)
    with pytest.raises(ax.GrowthError, match="layers.2.auxin_gate"):
        ax.verify(run.model, run.optimizer, other)


def test_a_hook_of_the_users_beside_the_gate_stays():
    model = nn.Sequential(Wavy())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    open_gate(model[0])
    model(torch.randn(2, 4))
    from auxin.gate import close_gate

    close_gate(model[0])
    model(torch.randn(2, 4))
    assert seen == [1, 1]


def test_a_hook_behind_ours_ends_nothing():
    """Ours cannot leave a dict that is being walked: it stays as one that does nothing, until the next growth."""
    run = bert.Run()
    run.grower.grow(run.edit)
    seen = []
    run.optimizer.register_step_post_hook(lambda *_: seen.append(1))
    run.train(bert.FADE + 2)
    assert len(seen) == bert.FADE + 2 and not gates(run.model)
    run.grower.grow(run.edit)
    run.train(bert.FADE)
    assert not gates(run.model)
