"""``auto`` in the three hosts: the same run as in a plain loop, and the host's own counters as without races."""

import pytest
import torch
from test_auto import small
from test_races import data, evidence, loss
from torch import nn

import auxin as ax
from auxin.ledger import flops_of

STEPS = 220  # of the small network, which the budget pays for


def loader():
    """The 20 batches of the evidence, in their order."""
    x, y = (torch.cat(parts) for parts in zip(*(data(n) for n in range(20)), strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)


def prepared():
    model = small()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, opt, ax.schedule.by_budget(opt), STEPS * flops_of(model, loss, data())


def plain_run():
    """By hand: the network, its Grower, and how many steps the loop has taken."""
    model, opt, sched, budget = prepared()
    grower, steps = ax.auto(model, opt, sched, evidence=evidence(), budget=budget), 0
    while not grower.finished:
        for batch in loader():
            if grower.finished:
                break
            opt.zero_grad()
            loss(model, batch).backward()
            opt.step()
            sched.step()
            grower.step()
            steps += 1
    return model, grower, steps


@pytest.fixture(scope="module")
def plain():
    return plain_run()


def same_run(model, grower, steps, plain):
    model_then, grower_then, steps_then = plain
    assert model_then[0].out_features > 2  # it has grown
    assert [str(e.edit) for e in grower.journal] == [str(e.edit) for e in grower_then.journal]
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in model_then.state_dict().items())
    assert grower.ledger.flops == grower_then.ledger.flops and grower.finished
    assert steps == steps_then < grower.optimizer_steps  # the host has not counted the steps of races
    grower.verify()


def test_under_accelerate(plain):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from auxin.hosts.accelerate import auto

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    model, opt, sched, budget = prepared()
    model, opt, sched, batches = accelerator.prepare(model, opt, sched, loader())
    grower, steps = auto(accelerator, model, opt, sched, evidence=evidence(), budget=budget), 0
    while not grower.finished:
        for batch in batches:
            if grower.finished:
                continue
            opt.zero_grad()
            accelerator.backward(loss(model, batch))
            opt.step()
            sched.step()
            grower.step()
            steps += 1
    same_run(model, grower, steps, plain)
    # a cosine over so many steps tells the budget
    model, opt, _, _ = prepared()
    model, opt = accelerator.prepare(model, opt)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt.optimizer, T_max=100)
    with pytest.warns(UserWarning, match="nothing will grow"), pytest.warns(UserWarning, match="counts 100 steps"):
        grower = auto(accelerator, model, opt, cosine, evidence=evidence())
    assert grower.budget == 100 * flops_of(model, loss, data())


class Regression(nn.Sequential):
    """The same network as a Trainer wants it: loss and outputs for keywords."""

    def forward(self, x, labels=None):
        out = super().forward(x)
        return out if labels is None else {"loss": nn.functional.mse_loss(out, labels), "logits": out}


def in_transformers(path, steps):
    """A Trainer over the same batches in the same order, and its callback."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from auxin.hosts.transformers import auto

    class InOrder(Trainer):
        def get_train_dataloader(self):
            rows = [{"x": x, "labels": y} for n in range(20) for x, y in zip(*data(n), strict=True)]
            return torch.utils.data.DataLoader(rows, batch_size=64)

    net, _, _, budget = prepared()
    model = Regression(*net)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    callback = auto(evidence=evidence(), budget=budget)
    args = TrainingArguments(
        str(path), max_steps=steps, report_to=[], disable_tqdm=True, use_cpu=True, max_grad_norm=0, save_steps=90,
        logging_steps=1,
    )  # fmt: skip
    optimizers = opt, ax.schedule.by_budget(opt)
    made = InOrder(model, args, train_dataset=[0], callbacks=[callback], optimizers=optimizers)
    made.remove_callback(PrinterCallback)
    return made, callback


def test_in_the_hugging_face_trainer(tmp_path, plain):
    trainer, callback = in_transformers(tmp_path / "run", 10 * STEPS)
    trainer.train()
    same_run(trainer.model, callback.grower, trainer.state.global_step, plain)
    assert sum("loss" in line for line in trainer.state.log_history) == trainer.state.global_step
    resumed, again = in_transformers(tmp_path / "resumed", 10 * STEPS)  # from behind its growth
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-90"))
    same_run(resumed.model, again.grower, resumed.state.global_step, plain)


def test_a_trainer_that_ends_before_the_budget_is_named(tmp_path):
    trainer, callback = in_transformers(tmp_path, 10)
    with pytest.warns(UserWarning, match="the training ended with 5% of its budget spent.*Raise max_steps"):
        trainer.train()
    assert callback.grower.calls == 10


def test_in_lightning(tmp_path, plain):
    import lightning

    from auxin.hosts.lightning import auto

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            for name, module in small().named_children():
                self.add_module(name, module)

        def forward(self, x):
            for module in self.children():
                x = module(x)
            return x

        def training_step(self, batch, index):
            return loss(self, batch)

        def configure_optimizers(self):
            opt = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [opt], [{"scheduler": ax.schedule.by_budget(opt), "interval": "step"}]

    def run(path, callback, **words):
        module = Lit()
        checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(path, every_n_train_steps=100, save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options = {"max_epochs": -1, "accelerator": "cpu", "callbacks": [callback, checkpoints], **quiet}
        made = lightning.Trainer(**options)
        made.fit(module, loader(), **words)
        return module, made.global_step

    budget = prepared()[3]
    module, steps = run(tmp_path / "run", callback := auto(evidence=evidence(), budget=budget))
    same_run(module, callback.grower, steps, plain)
    saved = next((tmp_path / "run").glob("*step=100.ckpt"))
    module, steps = run(tmp_path / "again", callback := auto(evidence=evidence(), budget=budget), ckpt_path=str(saved))
    same_run(module, callback.grower, steps, plain)
