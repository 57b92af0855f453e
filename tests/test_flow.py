"""Gradients of new blocks against those of old ones: on the probe, and in the steps after a growth."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.flow import STARVED, STEPS, FlowWatch, ratio, sizes

torch.set_num_threads(1)
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Deaf(Block):
    """One parameter stands in front of a ReLU that is always off, another one is not used."""

    def __init__(self):
        super().__init__()
        self.off, self.spare = nn.Parameter(torch.full((8,), -100.0)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return super().forward(x) + torch.relu(self.off)


class Faint(Block):
    """Its branch is almost switched off."""

    def forward(self, x):
        return x + 1e-6 * (super().forward(x) - x)


class Net(nn.Module):
    def __init__(self, block=Block, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Run:
    """A loop that keeps, before each step, the gradients that it will use."""

    def __init__(self, block=Block, optimizer=torch.optim.AdamW, **options):
        torch.manual_seed(0)
        self.model = Net(block)
        self.opt = optimizer(self.model.parameters(), lr=1e-2)
        words = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.every(10**6), "probe": X[:16], **options}
        self.grower = ax.Grower(self.model, self.opt, **words)
        self.used = []

    def train(self, steps):
        losses = []
        for _ in range(steps):
            self.opt.zero_grad()
            loss = nn.functional.mse_loss(self.model(X), Y)
            loss.backward()
            self.used.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
            self.opt.step()
            losses.append(loss.item())
        return losses


def changed(edit):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return model, ax.grow(model, edit, optimizer, probe=X)


def slow_ratio(grads, new, old):
    """The ratio as one would write it down."""
    sides = [torch.cat([g.flatten() for n, g in grads.items() if n.startswith(f"{unit}.")]) for unit in (new, old)]
    return float(sides[0].square().mean().sqrt() / sides[1].square().mean().sqrt())


# In the change


def test_a_change_holds_a_ratio_for_each_new_block():
    _, change = changed(ax.Duplicate("blocks"))
    assert list(change.gradient_ratios) == ["blocks.1", "blocks.3"]
    assert all(0.1 < value < 10 for value in change.gradient_ratios.values())


def test_the_ratio_is_that_of_the_same_tensors_in_the_copied_block():
    model, change = changed(ax.Duplicate("blocks", order=[0, 1, 1]))
    weights = torch.randn(64, 1, generator=torch.Generator().manual_seed(3))  # the direction that the proof takes
    (model(X) * weights).sum().backward()
    new, old = model.blocks[2].down, model.blocks[1].down
    norms = [torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm() for layer in (new, old)]
    expected = float(norms[0] / norms[1])
    assert change.gradient_ratio == pytest.approx(expected, rel=1e-5)
    assert change.gradient_ratios == {"blocks.2": pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize("init", ["preserve", "kaiming"])
def test_an_inserted_block_is_compared_with_its_siblings(init):
    _, change = changed(ax.Insert("blocks", Block, init=init))
    print(init, change.gradient_ratios)
    assert list(change.gradient_ratios) == ["blocks.2"] and change.gradient_ratio > STARVED


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ({"a": 0.00042}, "gradient 0.0004x its"),
        ({"a": 0.83}, "gradient 0.8x its"),
        ({"a": 1.6, "b": 0.7, "c": 1.1}, "gradient 0.7x to 1.6x its"),
        ({"a": 0.71, "b": 0.72}, "gradient 0.7x its"),
    ],
)
def test_the_line_stays_short(ratios, text):
    _, change = changed(ax.Duplicate("blocks", by=1))
    told = change.with_measured(gradient_ratio=next(iter(ratios.values())), gradient_ratios=ratios)
    assert f"· {text} neighbour's ·" in str(told)


def test_ratios_of_nothing_are_none():
    assert ratio([]) is None and ratio([((1.0, 2), None)]) is None and ratio([((1.0, 2), (0.0, 2))]) is None
    assert ratio([((float("inf"), 2), (1.0, 2))]) is None and ratio([((float("nan"), 2), (1.0, 2))]) is None
    assert ratio([((1.0, 2), (float("nan"), 2))]) is None
    assert ratio([((4.0, 1), (2.0, 2))]) == 2.0


def test_sizes_of_half_sparse_and_complex_gradients():
    index = torch.tensor([[0, 0, 3]])
    sparse = torch.sparse_coo_tensor(index, torch.ones(3, 2), (5, 2), check_invariants=True)  # row 0 twice: 2, 2
    half, double = torch.full((4,), 300.0, dtype=torch.float16), torch.full((4,), 1e-30, dtype=torch.float64)
    found = sizes({"s": sparse, "h": half, "d": double, "c": torch.tensor([3 + 4j]), "none": None})
    assert found["s"][0] == pytest.approx(10) and found["h"] == (pytest.approx(360000), 4)
    assert found["d"][0] == pytest.approx(4e-60) and found["c"] == (pytest.approx(25), 1) and "none" not in found


# After birth


@pytest.mark.parametrize("edit", [ax.Duplicate("blocks", by=1), ax.Duplicate("blocks", by=1, output="keep")], ids=str)
def test_the_readings_are_of_the_gradients_that_the_steps_used(edit):
    run = Run()
    run.train(5)
    run.grower.grow(edit)
    run.used = []
    run.train(STEPS + 5)
    readings = run.grower.flow.readings
    expected = [slow_ratio(grads, "blocks.2", "blocks.1") for grads in run.used[:STEPS]]
    assert [flow.ratios["blocks.2"] for flow in readings] == pytest.approx(expected, rel=1e-5)
    assert [flow.step for flow in readings] == list(range(6, 6 + STEPS)) and {flow.growth for flow in readings} == {0}
    print(f"{edit}: {', '.join(f'{value:.2f}' for value in expected[:12])} ...")


@pytest.mark.parametrize(
    "edit",
    [
        ax.Duplicate("blocks", by=1, output="keep"),
        ax.Duplicate("blocks", by=1, content="fresh", output="keep"),
        ax.Insert("blocks", Block, init="kaiming"),
        ax.Insert("blocks", Block, init="xavier"),
        ax.Insert("blocks", Block, init="default"),
    ],
    ids=str,
)
def test_non_zero_starts_have_more_than_a_thousandth_of_the_gradient_after_ten_steps(edit):
    run = Run()
    run.train(5)
    run.grower.grow(edit)
    run.train(10)
    ratios = [flow.ratios["blocks.2"] for flow in run.grower.flow.readings]
    print(f"{edit}: {ratios[0]:.3f} at step 1, {ratios[9]:.3f} at step 10")
    assert len(ratios) == 10 and ratios[9] > 1e-3


@pytest.mark.parametrize("foreach", [True, False])
def test_nesterov_writes_into_its_gradients_only_after_they_are_read(foreach):
    def sgd(params, lr):
        return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, foreach=foreach)

    run = Run(optimizer=sgd)
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.train(5)
    expected = [slow_ratio(grads, "blocks.2", "blocks.1") for grads in run.used]
    assert [flow.ratios["blocks.2"] for flow in run.grower.flow.readings] == pytest.approx(expected, rel=1e-5)


def test_a_step_with_a_closure_is_read_behind_it():
    run = Run(optimizer=lambda params, lr: torch.optim.LBFGS(params, lr=lr, max_iter=2))
    run.grower.grow(ax.Duplicate("blocks", by=1))
    expected = []

    def closure():
        run.opt.zero_grad()
        loss = nn.functional.mse_loss(run.model(X), Y)
        loss.backward()
        return loss

    for _ in range(3):
        run.opt.step(closure)
        grads = {n: p.grad for n, p in run.model.named_parameters()}
        expected.append(slow_ratio(grads, "blocks.2", "blocks.1"))
    assert [flow.ratios["blocks.2"] for flow in run.grower.flow.readings] == pytest.approx(expected, rel=1e-5)


def test_two_optimizers_that_clear_their_gradients_at_once_make_one_reading():
    torch.manual_seed(0)
    model = Net()
    matrices = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=1e-2)
    vectors = torch.optim.Adam([p for p in model.parameters() if p.dim() < 2], lr=1e-2)
    edits = ax.Duplicate("blocks", by=1)
    grower = ax.Grower(model, matrices, vectors, edits=edits, when=ax.when.every(1), probe=X[:16])
    grower.grow(edits)
    expected = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(STEPS):
            nn.functional.mse_loss(model(X), Y).backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters()}
            expected.append(slow_ratio(grads, "blocks.2", "blocks.1"))
            for optimizer in (matrices, vectors):
                optimizer.step()
                optimizer.zero_grad()
    assert [flow.ratios["blocks.2"] for flow in grower.flow.readings] == pytest.approx(expected, rel=1e-5)
    assert grower.flow.readings[-1].dead == ()


def test_an_optimizer_that_never_steps_does_not_hold_the_watch_up():
    torch.manual_seed(0)
    model = Net()
    matrices = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=1e-2)
    vectors = torch.optim.Adam([p for p in model.parameters() if p.dim() < 2], lr=1e-2)
    grower = ax.Grower(
        model, matrices, vectors, edits=ax.Duplicate("blocks", by=1), when=ax.when.every(1), probe=X[:16]
    )
    grower.grow(ax.Duplicate("blocks", by=1))
    for _ in range(2 * STEPS):
        nn.functional.mse_loss(model(X), Y).backward()
        matrices.step()
        matrices.zero_grad()
    assert len(grower.flow.readings) == STEPS and not grower.flow.watching


def test_a_scaled_loss_does_not_change_the_ratios():
    plain, scaled = Run(), Run()
    for run in (plain, scaled):
        run.train(3)
        run.grower.grow(ax.Duplicate("blocks", by=1))
    plain.train(4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(4):
        scaled.opt.zero_grad()
        scaler.scale(nn.functional.mse_loss(scaled.model(X), Y)).backward()
        scaler.step(scaled.opt)
        scaler.update()
    ratios = [[flow.ratios["blocks.2"] for flow in run.grower.flow.readings] for run in (plain, scaled)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)


# Dead and starved


def test_dead_newborns_are_named_and_one_that_is_dead_beside_too_is_no_fault():
    run = Run(Deaf)
    run.train(3)
    run.grower.grow(ax.Duplicate("blocks", by=1, output="keep"))
    with warnings.catch_warnings():  # dead in the old block as well
        warnings.simplefilter("error")
        run.train(STEPS)
    *early, last = run.grower.flow.readings
    assert all(flow.dead == () for flow in early)
    assert last.dead == ("blocks.2.off", "blocks.2.spare")


def test_a_newborn_that_dies_where_its_neighbour_lives_is_warned_of():
    run = Run()
    run.train(3)
    run.grower.grow(ax.Duplicate("blocks", by=1, output="keep"))
    with torch.no_grad():
        run.model.blocks[2].up.bias.fill_(-1e3)  # every unit of the ReLU behind it is off
    with pytest.warns(
        UserWarning, match=r"growth 0: in the 20 optimizer steps since, blocks\.2\.norm\.weight, .*had no"
    ):
        run.train(STEPS)
    dead = run.grower.flow.readings[-1].dead
    expected = ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight")
    print("dead:", dead)
    assert dead == tuple(f"blocks.2.{name}" for name in expected)  # down.bias does learn


def test_a_block_with_hardly_any_gradient_is_named():
    run = Run()
    run.train(3)
    run.grower.grow(ax.Insert("blocks", Faint, init="default"))
    with pytest.warns(UserWarning, match=r"blocks\.2 had no gradient, or less than a thousandth"):
        run.train(STEPS)
    last = run.grower.flow.readings[-1]
    print(f"starved at {last.ratios['blocks.2']:.1e} of its siblings: {last.dead}")
    assert last.dead == ("blocks.2",) and last.ratios["blocks.2"] < STARVED


def test_a_zeroed_block_is_not_dead():
    run = Run()
    run.train(3)
    run.grower.grow(ax.Duplicate("blocks"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(STEPS)
    assert list(run.grower.flow.readings[-1].ratios) == ["blocks.1", "blocks.3"]
    assert run.grower.flow.readings[-1].dead == ()


# Without a trace


def test_training_is_bit_for_bit_the_same_with_and_without_the_watch():
    watched, plain = Run(), Run()
    torch.manual_seed(1)
    watched.train(3)
    watched.grower.grow(ax.Duplicate("blocks", by=1))
    first = watched.train(STEPS + 3)
    torch.manual_seed(1)
    plain.train(3)
    plain.grower.grow(ax.Duplicate("blocks", by=1))
    plain.grower.flow.forget()
    assert plain.train(STEPS + 3) == first and plain.grower.flow.readings == []
    assert len(watched.grower.flow.readings) == STEPS
    for name, p in plain.model.named_parameters():
        assert torch.equal(p, watched.model.get_parameter(name))


def test_the_watch_ends_and_holds_no_parameter():
    run = Run()
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.train(3)
    held = weakref.ref(run.model.blocks[2].up.weight)
    assert run.grower.flow.watching
    run.grower.grow(ax.Remove("blocks.2"))
    run.train(1)  # until then undo could bring it back
    gc.collect()
    assert held() is None and run.grower.flow.watching
    run.train(STEPS)
    assert not run.grower.flow.watching


def test_a_block_that_is_removed_is_not_dead():
    run = Run()
    run.grower.grow(ax.Duplicate("blocks", by=1))
    seen = []
    run.grower.flow.on_reading = seen.append
    run.train(3)
    run.grower.grow(ax.Remove("blocks.2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(STEPS)
    assert seen[-1].ratios == {"blocks.2": None} and seen[-1].dead == () and len(seen) == STEPS


def test_a_grower_that_is_dropped_leaves_no_hook_and_no_cycle():
    run = Run()
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.train(1)
    kept, opt = weakref.ref(run.grower), run.opt
    gc.disable()
    try:
        run.grower = None
        assert kept() is None
    finally:
        gc.enable()
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


def test_two_growths_within_twenty_steps_are_both_watched():
    run = Run()
    seen = []
    run.grower.flow.on_reading = seen.append
    for _ in range(2):
        run.grower.grow(ax.Duplicate("blocks", order=[*range(len(run.model.blocks)), len(run.model.blocks) - 1]))
        run.train(5)
    run.train(STEPS)
    assert [flow.growth for flow in seen].count(0) == [flow.growth for flow in seen].count(1) == STEPS
    assert {flow.growth for flow in run.grower.flow.readings} == {0, 1}


# Under undo, trial, load, bad moments


def test_undo_returns_to_the_watch_of_the_growth_before():
    run = Run(keep=True)
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.train(7)
    before = list(run.grower.flow.readings)
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.train(4)
    run.grower.undo()
    assert run.grower.flow.readings == before
    seen = []
    run.grower.flow.on_reading = seen.append
    run.train(STEPS)
    assert [flow.step for flow in seen] == list(range(8, STEPS + 1)) and {flow.growth for flow in seen} == {0}
    hooks = run.opt._optimizer_step_pre_hooks
    assert len(hooks) == 1


def test_undo_before_a_step_ends_the_watch():
    run = Run()
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.grower.undo()
    run.train(2)
    assert run.grower.flow.readings == [] and not run.grower.flow.watching


def test_a_trial_is_not_watched_and_does_not_count():
    run = Run()
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.train(4)
    seen, before = [], list(run.grower.flow.readings)
    run.grower.flow.on_reading = seen.append
    with run.grower.trial(ax.Duplicate("blocks", by=1)):
        run.train(STEPS + 5)
        run.grower.grow(ax.Duplicate("blocks", by=1))
        run.train(3)
    assert seen == [] and run.grower.flow.readings == before
    run.used = []
    run.train(1)
    expected = slow_ratio(run.used[0], "blocks.2", "blocks.1")
    assert seen[0].step == 5 and seen[0].ratios["blocks.2"] == pytest.approx(expected, rel=1e-5)


def test_a_load_ends_the_watch_and_a_failed_one_does_not(tmp_path):
    run = Run()
    run.train(2)
    ax.save(run.grower, tmp_path / "run")
    run = Run()
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.train(3)
    before = list(run.grower.flow.readings)
    with pytest.raises(ax.GrowthError):
        run.grower.load_state_dict({**run.grower.state_dict(), "journal": [], "history": 3})
    assert run.grower.flow.readings == before and run.grower.flow.watching
    fresh = Run()
    ax.load(tmp_path / "run", fresh.grower)
    fresh.train(3)
    assert fresh.grower.flow.readings == []


def test_a_growth_that_is_refused_at_the_last_moment_is_not_watched():
    def refuse(change):
        raise ZeroDivisionError

    run = Run(on_growth=refuse)
    with pytest.raises(ZeroDivisionError):
        run.grower.grow(ax.Duplicate("blocks", by=1))
    assert not run.grower.flow.watching and run.grower.flow.readings == []


def test_a_surgery_of_a_grower_is_watched():
    run = Run()
    run.train(1)
    with run.grower.surgery():
        run.model.blocks.append(Block())
    run.train(2)
    assert [list(flow.ratios) for flow in run.grower.flow.readings] == [["blocks.2"], ["blocks.2"]]
    assert all(flow.ratios["blocks.2"] > STARVED for flow in run.grower.flow.readings)


def test_gradients_that_cannot_be_measured_end_the_watch_and_not_the_training(monkeypatch):
    run = Run()
    run.grower.grow(ax.Duplicate("blocks", by=1))

    def unmeasurable(grads):
        raise NotImplementedError("no norm for this class")

    monkeypatch.setattr("auxin.flow.sizes", unmeasurable)
    with pytest.warns(UserWarning, match="gradients of growth 0 cannot be watched: no norm for this class"):
        run.train(1)
    assert not run.grower.flow.watching
    run.train(1)


def test_a_watch_goes_its_own_way_from_a_copied_optimizer():
    run = Run()
    watch = FlowWatch([run.opt, object()])
    assert copy.deepcopy(run.opt)._optimizer_step_pre_hooks == {} and not watch.watching
