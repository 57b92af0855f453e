"""A save at a strange moment, as from a signal handler: refused, with the way round, or exact."""

import random
import re
import signal
from collections import Counter

import pytest
import shuffled
import torch
from torch import nn

import auxin as ax

torch.set_num_threads(1)
ROUND = r".*Save between two steps\. In a signal handler only set a flag, and save after the step"


def begun(steps=5, **words):
    run = shuffled.Run(**words)
    list(run.train(steps))
    return run


def forward(run, save):
    with run.model.blocks[0].up.register_forward_hook(lambda *_: save()):
        run.model(run.x)


def backward(run, save):
    loss = run.model(run.x).sum()
    with run.model.exit.weight.register_hook(lambda _: save()):
        loss.backward()


def optimizer_step(run, save):
    with run.optimizer.register_step_pre_hook(lambda *_: save()):
        run.optimizer.step()


def grow(run, save):
    run.grower._memory = Saving(save)  # what is known of blocks: asked for in the middle
    run.grower.grow(run.grower.edits()[0])


class Saving(dict):
    def __init__(self, save):
        self.save = save

    def get(self, *words):
        self.save()
        return super().get(*words)

    def __contains__(self, key):
        self.save()
        return super().__contains__(key)


def choosing(run, save):
    run.grower._standing.choose = lambda edits, grower: save()
    list(run.train(10))


def trial(run, save):
    with run.grower.trial(run.grower.edits()[0]):
        save()


def branch(run, save):
    with run.grower.trial(None):
        save()


MOMENTS = {
    forward: "inside the forward of Linear" + ROUND,
    backward: "inside a backward pass" + ROUND,
    optimizer_step: "inside the step of AdamW" + ROUND,
    grow: r"inside Grower\.grow|inside auxin\.grow" + ROUND,
    choosing: r"inside Grower\.decide" + ROUND,
    trial: "inside a trial, and what is tried is gone afterwards. Save outside",
    branch: "inside a trial, and what is tried is gone afterwards. Save outside",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_in_the_middle_of_something_nothing_is_saved(tmp_path, moment):
    run, said = begun(), []

    def save():
        with pytest.raises(ax.GrowthError) as error:
            ax.save(run.grower, tmp_path / "run")
        said.append(str(error.value))

    moment(run, save)
    assert said and not (tmp_path / "run").exists()
    assert all(re.search(MOMENTS[moment], text) for text in said), said


def test_in_the_middle_of_a_load_nothing_is_saved(tmp_path):
    run, said = begun(), []
    run.save(tmp_path / "run")
    fresh = shuffled.Run()
    trigger, load = fresh.grower.when, fresh.grower.when.load_state_dict

    def loading(state):
        with pytest.raises(ax.GrowthError, match=r"inside auxin\.load") as error:
            ax.save(fresh.grower, tmp_path / "other")
        said.append(error)
        load(state)

    object.__setattr__(trigger, "load_state_dict", loading)
    fresh.load(tmp_path / "run")
    assert said and not (tmp_path / "other").exists()


# ---- exact


def after(act, run):
    """What ``act`` gives for ``run``; the random generator stays where it is, for the other run."""
    with torch.random.fork_rng():
        return list(act(run))


@pytest.mark.parametrize("probation", [None, ax.Probation(calls=3)])
def test_in_on_growth(tmp_path, probation):
    """A checkpoint after each growth; a growth that is on probation is so after a resume."""
    words = {"on_growth": lambda change: saved.append(run.save(tmp_path)), "probation": probation}
    saved, run = [], shuffled.Run(**words)
    list(run.train(7))
    assert len(saved) == 1
    fresh = shuffled.Run(probation=probation)
    fresh.load(tmp_path)
    assert fresh.grower.progress.on_probation == run.grower.progress.on_probation
    if probation is None:  # else one of the two could go back to its snapshot, the other one could not
        run.grower.on_growth = None
        expected = after(lambda one: one.train(30), run)
        fresh.load(tmp_path)
        assert after(lambda one: one.train(30), fresh) == expected
    else:
        assert run.grower.progress.on_probation is not None


def accumulated(run, count, every=4):
    """Steps that add the gradients of ``every`` batches; the losses."""
    for _ in range(count):
        x = torch.randn(8, 5)
        loss = nn.functional.mse_loss(run.model(x), x.sin().sum(1, keepdim=True)) / every
        loss.backward()
        run.steps += 1
        if run.steps % every == 0:
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.grower.step(loss.item())
        yield loss.item()


@pytest.mark.parametrize("done", range(32, 36))
def test_gradients_that_wait_for_their_step_are_saved(tmp_path, done):
    run = shuffled.Run()
    list(accumulated(run, done))
    ax.save(run.grower, tmp_path, extra=run.steps)
    assert (tmp_path / "checkpoint-000001" / "gradients.safetensors").exists() == bool(done % 4)
    expected = after(lambda one: accumulated(one, 20), run)
    fresh = shuffled.Run()
    for _ in range(2):  # the second time into a run that has gone on: what waits there is not added
        fresh.steps = ax.load(tmp_path, fresh.grower)
        assert len(fresh.model.blocks) == 2
        assert after(lambda one: accumulated(one, 20), fresh) == expected
        fresh.steps = ax.load(tmp_path, fresh.grower)
        list(accumulated(fresh, 1))


def test_gradients_do_not_come_into_a_bare_network(tmp_path):
    run = shuffled.Run()
    list(accumulated(run, 3))
    ax.save(run.grower, tmp_path)
    net = shuffled.Net()
    ax.load(tmp_path, net)
    assert all(p.grad is None for p in net.parameters())


def test_gradients_of_several_processes_are_refused(tmp_path, monkeypatch):
    run = shuffled.Run()
    list(accumulated(run, 3))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ax.GrowthError, match=r"entry.weight has a gradient.*each process has its own.*zero_grad\(\)"):
        ax.save(run.grower, tmp_path)
    run.optimizer.zero_grad()
    ax.save(run.grower, tmp_path)


def test_unscaled_gradients_are_refused(tmp_path):
    run = shuffled.Run(scaler=True)
    run.scaler.scale(run.model(run.x).sum()).backward()
    run.scaler.unscale_(run.optimizer)
    with pytest.raises(ax.GrowthError, match=r"gradients are unscaled.*Save after scaler\.update\(\)"):
        ax.save(run.grower, tmp_path)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    ax.save(run.grower, tmp_path)


def test_a_handler_that_saves_by_itself_disturbs_nothing(tmp_path):
    """At any moment: what it may not save is refused, what it saves can be loaded, and the run goes on alike."""
    whole, run, said, generator = list(shuffled.Run().train(30)), shuffled.Run(), Counter(), random.Random(1)

    def handler(*_):
        try:
            run.save(tmp_path, keep_last=1000)
            said["saved"] += 1
        except ax.GrowthError as error:
            said[re.search("inside (a backward|the forward|the step|Grower|auxin)", str(error))[1]] += 1
        signal.setitimer(signal.ITIMER_REAL, generator.uniform(0.0002, 0.003))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        losses = list(run.train(30))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print(dict(said))
    assert losses == whole and said["saved"] and len(said) >= 3
    for checkpoint in sorted(tmp_path.glob("checkpoint-*"))[::5]:
        fresh = shuffled.Run()
        ax.load(checkpoint, fresh.grower)
        fresh.grower.verify()
