"""Moments at which nothing may grow: ``grow`` raises, ``grower.step`` keeps its decision for the next call."""

import functools
import threading

import pytest
import torch
from growing import Net, assert_same, batch, ema_of, picture, train
from torch import nn

import auxin as ax

torch.set_num_threads(1)


class Run:
    """A network, its optimizer and a grower that wants to grow at every call."""

    def __init__(self, cls=Net, scaler=None):
        torch.manual_seed(0)
        self.model = cls()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.ema = ema_of(self.model)
        self.companions = (self.optimizer, self.ema, *([scaler] if scaler else []))
        self.fired = 0
        self.grower = ax.Grower(
            self.model, *self.companions, edits=ax.Duplicate("blocks", by=1), when=self.once, probe=batch()[0]
        )
        train(self.model, self.optimizer, 2)

    def once(self, reading):
        """A trigger that fires at the first call only: the decision must be kept, not made again."""
        self.fired += 1
        return self.fired == 1

    def backward(self):
        nn.functional.mse_loss(self.model(batch()[0]), batch()[1]).backward()

    def refuses(self, match):
        """All three doors, and nothing changed behind them."""
        before = picture(self.model, *self.companions)
        with pytest.raises(ax.GrowthError, match=match):
            ax.grow(self.model, ax.Duplicate("blocks", by=1), *self.companions, probe=batch()[0])
        with pytest.raises(ax.GrowthError, match=match), ax.surgery(self.model, *self.companions):
            raise AssertionError("never entered")
        assert self.grower.step() is None
        with pytest.raises(ax.GrowthError, match=match):
            self.grower.grow(ax.Duplicate("blocks", by=1))
        assert_same(before, picture(self.model, *self.companions))
        assert len(self.model.blocks) == 2

    def grows(self):
        """At the next good moment, without firing again; once."""
        assert self.grower.step() is not None
        assert len(self.model.blocks) == 3 and len(self.grower.journal) == 1 and not self.grower.done
        assert self.grower.step() is None and len(self.model.blocks) == 3


def test_inside_autocast():
    run = Run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run.refuses(r"not now: inside autocast \(it caches cast weights\); grow outside the autocast block")
    run.grows()


def test_inside_inference_mode():
    run = Run()
    with torch.inference_mode():
        run.refuses(r"not now: inside inference_mode \(new weights could never train\)")
    run.grows()


def test_inside_no_grad_is_no_bad_moment():
    run = Run()
    with torch.no_grad():
        run.grows()
    start = [p.detach().clone() for p in run.model.blocks[2].parameters()]
    train(run.model, run.optimizer, 2)
    assert all(not torch.equal(p, s) for p, s in zip(run.model.blocks[2].parameters(), start, strict=True))


class Curious(Net):
    """Its forward calls something."""

    call = None

    def forward(self, x):
        if self.call is not None:
            call, self.call = self.call, None
            call()
        return super().forward(x)


def test_inside_forward():
    run = Run(Curious)
    run.model.call = lambda: run.refuses(r"not now: inside the forward of Curious; grow between two steps")
    with torch.no_grad():
        run.model(batch()[0])
    assert run.fired == 1
    run.grows()


def test_inside_the_forward_of_a_part():
    run = Run()
    handle = run.model.blocks[1].up.register_forward_hook(lambda *_: run.refuses(r"inside the forward of Linear"))
    with torch.no_grad():
        run.model(batch()[0])
    handle.remove()
    assert run.fired == 1
    run.grows()


def test_inside_backward():
    run, seen = Run(), []

    def hook(grad):
        run.refuses(r"not now: inside a backward pass; grow after optimizer\.step\(\)")
        seen.append(grad)

    handle = run.model.head.weight.register_hook(hook)
    run.backward()
    handle.remove()
    assert len(seen) == 1
    run.optimizer.step()
    run.grows()


@pytest.mark.parametrize("clear", ["None", "zeros", "never"])
def test_gradients_that_no_step_has_used(clear):
    """Also those of a later backward, whose tensors may stand where used ones stood before."""
    run = Run()
    for step in range(3):
        if clear != "never":
            run.optimizer.zero_grad(set_to_none=clear == "None")
        run.backward()
        if step:
            run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=clear == "None") if clear != "never" else None
    run.backward()
    run.refuses(r"not now: \S+ has a gradient")
    run.optimizer.step()
    run.grows()


def test_a_new_gradient_that_stands_where_a_used_one_stood():
    """With one parameter the allocator nearly always gives the same place and number again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    grower = ax.Grower(
        model,
        optimizer,
        edits=ax.Insert("", functools.partial(nn.Linear, 4, 4, bias=False), init="default"),
        when=ax.when.every(1),
        probe=torch.randn(3, 4),
    )
    for _ in range(50):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        assert grower.step() is None and len(model) == 1
        optimizer.zero_grad()
    assert grower.step() is not None


def test_half_of_an_accumulation():
    run = Run()
    run.optimizer.zero_grad()
    run.backward()
    run.optimizer.step()
    run.backward()
    run.refuses(r"has a gradient")
    run.backward()
    assert run.grower.step() is None and len(run.model.blocks) == 2
    run.optimizer.step()
    run.grows()


def test_gradients_of_zeros_and_used_ones_are_fine():
    for prepare in (lambda run: run.optimizer.zero_grad(set_to_none=False), lambda run: None):
        run = Run()
        run.backward()
        run.optimizer.step()
        prepare(run)
        run.grows()


def test_plain_grow_asks_to_clear_the_gradients_it_cannot_know():
    run = Run()
    run.backward()
    run.optimizer.step()
    with pytest.raises(ax.GrowthError, match=r"only a Grower knows .*call optimizer\.zero_grad\(\) first"):
        ax.grow(run.model, ax.Duplicate("blocks", by=1), run.optimizer, run.ema, probe=batch()[0])
    run.optimizer.zero_grad()
    ax.grow(run.model, ax.Duplicate("blocks", by=1), run.optimizer, run.ema, probe=batch()[0])


def test_between_unscale_and_step_and_update():
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    run = Run(scaler=scaler)
    loss = nn.functional.mse_loss(run.model(batch()[0]), batch()[1])
    scaler.scale(loss).backward()
    run.refuses(r"has a gradient")
    scaler.unscale_(run.optimizer)
    words = r"gradients are unscaled and scaler\.update\(\) has not run; grow after scaler\.update\(\)"
    run.refuses(words)
    scaler.step(run.optimizer)
    run.refuses(words)
    scaler.update()
    run.grows()
    assert scaler.get_scale() == 128.0


def test_after_a_step_that_the_scaler_skipped():
    """An overflow: the gradients were not used, and the next step is to come."""
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    run = Run(scaler=scaler)
    loss = nn.functional.mse_loss(run.model(batch()[0]), batch()[1])
    scaler.scale(loss * float("inf")).backward()
    scaler.step(run.optimizer)
    scaler.update()
    assert run.grower.step() is None
    run.optimizer.zero_grad()
    run.grows()


def test_the_forward_of_another_network_is_no_bad_moment():
    run = Run()
    other = Curious()
    other.call = run.grows
    other(batch()[0])


def test_another_thread_inside_forward_is_its_own_business():
    run = Run(Curious)
    found = []

    def look():
        found.append(ax.grow(run.model, ax.Duplicate("blocks", by=1), *run.companions, probe=batch()[0], dry_run=True))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found and len(run.model.blocks) == 2


def test_a_decision_that_is_refused_for_good_is_not_kept():
    run = Run()
    run.grower.probe = torch.randn(4, 3)
    before = picture(run.model, *run.companions)
    with pytest.raises(ax.GrowthError, match="does not run on it"):
        run.grower.step()
    assert_same(before, picture(run.model, *run.companions))
    run.grower.probe = batch()[0]
    assert run.grower.step() is None and run.fired == 2


def test_a_kept_decision_is_saved(tmp_path):
    run = Run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run.grower.step() is None
    ax.save(run.grower, tmp_path)
    other = Run()
    other.fired = 5
    ax.load(tmp_path, other.grower)
    assert other.grower.step() is not None and len(other.model.blocks) == 3
