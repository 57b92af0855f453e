"""Growth in a loop under Accelerate: the prepared objects stay, and its own states are saved and loaded."""

import importlib
import os
import sys

import accelerate
import pytest
import torch
from accelerated import Net, Run, X, Y
from safetensors.torch import load_file
from torch import nn

import auxin as ax
from auxin.hosts.accelerate import Grower

EPOCHS = 5
DEPTHS = (2, 2, 3, 3, 3)  # after each of them; the Grower is told before the state is saved


def assert_equal_tensors(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def grown(tmp_path, **options):
    """A run of five epochs: its losses, and the state after each."""
    run = Run(**options)
    losses, states = [], []
    for number in range(EPOCHS):
        losses.append(run.epoch())
        states.append(run.save(tmp_path / str(number)))
    return run, losses, states


def test_the_same_growths_and_losses_as_in_the_plain_loop(tmp_path):
    run, losses, _ = grown(tmp_path)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    edits, when = ax.Duplicate("blocks", by=1), ax.when.at([1, 3])
    grower = ax.Grower(model, optimizer, scheduler, edits=edits, when=when, probe=X[:8])
    plain = []
    for _ in range(EPOCHS):
        for start in range(0, 64, 8):
            loss = nn.functional.mse_loss(model(X[start : start + 8]), Y[start : start + 8])
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            plain.append(loss.item())
        grower.step(plain[-1])
    flat = [loss for epoch in losses for loss in epoch]
    difference = max(abs(a - b) for a, b in zip(flat, plain, strict=True))
    print(f"Accelerate and plain loop: largest difference of {len(flat)} losses {difference:.3g}")
    assert difference <= 1e-6
    assert [(e.edit, e.seed, e.at) for e in run.grower.journal] == [(e.edit, e.seed, e.at) for e in grower.journal]
    assert_equal_tensors(run.model.state_dict(), model.state_dict())


def test_the_prepared_objects_stay(tmp_path):
    run = Run()
    before = [id(one) for one in run.prepared]
    run.epoch()
    assert [id(one) for one in (run.model, run.optimizer, run.scheduler, run.loader)] == before
    parts = run.accelerator
    assert [len(found) for found in (parts._models, parts._optimizers, parts._schedulers)] == [1, 1, 1]
    run.save(tmp_path / "state")
    names = {"auxin.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"}
    assert set(os.listdir(tmp_path / "state")) == names
    start = [p.detach().clone() for p in run.model.blocks[1].parameters()]
    run.epoch()
    assert all(not torch.equal(p, old) for p, old in zip(run.model.blocks[1].parameters(), start, strict=True))


OPTIONS = {
    "float32": {},
    "bf16": {"accelerator": {"mixed_precision": "bf16"}},
    "accumulated gradients": {"accelerator": {"gradient_accumulation_steps": 3}},
    "an own group": {"group": {"lr": 1e-3}},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_saved_state_is_loaded_into_the_original_network(kind, tmp_path):
    options = OPTIONS[kind]
    _, losses, states = grown(tmp_path, **options)
    for number in (0, 1, 3):
        new = Run(**options)
        new.accelerator.load_state(states[number])
        assert len(new.model.blocks) == DEPTHS[number] and new.grower.calls == number + 1
        assert [new.epoch() for _ in range(number + 1, EPOCHS)] == losses[number + 1 :]


@pytest.mark.parametrize("best", [0, 1, 2, 4])
def test_the_best_state_is_loaded_with_its_structure(best, tmp_path):
    run, losses, states = grown(tmp_path)
    saved = Run()
    saved.accelerator.load_state(states[best])
    kept = [id(one) for one in run.prepared]
    run.accelerator.load_state(states[best])
    assert len(run.model.blocks) == DEPTHS[best]
    assert_equal_tensors(run.model.state_dict(), saved.model.state_dict())
    assert_equal_tensors(run.moments(), saved.moments())
    run.grower.verify()
    assert [id(one) for one in (run.model, run.optimizer, run.scheduler, run.loader)] == kept
    assert [run.epoch() for _ in range(best + 1, EPOCHS)] == losses[best + 1 :]  # and it goes on from there, and grows


def test_groups_of_growths_go_and_come_back_with_a_state(tmp_path):
    options = {"group": {"lr": 3e-2}}
    run, losses, states = grown(tmp_path, **options)
    for number in (4, 0, 3, 1):
        run.accelerator.load_state(states[number])
        count = DEPTHS[number]
        assert [len(g["params"]) for g in run.optimizer.param_groups] == [10, *[6] * (count - 1)]
        assert len(run.scheduler.scheduler.lr_lambdas) == count
        assert [run.epoch() for _ in range(number + 1, EPOCHS)] == losses[number + 1 :]


def test_a_state_from_before_every_growth(tmp_path):
    run = Run()
    first = run.save(tmp_path / "first")
    losses = [run.epoch() for _ in range(3)]
    run.accelerator.load_state(first)
    assert len(run.model.blocks) == 1 and not run.grower.journal.entries
    assert [run.epoch() for _ in range(3)] == losses


def test_a_network_of_that_depth_loads_it_without_auxin(tmp_path):
    run, losses, states = grown(tmp_path)
    stock = Run(depth=3, grows=False)
    stock.accelerator.load_state(states[3])
    here = Run()
    here.accelerator.load_state(states[3])
    assert_equal_tensors(stock.moments(), here.moments())
    assert stock.epoch() == losses[4]


def test_an_average_is_registered_as_ever(tmp_path):
    def made():
        run = Run(grows=False)
        average = torch.optim.swa_utils.AveragedModel(run.model)
        run.accelerator.register_for_checkpointing(average)
        options = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.at([1]), "probe": X[:8]}
        run.grower = Grower(run.accelerator, run.model, run.optimizer, run.scheduler, average, **options)
        return run, average

    run, average = made()
    run.epoch()
    average.update_parameters(run.model)
    new, restored = made()
    new.accelerator.load_state(run.save(tmp_path / "state"))
    assert_equal_tensors(restored.state_dict(), average.state_dict())


def test_a_grower_may_be_registered_too(tmp_path):
    def made():
        run = Run()
        run.accelerator.register_for_checkpointing(run.grower)
        return run

    run, new = made(), None
    run.epoch()
    place = run.save(tmp_path / "state")
    after = run.epoch()
    new = made()
    new.accelerator.load_state(place)
    assert new.grower.calls == 1 and len(new.model.blocks) == 2 and new.epoch() == after


def test_two_models_with_a_grower_each(tmp_path):
    def made():
        run = Run()
        torch.manual_seed(1)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = run.accelerator.prepare(model, optimizer)
        options = {"edits": ax.Duplicate("blocks", by=2), "when": ax.when.at([1]), "probe": X[:8]}
        return run, model, Grower(run.accelerator, model, optimizer, **options)

    run, second, grower = made()
    run.grower.step()
    grower.step()
    place = run.save(tmp_path / "state")
    assert {"auxin.json", "1-auxin.json"} <= set(os.listdir(place))
    new, other, _ = made()
    new.accelerator.load_state(place)
    assert (len(new.model.blocks), len(other.blocks)) == (2, 3)
    assert_equal_tensors(other.state_dict(), second.state_dict())


def test_a_decision_waits_for_the_last_of_the_accumulated_gradients():
    run = Run(accelerator={"gradient_accumulation_steps": 4}, when=ax.when.every(1))
    depths = []
    for x, y in run.loader:
        with run.accelerator.accumulate(run.model):
            run.accelerator.backward(nn.functional.mse_loss(run.model(x), y))
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.grower.step()
        depths.append(len(run.model.blocks))
    assert depths == [1, 1, 1, 2, 2, 2, 2, 3]


# ---- bad input


def test_a_second_grower_for_one_model():
    run = Run()
    with pytest.raises(ax.GrowthError, match=r"has a Grower already.*edits=\[first, second\]"):
        Grower(run.accelerator, run.model, run.optimizer, edits=ax.Duplicate("blocks"), when=ax.when.every(1))


def test_the_grower_of_the_plain_loop_says_which_one_to_take():
    run = Run(grows=False)
    with pytest.raises(ax.GrowthError, match=r"auxin.hosts.accelerate.Grower\(accelerator, .* optimizer.optimizer"):
        ax.Grower(run.model, run.optimizer, edits=ax.Duplicate("blocks"), when=ax.when.every(1))
    inner = run.optimizer.optimizer, run.scheduler.scheduler
    ax.grow(run.model, ax.Duplicate("blocks"), *inner, probe=X[:8])
    assert len(run.model.blocks) == 2


def test_an_optimizer_that_was_not_handed_over():
    run = Run(grows=False)
    options = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.every(1), "probe": X[:8]}
    with pytest.raises(ax.GrowthError, match="AdamW was prepared for this model too"):
        Grower(run.accelerator, run.model, **options)
    run = Run(when=ax.when.every(1))
    run.accelerator.prepare(torch.optim.SGD(run.model.parameters(), lr=0.1))
    with pytest.raises(ax.GrowthError, match="SGD was prepared for this model too"):
        run.epoch()
    assert len(run.model.blocks) == 1


def test_a_trial_trains_as_prepared():
    run = Run(accelerator={"mixed_precision": "bf16"})
    run.epoch()
    before, weights = run.model(X), {name: t.clone() for name, t in run.model.state_dict().items()}
    seen = []
    hook = run.model.out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with run.grower.trial(ax.Duplicate("blocks", by=1)):
        assert len(run.model.blocks) == 3
        seen.clear()
        run.accelerator.backward(nn.functional.mse_loss(run.model(X), Y))
        assert seen == [torch.bfloat16]
        run.optimizer.step()
        run.optimizer.zero_grad()
    hook.remove()
    assert_equal_tensors(run.model.state_dict(), weights)
    assert torch.equal(run.model(X), before)


def test_branches_between_which_a_chooser_decides_train_as_prepared():
    seen = []

    def steps(grower):
        run.accelerator.backward(nn.functional.mse_loss(run.model(X), Y))
        seen.append(run.model.out.last)
        run.optimizer.step()
        run.optimizer.zero_grad()

    chooser = ax.choose.by_trial(lambda grower: nn.functional.mse_loss(run.model(X), Y).item(), steps)
    run = Run(accelerator={"mixed_precision": "bf16"}, choose=chooser)
    run.model.out.register_forward_hook(lambda module, args, output: setattr(module, "last", output.dtype))
    run.epoch()
    assert seen and set(seen) == {torch.bfloat16}


def test_what_was_not_prepared():
    run = Run(grows=False)
    options = {"edits": ax.Duplicate("blocks"), "when": ax.when.every(1)}
    with pytest.raises(ax.GrowthError, match=r"pass the model that accelerator.prepare\(...\) returned"):
        Grower(run.accelerator, Net(), run.optimizer, **options)
    with pytest.raises(ax.GrowthError, match="the first is a Net"):
        Grower(run.model, run.optimizer, **options)
    with pytest.raises(ax.GrowthError, match="takes no edit"):
        Grower(run.accelerator, run.model, run.optimizer, edit=3)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_what_cannot_grow_is_refused_with_the_way_round(kind, monkeypatch):
    from accelerate.utils import DistributedType

    run = Run(grows=False)
    monkeypatch.setattr(type(run.accelerator), "distributed_type", DistributedType[kind])
    with pytest.raises(ax.GrowthError, match=rf"uses {kind}.*auxin.grow\(model, edit, probe=batch\)"):
        Grower(run.accelerator, run.model, run.optimizer, edits=ax.Duplicate("blocks"), when=ax.when.every(1))


def test_the_state_of_another_run(tmp_path):
    _, _, states = grown(tmp_path / "deep", depth=2)
    run = Run()
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    with pytest.raises(ax.GrowthError, match="growth 0 of the journal .* does not fit this model"):
        run.accelerator.load_state(states[0])
    assert_equal_tensors(run.model.state_dict(), before)


def test_a_state_without_a_journal(tmp_path):
    plain = Run(grows=False)
    plain.epoch()
    place = plain.save(tmp_path / "plain")
    run = Run()
    run.accelerator.load_state(place)  # nothing has grown here: a run that begins to grow now
    assert_equal_tensors(run.model.state_dict(), plain.model.state_dict())
    run.epoch()
    with pytest.raises(ax.GrowthError, match=r"holds no auxin.json: it was saved without this Grower"):
        run.accelerator.load_state(place)


def test_a_version_that_was_not_tested(monkeypatch):
    monkeypatch.setattr(accelerate, "__version__", "2.0.0")
    monkeypatch.delitem(sys.modules, "auxin.hosts.accelerate")
    with pytest.warns(UserWarning, match="tested with accelerate 1.10 to 1.15, and 2.0.0 is installed"):
        importlib.import_module("auxin.hosts.accelerate")


# ---- compiled by regions


def test_compiled_by_regions_it_grows_is_saved_loaded_and_unwrapped(tmp_path):
    """``prepare`` returns a second tree around the blocks; Accelerate saves the first."""

    def run(grows=True, depth=2):
        plugin = accelerate.utils.TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
        return Run(depth=depth, grows=grows, accelerator={"dynamo_plugin": plugin})

    whole = run()
    before = whole.model(X[:8])
    whole.accelerator.save_state(tmp_path / "before")
    losses = whole.epoch() + whole.epoch()
    assert len(whole.grower.journal) == 1 and len(whole.model.blocks) == 3 and losses
    assert {type(block).__name__ for block in whole.model.blocks} == {"OptimizedModule"}
    plain = whole.accelerator.unwrap_model(whole.model, keep_torch_compile=False)
    assert len(plain.blocks) == 3 and torch.equal(plain(X), whole.model(X))
    whole.accelerator.save_state(tmp_path / "after")
    again = run()
    again.accelerator.load_state(tmp_path / "after")
    assert len(again.model.blocks) == 3 and torch.equal(again.model(X), whole.model(X))
    stock = Net(depth=3)
    stock.load_state_dict(load_file(tmp_path / "after" / "model.safetensors"))
    assert torch.equal(stock(X), whole.model(X))
    whole.accelerator.load_state(tmp_path / "before")
    assert len(whole.model.blocks) == len(plain.blocks) == 2 and torch.equal(whole.model(X[:8]), before)
    whole.grower.verify()


def test_a_growth_outside_of_a_grower_that_never_grew_is_warned_of_when_saving(tmp_path):
    run = Run(depth=2)
    ax.grow(run.model, ax.Duplicate("blocks", by=1), run.optimizer.optimizer, run.scheduler.scheduler, probe=X[:8])
    with pytest.warns(UserWarning, match=r"gets no auxin.json: the network is not what this Grower has grown"):
        run.accelerator.save_state(tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()
