"""Growth in Lightning: the same run as in a plain loop, and everything that Lightning does around it stays true."""

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import lit
import pytest
import torch
from lightning.pytorch import callbacks as lit_callbacks
from lightning.pytorch.plugins import MixedPrecision
from lit import SCHEDULERS, WITH_AVERAGES, Block, Lit, batches, built, fit, growing, saving, trainer
from torch import nn
from torch.utils.data import DataLoader

import auxin as ax
from auxin.errors import GrowthError
from auxin.hosts.lightning import load_from_checkpoint


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moments(optimizer: Any, module: nn.Module) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: state["exp_avg"] for p, state in optimizer.state.items()}


@pytest.fixture
def four_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer epochs, where something happens inside of one."""
    monkeypatch.setattr(lit, "BATCHES", 4)


# ---- the same run as in a plain loop


def plain_loop() -> tuple[list[float], list[str]]:
    """The loop that a person would write: train, evaluate, `grower.step`."""
    model = built(schedule="onecycle")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    make = SCHEDULERS["onecycle"]
    assert make is not None
    scheduler, loader, losses = make(optimizer), batches(), []
    options: dict[str, Any] = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.at([2, 4])}
    grower = ax.Grower(model, optimizer, scheduler, probe=next(iter(loader)), **options)
    for _ in range(6):
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        with torch.no_grad():
            metric = sum(model.loss(batch).item() for batch in loader) / lit.BATCHES
        grower.step(metric)
    return losses, [str(entry.edit) for entry in grower.journal]


def test_same_growth_and_same_losses_as_the_plain_loop(tmp_path: Path) -> None:
    losses, grown = plain_loop()
    module, callback = built(schedule="onecycle"), growing()
    fit(module, tmp_path, callback)
    assert callback.grower is not None
    assert [str(entry.edit) for entry in callback.grower.journal] == grown and len(grown) == 2
    worst = max(abs(a - b) for a, b in zip(module.losses, losses, strict=True))
    print(f"largest difference of {len(losses)} losses: {worst}")
    assert worst <= 1e-6


# ---- resume (scenario 10)


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, schedule: str) -> None:
    module, callback = built(schedule=schedule), growing()
    whole = fit(module, tmp_path, callback, saving(tmp_path / "run"))
    for epoch in (1, 2, 3):  # the decision waits, grown once, the decision waits again
        again = built(schedule=schedule)
        resumed = fit(again, tmp_path, growing(), ckpt_path=tmp_path / "run" / f"epoch={epoch}.ckpt")
        assert len(again.blocks) == 4
        assert again.losses == module.losses[(epoch + 1) * lit.BATCHES :]
        assert same(values(again), values(module))
        assert same(moments(resumed.optimizers[0], again), moments(whole.optimizers[0], module))


def test_without_auxin_a_grown_checkpoint_does_not_resume(tmp_path: Path) -> None:
    fit(built(), tmp_path, growing(), saving(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="Error\\(s\\) in loading state_dict"):
        fit(built(), tmp_path, ckpt_path=tmp_path / "run" / "epoch=5.ckpt")


class Grouped(Lit):
    """Biases and gains are not decayed, the head comes first: no order that is the module's."""

    def configure_optimizers(self) -> Any:
        head = list(self.out.parameters())
        rest = [p for p in self.parameters() if all(p is not own for own in head)]
        flat = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-3}, flat, {"params": [p for p in rest if p.ndim > 1]}])
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 0.9**e)}


@pytest.mark.parametrize("group", [None, {"lr": 1e-3}])
def test_groups_and_what_is_frozen_come_back(tmp_path: Path, group: Any) -> None:
    def make() -> Grouped:
        torch.manual_seed(0)
        return Grouped()

    class Thaw(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.inp.requires_grad_(False)

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.inp.requires_grad_(True)

    module = make()
    whole = fit(module, tmp_path, Thaw(), growing(group=group), saving(tmp_path / "run"))
    again = make()
    resumed = fit(again, tmp_path, Thaw(), growing(group=group), ckpt_path=tmp_path / "run" / "epoch=3.ckpt")
    assert again.losses == module.losses[4 * lit.BATCHES :] and same(values(again), values(module))
    assert len(resumed.optimizers[0].param_groups) == (3 if group is None else 7)
    for ours, theirs in zip(resumed.optimizers[0].param_groups, whole.optimizers[0].param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    assert all(p.requires_grad for p in again.parameters())


class Layered(Lit):
    """Each block has a group and a rate of its own: of a grown network there are more."""

    alike = True

    def configure_optimizers(self) -> Any:
        blocks = [{"params": list(block.parameters()), "lr": 10.0 ** -(2 + i)} for i, block in enumerate(self.blocks)]
        optimizer = torch.optim.AdamW([{"params": [*self.inp.parameters(), *self.out.parameters()]}, *blocks], lr=1e-2)
        functions = [lambda epoch: 0.9**epoch for _ in optimizer.param_groups]
        one: Any = functions[0] if self.alike else functions
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, one)]


def test_groups_of_blocks_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Layered:
        torch.manual_seed(0)
        return Layered()

    module, again = make(), make()
    whole = fit(module, tmp_path, growing(), saving(tmp_path / "run"))
    resumed = fit(again, tmp_path, growing(), ckpt_path=tmp_path / "run" / "epoch=3.ckpt")
    rates = [[group["lr"] for group in made.optimizers[0].param_groups] for made in (whole, resumed)]
    assert rates[0] == rates[1] and len(rates[0]) == 3 and same(values(again), values(module))
    monkeypatch.setattr(Layered, "alike", False)
    with pytest.raises(GrowthError, match="it had 3 groups, here are 4, each with a function of its own"):
        fit(make(), tmp_path, growing(), ckpt_path=tmp_path / "run" / "epoch=3.ckpt")


class Thawing(lit_callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.blocks)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.blocks, optimizer, lr=1e-3)


class Backbone(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.inp.parameters(), *self.out.parameters()], lr=1e-2)


@pytest.mark.parametrize("auxin", [False, True])
def test_finetuning_freezes_again_what_it_had_thawed_without_auxin(tmp_path: Path, auxin: bool) -> None:
    def run(epochs: int, *more: Any, **options: Any) -> Lit:
        torch.manual_seed(0)
        module = Backbone()
        fit(module, tmp_path, *([growing([3])] if auxin else []), Thawing(), *more, epochs=epochs, **options)
        return module

    module = run(6, saving(tmp_path / "run"))
    again = run(6, ckpt_path=tmp_path / "run" / "epoch=4.ckpt")
    thawed = [p.requires_grad for p in again.blocks.parameters()]
    assert all(p.requires_grad for p in module.parameters())
    assert all(thawed) if auxin else not any(thawed)
    assert same(values(again), values(module)) is auxin


# ---- best checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, torch.Tensor]], Lit, Any]:
    """A run that grew after epochs 1 and 3: where it was saved, and the values of then by epoch."""
    path, seen = tmp_path_factory.mktemp("run"), {}

    class Look(L.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen[trainer.current_epoch] = values(pl_module)

    module, callback = built(), growing()
    made = fit(module, path, Look(), callback, saving(path / "full"), num_sanity_val_steps=0)
    return path, seen, module, (made, callback)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("how", ["test", "validate", "predict"])
def test_any_checkpoint_gives_exactly_the_model_of_then(run: Any, epoch: int, how: str) -> None:
    path, seen, module, (made, _) = run
    checkpoint = path / "full" / f"epoch={epoch}.ckpt"
    getattr(made, how)(module, batches(), ckpt_path=checkpoint, **({} if how == "predict" else {"verbose": False}))
    assert len(module.blocks) == (2 if epoch < 2 else 3 if epoch < 4 else 4)
    assert same(values(module), seen[epoch])
    fresh = built()
    getattr(trainer(path, growing()), how)(fresh, batches(), ckpt_path=checkpoint)
    assert same(values(fresh), seen[epoch])
    loaded = load_from_checkpoint(Lit, checkpoint)
    assert type(loaded) is Lit and loaded.hparams["depth"] == 2 and same(values(loaded), seen[epoch])


@pytest.mark.parametrize("best", [1, 2, 5])
def test_best_is_the_model_that_was_best(tmp_path: Path, best: int) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Says(Lit):
        def on_validation_epoch_end(self) -> None:
            seen[self.current_epoch] = values(self)
            self.log("score", float(self.current_epoch == best))

    module, keep = Says(), lit_callbacks.ModelCheckpoint(tmp_path, monitor="score", mode="max", save_weights_only=True)
    made = fit(module, tmp_path, growing(), keep, num_sanity_val_steps=0)
    made.test(module, batches(), ckpt_path="best", verbose=False)
    assert same(values(module), seen[best])
    assert same(values(load_from_checkpoint(Says, keep.best_model_path)), seen[best])


def test_without_auxin_the_best_model_of_before_cannot_be_loaded(tmp_path: Path) -> None:
    class Append(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                pl_module.blocks.append(copy.deepcopy(pl_module.blocks[-1]))

    module = built()
    made = fit(module, tmp_path, Append(), saving(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="Missing key"):
        made.test(module, batches(), ckpt_path=tmp_path / "run" / "epoch=1.ckpt", verbose=False)


def test_training_goes_on_from_an_older_checkpoint_in_the_same_process(run: Any, tmp_path: Path) -> None:
    path, _, module, (_, callback) = run
    straight = built()
    fit(straight, tmp_path, growing())
    fit(module, tmp_path, callback, ckpt_path=path / "full" / "epoch=1.ckpt")
    assert len(module.blocks) == 4 and same(values(module), values(straight))


def test_a_second_fit_goes_on_and_a_new_module_begins_anew(tmp_path: Path) -> None:
    module, callback = built(), growing([2, 4])
    fit(module, tmp_path, callback, epochs=4)
    assert len(module.blocks) == 3
    fit(module, tmp_path, callback, epochs=3)  # evaluation 4 was the last one of the first fit
    assert len(module.blocks) == 4 and callback.grower is not None and len(callback.grower.journal) == 2
    other = built()
    other.inp = nn.Linear(6, 8)  # batches of another shape
    generator = torch.utils.data.DataLoader([(torch.randn(8, 6), torch.randn(8, 1))] * 4, batch_size=None)
    trainer(tmp_path, callback, epochs=4).fit(other, generator, generator)
    assert len(other.blocks) == 3  # the trigger has begun anew as well


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_blocks_may_be_built_when_training_begins(tmp_path: Path, hook: str) -> None:
    class Later(Lit):
        def __init__(self) -> None:
            super().__init__(depth=0)

        def build(self) -> None:
            if not self.blocks:
                torch.manual_seed(0)
                self.blocks.extend(Block(8) for _ in range(2))

        def setup(self, stage: str) -> None:
            if hook == "setup":
                self.build()

        def configure_model(self) -> None:
            if hook == "configure_model":
                self.build()

    def make() -> Later:
        torch.manual_seed(0)
        return Later()

    module = make()
    made = fit(module, tmp_path, growing(), saving(tmp_path / "run"))
    again = make()
    fit(again, tmp_path, growing(), ckpt_path=tmp_path / "run" / "epoch=2.ckpt")
    assert same(values(again), values(module))
    if hook == "configure_model":  # Lightning runs no setup() where it loads for inference
        assert len(load_from_checkpoint(Later, tmp_path / "run" / "epoch=5.ckpt").blocks) == 4
    made.test(module, batches(), ckpt_path=tmp_path / "run" / "epoch=1.ckpt", verbose=False)
    assert len(module.blocks) == 2


@pytest.mark.usefixtures("four_batches")
def test_a_checkpoint_is_plain_data_and_may_come_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    often = lit_callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(built(), tmp_path, growing(), often)
    for step, depth in ((6, 2), (9, 3), (18, 4)):
        checkpoint = tmp_path / f"step={step}.ckpt"
        loaded = load_from_checkpoint(Lit, checkpoint, weights_only=True)
        assert len(loaded.blocks) == depth
        again = built()
        fit(again, tmp_path, growing(), ckpt_path=checkpoint)
        assert len(again.blocks) == 4


def test_layers_behind_modules_come_and_go_with_a_checkpoint(tmp_path: Path) -> None:
    edits = [ax.After("blocks.0.up"), ax.After("inp")]

    def behind() -> Any:
        return growing([1, 3], edits=edits, choose=ax.choose.cycle())

    module = built()
    made = fit(module, tmp_path, behind(), saving(tmp_path / "run"))
    grown = {name.split("._grown")[0] for name in values(module) if "._grown" in name}
    assert grown == {"inp", "blocks.0.up"}
    again = built()
    fit(again, tmp_path, behind(), ckpt_path=tmp_path / "run" / "epoch=1.ckpt")
    assert same(values(again), values(module))
    made.test(module, batches(), ckpt_path=tmp_path / "run" / "epoch=0.ckpt", verbose=False)
    assert not any("_grown" in name for name in values(module)) and not module.inp._forward_hooks


# ---- what silently goes wrong without it


class Append(L.Callback):
    """What people write: the layer goes into the module, and nobody else hears of it."""

    def __init__(self, group: bool = False):
        self.group = group

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 2 and batch_idx == 0:
            block = copy.deepcopy(pl_module.blocks[-1])
            nn.init.zeros_(block.down.weight)
            nn.init.zeros_(block.down.bias)
            self.born = values(block)
            pl_module.blocks.append(block)
            if self.group:
                trainer.optimizers[0].add_param_group({"params": list(block.parameters())})


def test_an_appended_layer_never_trains_without_auxin(tmp_path: Path) -> None:
    without, append = built(), Append()
    fit(without, tmp_path, append)
    assert same(values(without.blocks[2]), append.born)
    module = built()
    fit(module, tmp_path, growing([2]))
    assert all((p != 0).any() for p in module.blocks[2].down.parameters())


@pytest.mark.parametrize(
    ("schedule", "error", "words"),
    [("onecycle", KeyError, "initial_lr|max_lr"), ("lambda", ValueError, "zip\\(\\) argument 2 is shorter")],
)
@pytest.mark.usefixtures("four_batches")
def test_a_new_group_breaks_the_schedule_without_auxin(tmp_path: Path, schedule: str, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        fit(built(schedule=schedule), tmp_path, Append(group=True))

    class Rates(L.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = [Rates(), Rates()]
    fit(built(schedule=schedule), tmp_path, rates[0])
    fit(built(schedule=schedule), tmp_path, rates[1], growing())
    assert rates[0].seen == rates[1].seen and len(rates[0].seen) == 24


@WITH_AVERAGES
def test_an_average_lacks_the_new_layer_without_auxin(tmp_path: Path) -> None:
    average: Any = lit_callbacks.WeightAveraging()
    module = built(depth=1)
    fit(module, tmp_path, average, Append())
    held = [len(list(network.blocks.parameters())) for network in (average._average_model.module, module)]
    assert held == [6, 12]
    average, module = lit_callbacks.WeightAveraging(), built(depth=1)
    fit(module, tmp_path, average, growing([2]))
    assert len(average._average_model.module.blocks) == len(module.blocks) == 2


def test_finetuning_takes_equal_values_for_one_tensor_and_auxin_says_so(tmp_path: Path) -> None:
    class Zero(Backbone):
        """Both blocks end with the same zero bias: the second is judged to be in the optimizer already."""

        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.out.bias)
            self.inp.requires_grad_(False)
            self.out.weight.requires_grad_(False)
            self.blocks[0].extra = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.blocks[0].extra

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.out.bias], lr=0.0)

    with pytest.warns(UserWarning, match="already exist"):
        made = fit(Zero(), tmp_path, Thawing(), epochs=2)
    held = {id(p) for group in made.optimizers[0].param_groups for p in group["params"]}
    assert id(made.lightning_module.blocks[0].extra) not in held  # it never trains
    with pytest.raises(GrowthError, match="in no optimizer"), pytest.warns(UserWarning, match="already exist"):
        fit(Zero(), tmp_path, Thawing(), growing([2]))


def test_what_other_code_loses_after_a_growth_is_named_at_the_next_epoch(tmp_path: Path) -> None:
    class Lose(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                group = trainer.optimizers[0].param_groups[0]
                group["params"] = [p for p in group["params"] if p is not pl_module.blocks[2].up.weight]

    module = built()
    with pytest.raises(GrowthError, match="blocks.2.up.weight .* is in no optimizer"):
        fit(module, tmp_path, growing([1]), Lose())
    assert len(module.losses) == 3 * lit.BATCHES


# ---- what else hangs on a Trainer


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1.0, 0.25])
@pytest.mark.usefixtures("four_batches")
def test_a_growth_waits_for_the_end_of_an_accumulation(tmp_path: Path, accumulate: int, every: float) -> None:
    moments: list[tuple[int, int]] = []

    def note(change: Any) -> None:
        loop = made.fit_loop.epoch_loop
        moments.append((loop.batch_idx, made.global_step))

    module = built()
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "val_check_interval": every}
    made = trainer(tmp_path, growing([1], on_growth=note), epochs=2, **options)
    made.fit(module, batches(), batches())
    assert len(module.blocks) == 3 and len(moments) == 1
    (batch, steps), at_end = moments[0], every == 1.0
    assert steps == (-(-lit.BATCHES // accumulate) if at_end else 1)
    assert at_end or batch == accumulate


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_precision(tmp_path: Path, precision: str) -> None:
    module, callback = built(), growing()
    plugin = (
        MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
        if precision == "16-mixed"
        else None
    )
    how: dict[str, Any] = {"precision": precision} if plugin is None else {"plugins": plugin}
    made = fit(module, tmp_path, callback, saving(tmp_path / "run"), **how)
    assert len(module.blocks) == 4 and len({p.dtype for p in module.parameters()}) == 1
    assert callback.grower is not None
    if plugin is not None:
        assert any(c is plugin.scaler for c in callback.grower.companions) and plugin.scaler is not None
        assert plugin.scaler.state_dict()["_growth_tracker"] == made.global_step
        plugin = scaled()
    again = built()
    how = {"precision": precision} if plugin is None else {"plugins": plugin}
    fit(again, tmp_path, growing(), ckpt_path=tmp_path / "run" / "epoch=2.ckpt", **how)
    if precision == "64-true":  # Lightning loads a checkpoint before it makes the module double
        torch.testing.assert_close(values(again), values(module), rtol=1e-4, atol=1e-4)
    else:
        assert same(values(again), values(module))


@pytest.mark.parametrize(("reset", "epochs"), [(False, 5), (True, 6)])
def test_early_stopping_may_count_anew_at_a_growth(tmp_path: Path, reset: bool, epochs: int) -> None:
    class Flat(Lit):
        def on_validation_epoch_end(self) -> None:
            self.log("score", 1.0)

    stop = lit_callbacks.EarlyStopping("score", patience=4)
    made = fit(Flat(), tmp_path, stop, growing([2], reset_patience=reset), epochs=20)
    assert made.current_epoch == epochs


@pytest.mark.parametrize("group", [None, {"lr": 1e-3}])
def test_the_learning_rate_monitor_goes_on(tmp_path: Path, group: Any) -> None:
    from lightning.pytorch.loggers import CSVLogger

    monitor = lit_callbacks.LearningRateMonitor("step")
    logger = CSVLogger(tmp_path, name="log")
    fit(built(schedule="cosine"), tmp_path, monitor, growing(group=group), logger=logger, log_every_n_steps=1)
    assert monitor.lrs and all(
        len(rates) > 10 for name, rates in monitor.lrs.items() if "pg" not in name or "pg1" in name
    )


class Rule(L.Callback):
    """The rule of an exponential average, by hand, for whatever is there at each step."""

    def __init__(self, average: Any, decay: float):
        self.average, self.decay = average, decay
        self.by_id: dict[int, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        copies = dict(self.average._average_model.module.named_parameters())
        for name, p in pl_module.named_parameters():  # what is new starts with what the average starts it with
            self.by_id.setdefault(id(p), copies[name].detach().clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for p in pl_module.parameters():
            old = self.by_id[id(p)]
            self.by_id[id(p)] = (
                p.detach().clone() if trainer.global_step == 1 else torch.lerp(p.detach(), old, self.decay)
            )


@WITH_AVERAGES
def test_an_exponential_average_keeps_its_layers(tmp_path: Path) -> None:
    average: Any = lit_callbacks.EMAWeightAveraging(decay=0.9)
    module, rule = built(), Rule(average, 0.9)
    edit = ax.Duplicate("blocks", by=1, order=[0, 0, 1])
    seen: dict[str, torch.Tensor] = {}

    class Before(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            copies = dict(average._average_model.module.named_parameters())
            for name, p in pl_module.named_parameters():
                torch.testing.assert_close(copies[name].detach(), rule.by_id[id(p)])
                seen[name] = p.detach().clone()

    fit(module, tmp_path, average, growing([2], edits=edit), rule, Before(), saving(tmp_path / "run"))
    assert len(module.blocks) == 3 and "blocks.2.up.weight" in seen
    again, twin = built(), lit_callbacks.EMAWeightAveraging(decay=0.9)
    fit(again, tmp_path, twin, growing([2], edits=edit), ckpt_path=tmp_path / "run" / "epoch=2.ckpt")
    assert same(values(again), values(module))


@pytest.mark.parametrize("name", [pytest.param("ema", marks=WITH_AVERAGES), "swa"])
def test_any_checkpoint_with_averages_gives_the_average_of_then(tmp_path: Path, name: str) -> None:
    def average() -> Any:
        if name == "ema":
            return lit_callbacks.EMAWeightAveraging(decay=0.9)
        return lit_callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=2)

    module, own = built(schedule="cosine"), average()
    made = fit(module, tmp_path, own, growing(), saving(tmp_path / "run"))
    assert len(module.blocks) == 4
    for epoch in (1, 2, 5):
        checkpoint = tmp_path / "run" / f"epoch={epoch}.ckpt"
        whole = torch.load(checkpoint, weights_only=False)
        stored = whole["state_dict"]  # where there is an average, that
        made.test(module, batches(), ckpt_path=checkpoint, verbose=False)
        assert same(values(module), whole.get("current_model_state", stored))  # Lightning, in the process of the run
        fresh = built(schedule="cosine")
        trainer(tmp_path, average(), growing()).test(fresh, batches(), ckpt_path=checkpoint, verbose=False)
        assert same(values(fresh), stored)
        assert same(values(load_from_checkpoint(Lit, checkpoint)), stored)
    again = built(schedule="cosine")
    fit(again, tmp_path, average(), growing(), ckpt_path=tmp_path / "run" / "epoch=2.ckpt")
    full = built(schedule="cosine")
    fit(full, tmp_path, average(), growing())
    assert same(values(again), values(full))


def test_an_own_group_under_the_schedule_of_an_average(tmp_path: Path) -> None:
    average = lit_callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=2)
    module = built(schedule="cosine")
    callback = growing([3], group={"lr": 5e-4})
    made = fit(module, tmp_path, average, callback, epochs=8)
    assert callback.grower is not None
    assert [type(c).__name__ for c in callback.grower.companions] == ["AdamW", "SWALR", "Lit"]
    first, own = (group["lr"] for group in made.optimizers[0].param_groups)
    assert own == pytest.approx(0.5 * first) and len(module.blocks) == 3


@pytest.mark.parametrize("toggle", [True, False])
@pytest.mark.usefixtures("four_batches")
def test_two_networks_against_each_other(tmp_path: Path, toggle: bool) -> None:
    class Rivals(L.LightningModule):
        """One makes samples, the other judges them: the loss of the first leaves gradients on the second."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.maker, self.judge = built(), nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.judge(self.maker(x))

        def training_step(self, batch: Any, index: int) -> None:
            optimizers: Any = self.optimizers()
            for optimizer, sign in zip(optimizers, (1.0, -2.0), strict=True):
                if toggle:
                    self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(sign * self(batch[0]).mean())
                optimizer.step()
                if toggle:
                    self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.judge, self.maker)]

    module, callback = Rivals(), growing([1], edits=ax.Duplicate("maker.blocks", by=1), monitor=None)
    made = trainer(tmp_path, callback, epochs=8)
    if toggle:
        made.fit(module, batches())
    else:
        with pytest.warns(
            UserWarning, match="has been waiting for 21 batches: .*judge.* has a gradient that no optimizer"
        ):
            made.fit(module, batches())
    assert len(module.maker.blocks) == (3 if toggle else 2)


@pytest.mark.parametrize("keywords", [True, False])
def test_batches_that_are_dicts(tmp_path: Path, keywords: bool) -> None:
    class Whole(Lit):
        def forward(self, batch: Any) -> torch.Tensor:
            return super().forward(batch["x"])

        def loss(self, batch: Any) -> torch.Tensor:
            return nn.functional.mse_loss(self(**batch) if keywords else self(batch), batch["y"])

    class Named(Whole):
        def forward(self, x: torch.Tensor, y: Any = None) -> torch.Tensor:
            return Lit.forward(self, x)

    module = (Named if keywords else Whole)()
    data: Any = torch.utils.data.DataLoader([{"x": x, "y": y} for x, y in batches()], batch_size=None)
    trainer(tmp_path, growing()).fit(module, data, data)
    assert len(module.blocks) == 4


def test_only_evaluations_of_the_training_count(tmp_path: Path) -> None:
    module, callback = built(), growing([9])
    made = fit(module, tmp_path, callback, epochs=3, num_sanity_val_steps=2)
    for _ in range(2):
        made.validate(module, batches(), verbose=False)
    state = callback.state()
    assert state is not None and state["grower"]["calls"] == 2 and len(state["unread"]) == 1


def test_several_optimizers_stepped_by_hand(tmp_path: Path) -> None:
    class Two(Lit):
        automatic_optimization: Any = False

        def configure_optimizers(self) -> Any:
            flat = [p for p in self.parameters() if p.ndim < 2]
            steep = [p for p in self.parameters() if p.ndim > 1]
            return torch.optim.Muon(steep, lr=1e-2), torch.optim.AdamW(flat, lr=1e-2)

        def training_step(self, batch: Any, index: int) -> Any:
            optimizers: Any = self.optimizers()
            loss = self.loss(batch)
            self.losses.append(loss.item())
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

    Two.automatic_optimization = property(lambda self: False, lambda self, value: None)
    torch.manual_seed(0)
    module, callback = Two(), growing()
    fit(module, tmp_path, callback, saving(tmp_path / "run"))
    assert len(module.blocks) == 4 and callback.grower is not None
    muon, adam = callback.grower.optimizers
    assert all(p.ndim == 2 for p in muon.param_groups[0]["params"])
    assert len(adam.param_groups[0]["params"]) == sum(p.ndim < 2 for p in module.parameters())
    torch.manual_seed(0)
    again = Two()
    fit(again, tmp_path, growing(), ckpt_path=tmp_path / "run" / "epoch=2.ckpt")
    assert same(values(again), values(module))


@pytest.mark.usefixtures("four_batches")
def test_epochs_count_where_nothing_is_validated(tmp_path: Path) -> None:
    module, callback = built(), growing(monitor="loss", when=ax.when.at([2]))
    trainer(tmp_path, callback, epochs=4).fit(module, batches())
    assert len(module.blocks) == 3 and callback.grower is not None
    assert callback.grower.journal.entries[0].metrics["metric"] == pytest.approx(sum(module.losses[4:8]) / 4, rel=1e-5)


class Post(nn.Module):
    """No zeroing makes it the identity, so a copy fades in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.relu(self.inner(x)))


@WITH_AVERAGES
def test_a_block_that_is_fading_in_goes_on_fading(tmp_path: Path) -> None:
    class Fading(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Post(), Post()])

    def make() -> Fading:
        torch.manual_seed(0)
        return Fading()

    edit = ax.Duplicate("blocks", by=1, fade=12)
    module, average = make(), lit_callbacks.EMAWeightAveraging(decay=0.9)
    made = fit(module, tmp_path, average, growing([2], edits=edit), saving(tmp_path / "run"), epochs=7)
    again = make()
    checkpoint = tmp_path / "run" / "epoch=3.ckpt"
    assert any("gate" in name for name in torch.load(checkpoint, weights_only=False)["state_dict"])
    twin = lit_callbacks.EMAWeightAveraging(decay=0.9)
    fit(again, tmp_path, twin, growing([2], edits=edit), ckpt_path=checkpoint, epochs=7)
    assert same(values(again), values(module)) and len(again.blocks) == 3
    made.test(module, batches(), ckpt_path=checkpoint, verbose=False)
    assert [name for name in values(module) if "gate" in name]
    stored = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert same(values(load_from_checkpoint(Fading, checkpoint)), stored)


def test_a_growth_that_does_not_pay_is_taken_back(tmp_path: Path) -> None:
    class Count(L.Callback):
        """Of what the Trainer holds, nothing is taken back with the module."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.epochs_seen = getattr(trainer, "epochs_seen", 0) + 1

    module = built()
    callback = growing([3], probation=ax.Probation(calls=1, window=3, margin=-1e9))
    made: Any = fit(module, tmp_path, Count(), callback, saving(tmp_path / "run"))
    assert made.epochs_seen == 6
    assert callback.grower is not None and len(callback.grower.undone) == 1
    assert len(module.blocks) == 2 and module.trainer is not None
    assert len(load_from_checkpoint(Lit, tmp_path / "run" / "epoch=3.ckpt").blocks) == 3
    assert len(load_from_checkpoint(Lit, tmp_path / "run" / "epoch=5.ckpt").blocks) == 2


def test_undo_by_hand(tmp_path: Path) -> None:
    told: list[str] = []
    module, callback = built(), growing([2], keep=True, on_undo=lambda: told.append("undone"))
    fit(module, tmp_path, callback, epochs=4)
    assert callback.grower is not None and len(module.blocks) == 3
    callback.grower.undo()
    assert len(module.blocks) == 2 and module.trainer is not None and told == ["undone"]
    fit(module, tmp_path, callback, epochs=2)
    assert len(module.blocks) == 2


@pytest.mark.usefixtures("four_batches")
def test_branches_decide_between_edits(tmp_path: Path) -> None:
    module, data = built(), list(batches())
    evidence = ax.Evidence(lambda model, batch: model.loss(batch), data[:2])
    edits = [ax.Duplicate("blocks", by=1), ax.Duplicate("blocks", by=2)]
    logged = growing([2, 4], edits=edits, choose=ax.choose.by_trial(), evidence=evidence)
    made = fit(module, tmp_path, logged)
    assert logged.grower is not None and len(module.blocks) > 2 and made.global_step == 24


@pytest.mark.usefixtures("four_batches")
def test_what_is_clipped_holds_the_new_layer(tmp_path: Path) -> None:
    norms: list[float] = []

    class Norm(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            if grads:
                norms.append(float(torch.stack(grads).norm()))

    module = built()
    fit(module, tmp_path, growing(), Norm(), gradient_clip_val=1e-3)
    assert len(module.blocks) == 4 and len(norms) > 10 and max(norms) <= 1e-3 * (1 + 1e-5)


@pytest.mark.long
def test_a_compiled_module(tmp_path: Path) -> None:
    class Silent(Lit):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.loss(batch)

    modules = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = Silent()
        made = trainer(tmp_path, growing(), saving(tmp_path / f"{compiled}"))
        whole: Any = torch.compile(module, backend="eager") if compiled else module
        made.fit(whole, batches(), batches())
        made.test(module, batches(), ckpt_path=tmp_path / f"{compiled}" / "epoch=2.ckpt", verbose=False)
        modules.append(values(module))
    assert same(*modules) and "blocks.2.up.weight" in modules[0]


def test_it_is_copied_and_pickled_without_the_network(tmp_path: Path) -> None:
    module, callback = built(), growing()
    fit(module, tmp_path, callback, epochs=3)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.grower is None and len(other.state()["grower"]["journal"]) == 1
        twin = copy.deepcopy(module)
        fit(twin, tmp_path, other, epochs=3)
        assert len(twin.blocks) == 4
    assert len(pickle.dumps(callback)) < 20_000


def test_the_other_package_of_lightning(tmp_path: Path) -> None:
    import pytorch_lightning as ptl

    class Other(ptl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = built()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.net.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    callback = growing([1], edits=ax.Duplicate("net.blocks", by=1), monitor=None)
    assert isinstance(callback, L.Callback) and isinstance(callback, ptl.Callback)
    module, path = Other(), tmp_path / "last.ckpt"
    made = ptl.Trainer(max_epochs=2, callbacks=[callback], enable_checkpointing=False, **quiet)
    made.fit(module, batches())
    made.save_checkpoint(path)
    assert len(module.net.blocks) == 3 and same(values(load_from_checkpoint(Other, path)), values(module))


def test_importing_it_imports_no_lightning() -> None:
    program = "import sys, auxin.hosts.lightning; print([m for m in sys.modules if 'lightning' in m.split('.')[0]])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_hyperparameter_may_count_the_blocks(tmp_path: Path) -> None:
    module = built()
    made = fit(module, tmp_path, growing(counted_by="depth"), saving(tmp_path / "run"))
    assert module.hparams["depth"] == 4
    for epoch, depth in ((1, 2), (2, 3), (5, 4)):
        checkpoint = tmp_path / "run" / f"epoch={epoch}.ckpt"
        stock = Lit.load_from_checkpoint(checkpoint)  # nothing of auxin
        assert stock.hparams["depth"] == len(stock.blocks) == depth
        assert same(values(load_from_checkpoint(Lit, checkpoint)), values(stock))
        made.test(module, batches(), ckpt_path=checkpoint, verbose=False)
        assert module.hparams["depth"] == depth and same(values(module), values(stock))
    again = built()
    fit(again, tmp_path, growing(counted_by="depth"), ckpt_path=tmp_path / "run" / "epoch=2.ckpt")
    assert again.hparams["depth"] == len(again.blocks) == 4
    with pytest.raises(GrowthError, match=r"counted_by='lr': this hyperparameter is 0.01, and blocks had 2 blocks"):
        fit(built(), tmp_path, growing(counted_by="lr"))


def test_the_log_of_a_run(tmp_path: Path) -> None:
    average = lit_callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=2)
    callback = growing(log=tmp_path / "log")
    fit(built(schedule="cosine"), tmp_path, average, callback, saving(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds.count("reading") == 5 and kinds.count("growth") == 2


# ---- bad input


def test_a_version_that_was_not_tested_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L, "__version__", "3.1.0")
    with pytest.warns(UserWarning, match="tested with lightning 2.5 to 2.6, and 3.1.0"):
        fit(built(), tmp_path, growing(), epochs=1)


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match=r"two GrowthCallbacks in one Trainer: pass one, with edits=\[...\]"):
        fit(built(), tmp_path, growing(), growing([3]))


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_networks_are_refused_with_the_way_round(tmp_path: Path, name: str) -> None:
    made = trainer(tmp_path, growing())
    made.strategy.__class__ = type(name, (type(made.strategy),), {})  # none of them starts without a process group
    with pytest.raises(GrowthError, match=f"strategy={name} splits .* strategy='ddp'; or grow between two runs"):
        made.fit(built(), batches())


def test_processes_that_bring_back_weights_only_are_refused(tmp_path: Path) -> None:
    class _MultiProcessingLauncher:
        def launch(self, function: Any, *args: Any, trainer: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    made = trainer(tmp_path, growing())
    made.strategy._launcher = _MultiProcessingLauncher()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(GrowthError, match="ddp_spawn.*only weights come back.*strategy='ddp'"):
        made.fit(built(), batches())


def test_a_trigger_that_takes_for_better_what_another_callback_takes_for_worse(tmp_path: Path) -> None:
    stopping = lit_callbacks.EarlyStopping("val_loss", mode="max")
    with pytest.raises(GrowthError, match=r"val_loss is better when it is greater, says EarlyStopping\(mode='max'\)"):
        fit(built(), tmp_path, growing(when=ax.when.plateau()), stopping)
    fit(built(), tmp_path, growing(when=ax.when.plateau(mode="max")), stopping, epochs=1)


class OfDicts(Lit):
    """Its batches are dicts, of which `forward` takes one entry."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids)

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self(batch["ids"]), batch["labels"])


def test_a_batch_of_inputs_and_labels_by_name_is_a_probe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = OfDicts(), growing([1])
    loader = DataLoader([{"ids": x, "labels": y} for x, y in batches()], batch_size=None)
    trainer(tmp_path, callback, epochs=2).fit(module, loader, loader)
    assert len(module.blocks) == 3 and callback.grower is not None


def test_a_first_batch_that_is_no_probe(tmp_path: Path) -> None:
    nested = DataLoader([((x, y), y) for x, y in batches()], batch_size=None)

    class OfNests(Lit):
        def loss(self, batch: Any) -> torch.Tensor:
            return nn.functional.mse_loss(self(batch[0][0]), batch[1])

    with pytest.raises(GrowthError, match="does not run on it") as raised:
        trainer(tmp_path, growing([1]), epochs=2).fit(OfNests(), nested, nested)
    assert any("The probe is the first training batch here" in note for note in raised.value.__notes__)


def test_a_monitor_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match=r"monitor='val_los'\): no such metric .* Logged: 'val_loss'"):
        fit(built(), tmp_path, growing(monitor="val_los"))


def test_a_metric_of_the_end_of_the_epoch_comes_too_late_where_nothing_is_validated(tmp_path: Path) -> None:
    class Late(Lit):
        def on_train_epoch_end(self) -> None:
            self.log("late", 1.0)

    with pytest.raises(GrowthError, match=r"Log it, self.log\('late', value\), in training_step"):
        trainer(tmp_path, growing(monitor="late")).fit(Late(), batches())


def test_a_trigger_that_needs_a_metric_says_how_to_name_it(tmp_path: Path) -> None:
    with pytest.raises(GrowthError) as raised:
        fit(built(), tmp_path, growing(monitor=None, when=ax.when.plateau(patience=1)))
    assert "monitor='val_loss'" in raised.value.__notes__[0]


def test_a_checkpoint_of_another_run_is_refused(run: Any, tmp_path: Path) -> None:
    checkpoint = run[0] / "full" / "epoch=5.ckpt"
    with pytest.raises(GrowthError, match=r"growth 0 of the journal .* [Bb]uild it afresh"):
        fit(built(depth=5), tmp_path, growing(), ckpt_path=checkpoint)
    with pytest.raises(GrowthError, match="growth 0 of the journal"):
        load_from_checkpoint(Lit, checkpoint, depth=5)
    with pytest.raises(GrowthError, match="it is another trigger's"):
        fit(built(), tmp_path, growing(when=ax.when.plateau(patience=2)), ckpt_path=run[0] / "full" / "epoch=3.ckpt")


def test_a_module_without_forward_is_told_to_have_one(tmp_path: Path) -> None:
    class Formless(L.LightningModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))])

        def training_step(self, batch: Any, index: int) -> Any:
            return None

    with pytest.raises(GrowthError, match="Formless has no forward"):
        trainer(tmp_path, growing()).fit(Formless(), batches())


def test_an_average_inside_the_module_is_refused(tmp_path: Path) -> None:
    module = built()
    module.ema = torch.optim.swa_utils.AveragedModel(module.blocks)
    with pytest.raises(GrowthError, match="Lit.ema is an average inside the module, .* EMAWeightAveraging"):
        fit(module, tmp_path, growing())


def test_arguments_are_checked_before_training() -> None:
    with pytest.raises(GrowthError, match="takes no patience"):
        growing(patience=3)
    with pytest.raises(GrowthError, match="not a trigger yet"):
        growing(when=ax.when.plateau)


def test_other_hands_on_the_network_are_noticed(tmp_path: Path) -> None:
    module, callback = built(), growing([2])
    made = fit(module, tmp_path, callback, saving(tmp_path / "run"), epochs=4)
    module.extra = nn.Linear(2, 2)
    with pytest.raises(GrowthError, match="other code has changed it since"):
        made.test(module, batches(), ckpt_path=tmp_path / "run" / "epoch=0.ckpt", verbose=False)


@pytest.mark.usefixtures("four_batches")
def test_growths_that_never_find_a_moment_are_spoken_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has been waiting for 21 batches: not now: out.bias has a gradient"):
        fit(built(), tmp_path, _Late(), growing([1]), epochs=8)


def test_a_run_without_an_evaluation_is_spoken_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing was evaluated in this training"):
        fit(built(), tmp_path, growing(), check_val_every_n_epoch=10)


class _Late(L.Callback):
    """A gradient that no step uses stands there before each batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.out.bias.grad = torch.ones_like(pl_module.out.bias)


# ---- the pages


BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = Path(__file__).parent.parent.parent / "docs" / "hosts"


def carry_out(text: str, name: str) -> dict[str, Any]:
    """Run the code of a page as it stands there, but for what needs another library."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for found in BLOCK.finditer(text):
        if "neuralforecast" not in found[1]:
            line = text.count("\n", 0, found.start(1))
            exec(compile("\n" * line + found[1], name, "exec"), namespace)
    return namespace


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    found = carry_out((PAGES / "lightning.md").read_text(), "lightning.md")
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.endswith(" blocks")] == [
        "3 blocks",
        "epoch 2 1 blocks",
        "epoch 5 2 blocks",
        "epoch 8 3 blocks",
    ]
    assert len(found["again"].blocks) == 3


@WITH_AVERAGES
def test_what_goes_wrong_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (PAGES / "without.md").read_text()
    carry_out(page.split("\n## In Lightning\n")[1].split("\n## ")[0], "without.md")
