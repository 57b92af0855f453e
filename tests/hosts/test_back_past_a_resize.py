"""Both hosts go back past a resize, and load the best checkpoint from before it."""

from pathlib import Path
from typing import Any

import lightning as L
import lit
import pytest
import torch
import trainers
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import auxin as ax
from auxin.hosts.lightning import load_from_checkpoint

BLOCK = "model.layers.1"


def widen(linear: nn.Linear, axis: int, by: int = 3) -> None:
    """More outputs (axis 0) or inputs (axis 1) of a layer; what is new is small."""
    weight = linear.weight
    shape = list(weight.shape)
    shape[axis] = by
    weight.data = torch.cat([weight.data, 0.01 * torch.randn(shape)], axis)
    if axis == 0 and linear.bias is not None:
        linear.bias.data = torch.cat([linear.bias.data, torch.zeros(by)])
    linear.out_features, linear.in_features = weight.shape


def widen_llama(model: Any) -> None:
    for layer in model.model.layers:
        widen(layer.mlp.gate_proj, 0)
        widen(layer.mlp.up_proj, 0)
        widen(layer.mlp.down_proj, 1)
        layer.mlp.intermediate_size += 3
    model.config.intermediate_size += 3


def widen_lit(model: Any) -> None:
    for block in model.blocks:
        widen(block.up, 0)
        widen(block.down, 1)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in model.state_dict().items()}


def assert_optimizer_fits(grower: ax.Grower) -> None:
    """Each parameter once, with moments of its shape."""
    (optimizer,) = grower.optimizers
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in grower.model.parameters()} and len(held) == len(set(map(id, held)))
    assert optimizer.state and set(map(id, optimizer.state)) <= set(map(id, held))
    for p, state in optimizer.state.items():
        assert all(t.shape == p.shape for t in state.values() if t.dim())


# ---- the Trainer of transformers


class Operating(transformers.TrainerCallback):
    """Does what it is told to a network before the step of a number, as surgery or an edit; notes weights."""

    def __init__(self, growing: Any, plan: dict[int, Any]):
        self.growing, self.plan = growing, plan
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        what = self.plan.get(state.global_step)
        grower = self.growing.grower
        if isinstance(what, ax.Edit):
            grower.grow(what)
        elif what is not None:
            with grower.surgery():
                what(grower.model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = {n: t.clone() for n, t in kwargs["model"].state_dict().items()}


PLANS = {
    "a resize": {4: widen_llama},
    "a resize, an insertion, a removal": {
        4: widen_llama,
        5: ax.Duplicate("model.layers", by=1, fade=4),
        10: ax.Remove(BLOCK),
    },
    "a removal, an insertion, a resize": {
        4: ax.Remove(BLOCK),
        7: ax.Duplicate("model.layers", by=2, output="keep"),
        8: widen_llama,
    },
    "more tokens, two resizes": {
        4: lambda model: model.resize_token_embeddings(23, mean_resizing=False),
        5: widen_llama,
        7: widen_llama,
    },
}


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("name", PLANS)
def test_a_trainer_loads_the_best_checkpoint_from_before(name: str, best: int) -> None:
    model = trainers.llama()
    average = torch.optim.swa_utils.AveragedModel(model)
    growing = trainers.growth(when=ax.when.at([99]), companions=[average])
    operating = Operating(growing, PLANS[name])
    trainer = trainers.trainer_of(model, growing, operating, best=best)
    start = shapes(model)
    trainer.train()
    assert trainer.state.best_model_checkpoint == trainers.checkpoint(trainer, best)
    assert trainer.model is model
    trainers.assert_equal_tensors(model.state_dict(), operating.weights[best * trainers.EVERY])
    assert shapes(average.module) == shapes(model)
    if best == 1:
        assert shapes(model) == start and not growing.grower.journal.entries
        assert model.config.intermediate_size == 32 and model.config.num_hidden_layers == 2
    assert_optimizer_fits(growing.grower)
    growing.grower.verify()
    trainers.assert_same_model(model, type(model).from_pretrained(trainers.checkpoint(trainer, best)))


def test_a_second_training_goes_back_past_the_resize_of_the_first() -> None:
    model = trainers.llama()
    growing = trainers.growth(when=ax.when.at([99]))
    operating = Operating(growing, {4: widen_llama, 14: ax.Duplicate("model.layers", by=1)})
    trainer = trainers.trainer_of(model, growing, operating, best=1, load_best_model_at_end=False)
    trainer.train()
    wide = shapes(model)
    trainer.args.max_steps, trainer.args.load_best_model_at_end = 18, True
    trainer.train(resume_from_checkpoint=trainers.checkpoint(trainer, 4))
    assert trainer.state.best_model_checkpoint == trainers.checkpoint(trainer, 1)
    assert shapes(model) != wide and model.config.intermediate_size == 32
    trainers.assert_equal_tensors(model.state_dict(), operating.weights[3])
    assert_optimizer_fits(growing.grower)


def test_a_resumed_run_goes_on_after_it_went_back_past_a_resize() -> None:
    """In one process: interrupted behind a resize, resumed from before it; the same as a run that never saw it."""
    plain = trainers.trainer_of(trainers.llama(), trainers.growth(when=ax.when.at([99])))
    plain.train()
    growing = trainers.growth(when=ax.when.at([99]))
    operating = Operating(growing, {4: widen_llama})
    trainer = trainers.trainer_of(trainers.llama(), growing, operating)
    trainer.train()
    operating.plan.clear()
    trainer.train(resume_from_checkpoint=trainers.checkpoint(trainer, 1))
    trainers.assert_equal_tensors(trainer.model.state_dict(), plain.model.state_dict())
    assert_optimizer_fits(growing.grower)


# ---- Lightning


class OperatingInLightning(L.Callback):
    """The same before the first batch of an epoch, behind the GrowthCallback."""

    def __init__(self, growing: Any, plan: dict[int, Any]):
        self.growing, self.plan = growing, plan

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        what, grower = self.plan.get(trainer.current_epoch), self.growing.grower
        if batch_idx or what is None:
            return
        pl_module.trainer = None
        if isinstance(what, ax.Edit):
            grower.grow(what)
        else:
            with grower.surgery():
                what(pl_module)
        pl_module.trainer = trainer


LIT_PLANS = {
    "a resize": {2: widen_lit},
    "a resize, an insertion, a removal": {2: widen_lit, 3: ax.Duplicate("blocks", by=1), 4: ax.Remove("blocks.0")},
    "a removal, an insertion, a resize": {2: ax.Remove("blocks.1"), 3: ax.Duplicate("blocks", by=2), 4: widen_lit},
}


@pytest.mark.parametrize("best", [1, 3])
@pytest.mark.parametrize("name", LIT_PLANS)
def test_lightning_loads_the_best_checkpoint_from_before(tmp_path: Path, name: str, best: int) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Says(lit.Lit):
        def on_validation_epoch_end(self) -> None:
            seen[self.current_epoch] = {n: t.clone() for n, t in self.state_dict().items()}
            self.log("score", float(self.current_epoch == best))

    torch.manual_seed(0)
    module, keep = Says(), ModelCheckpoint(tmp_path, monitor="score", mode="max")
    start = shapes(module)
    growing = lit.growing([99])
    made = lit.fit(
        module, tmp_path, growing, OperatingInLightning(growing, LIT_PLANS[name]), keep, num_sanity_val_steps=0
    )
    assert shapes(module) != start
    made.test(module, lit.batches(), ckpt_path="best", verbose=False)
    trainers.assert_equal_tensors(module.state_dict(), seen[best])
    trainers.assert_equal_tensors(load_from_checkpoint(Says, keep.best_model_path).state_dict(), seen[best])
    assert (shapes(module) == start) is (best == 1)
    again = lit.trainer(tmp_path, growing, epochs=best + 2)
    again.fit(module, lit.batches(), lit.batches(), ckpt_path=keep.best_model_path)  # and trains on from there
    assert growing.grower is not None
    assert_optimizer_fits(growing.grower)


@lit.WITH_AVERAGES
def test_an_average_of_lightning_goes_back_past_a_resize(tmp_path: Path) -> None:
    module, growing = lit.built(), lit.growing([99])
    average = L.pytorch.callbacks.EMAWeightAveraging(decay=0.5)
    keep = lit.saving(tmp_path / "run")
    start = shapes(module)
    made = lit.fit(module, tmp_path, average, growing, OperatingInLightning(growing, {2: widen_lit}), keep)
    assert shapes(module) != start
    made.test(module, lit.batches(), ckpt_path=tmp_path / "run" / "epoch=1.ckpt", verbose=False)
    assert shapes(module) == start
