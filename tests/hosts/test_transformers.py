"""Growth in the Hugging Face Trainer: the same as in the plain loop, resumed, and taken back to the best."""

import importlib
import json
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from trainers import (
    EVERY,
    GROWN_AT,
    PROBE,
    STEPS,
    TEST,
    TRAIN,
    assert_equal_tensors,
    assert_same_model,
    checkpoint,
    growth,
    llama,
    losses,
    moments,
    trainer_of,
)

import auxin as ax

peft = pytest.importorskip("peft")


def batches(trainer):
    """What the Trainer trains on, in its order."""
    transformers.set_seed(trainer.args.seed)
    loader = trainer.get_train_dataloader()
    while True:
        yield from loader


# ---- the same as in the plain loop


def plain_run(trainer, **options):
    """What the Trainer does, written out, with a Grower in it."""
    model = llama().train()
    decayed = trainer.get_decay_parameter_names(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": 0.0},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    own = {"edits": ax.Duplicate("model.layers", by=1), "when": ax.when.at(GROWN_AT), "probe": PROBE}
    grower = ax.Grower(model, optimizer, scheduler, **{**own, **options})
    found = []
    for step, batch in zip(range(1, STEPS + 1), batches(trainer), strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
        if step % trainer.args.eval_steps == 0:
            model.eval()
            with torch.no_grad():
                value = model(input_ids=TEST.ids, labels=TEST.ids).loss
            model.train()
            grower.step(value)
    return found, grower


def test_the_same_growths_and_losses_as_in_the_plain_loop():
    callback = growth()
    trainer = trainer_of(llama(), callback)
    trainer.train()
    plain, grower = plain_run(trainer_of(llama()))
    difference = max(abs(a - b) for a, b in zip(losses(trainer), plain, strict=True))
    print(f"Trainer and plain loop: largest difference of {STEPS} losses {difference:.3g}")
    assert difference <= 1e-6
    ours, theirs = callback.grower.journal, grower.journal
    assert [e.edit for e in ours] == [e.edit for e in theirs] and len(ours) == 2
    assert (
        [e.at for e in ours]
        == [e.at for e in theirs]
        == [{"calls": 1, "optimizer_steps": 3}, {"calls": 3, "optimizer_steps": 9}]
    )
    assert [e.seed for e in ours] == [e.seed for e in theirs]
    for (name, p), (other, q) in zip(trainer.model.named_parameters(), grower.model.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_a_growth_that_does_not_pay_is_rolled_back_as_in_the_plain_loop():
    def options():  # nothing is good enough: it is judged one evaluation after it
        return {"when": ax.when.at([3]), "probation": ax.Probation(calls=1, margin=-9.0)}

    callback = growth(**options())
    trainer = trainer_of(llama(), callback, eval_steps=2)
    trainer.train()
    plain, grower = plain_run(trainer_of(llama(), eval_steps=2), **options())
    assert losses(trainer) == plain
    assert [entry["undone_at"] for entry in callback.grower.undone] == [{"calls": 4}]
    assert len(grower.undone) == 1 and len(trainer.model.model.layers) == 2


@pytest.mark.long
def test_an_edit_is_tried_and_leaves_no_trace():
    data = ax.Evidence(lambda model, ids: model(input_ids=ids, labels=ids).loss, [TEST.ids])
    trying = growth(choose=ax.choose.by_trial(steps=2, margin=-9.0), evidence=data)
    trainer, plain = trainer_of(llama(), trying, bf16=True), trainer_of(llama(), growth(), bf16=True)
    trainer.train()
    plain.train()
    assert losses(trainer) == losses(plain)


# ---- resumed


STOCK = """
    import json, sys
    sys.modules["auxin"] = None  # whoever imports it fails
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, TrainerCallback, set_seed
    torch.set_num_threads(1)

    ids = torch.randint(0, 20, (64, 8), generator=torch.Generator().manual_seed(0))
    data = [{{"input_ids": row, "labels": row}} for row in ids]

    class Moments(TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
            torch.save({{n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()}}, {moments!r})

    model = AutoModelForCausalLM.from_pretrained({checkpoint!r})
    arguments = TrainingArguments(
        {out!r}, max_steps=12, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Moments()])
    trainer.train(resume_from_checkpoint={checkpoint!r})
    print(json.dumps([line["loss"] for line in trainer.state.log_history if "loss" in line]))
"""


class Keep(transformers.TrainerCallback):
    """The first moments and the weights at each checkpoint."""

    def __init__(self):
        self.moments, self.weights = {}, {}

    def on_save(self, args, state, control, model, optimizer, **kwargs):
        number = state.global_step // EVERY
        self.moments[number] = moments(model, optimizer)
        self.weights[number] = {name: t.clone() for name, t in model.state_dict().items()}


def test_stock_resume_in_a_process_without_auxin(tmp_path):
    keep = Keep()
    trainer = trainer_of(llama(), growth(when=ax.when.at([1])), keep, out=str(tmp_path / "run"))
    trainer.train()
    program = STOCK.format(
        checkpoint=checkpoint(trainer, 3), moments=str(tmp_path / "moments.pt"), out=str(tmp_path / "stock")
    )
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    restored = torch.load(tmp_path / "moments.pt")
    assert any(name.startswith("model.layers.2.") for name in restored)
    assert_equal_tensors(restored, keep.moments[3])
    assert json.loads(done.stdout.strip().splitlines()[-1]) == losses(trainer)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def with_adapters():
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(1)
    return peft.get_peft_model(llama(), adapters)


KINDS = {
    "float32": (llama, {}, {}),
    "bf16": (llama, {}, {"bf16": True}),
    "accumulated gradients": (llama, {}, {"gradient_accumulation_steps": 3}),
    "an own group": (llama, {"group": {"lr": 1e-4}}, {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    "plateau": (
        llama,
        {},
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0},
            "metric_for_best_model": "eval_loss",
        },
    ),
    "adafactor": (llama, {}, {"optim": "adafactor"}),
    "a fade": (bert, {"edits": ax.Duplicate("bert.encoder.layer", by=1, fade=3), "stock": False}, {}),
    "adapters": (with_adapters, {"edits": ax.Duplicate("base_model.model.model.layers", by=1)}, {}),
}


LONG = ("accumulated gradients", "plateau", "adafactor", "a fade")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.long] if k in LONG else []) for k in KINDS])
def test_resumed_with_the_callback_it_goes_on_exactly(kind):
    build, growing, options = KINDS[kind]
    whole = trainer_of(build(), growth(**growing), **options)
    whole.train()
    for evaluation in (1, 2):  # with a decision that waits, and grown
        callback = growth(**growing)
        resumed = trainer_of(build(), callback, **options)
        resumed.train(resume_from_checkpoint=checkpoint(whole, evaluation))
        assert losses(resumed) == losses(whole)
        assert len(callback.grower.journal) == 2
        assert_equal_tensors(resumed.model.state_dict(), whole.model.state_dict())


def test_resumed_from_the_model_that_it_has_become():
    whole = trainer_of(llama(), growth())
    whole.train()
    callback = growth()
    grown = llama(3).from_pretrained(checkpoint(whole, 2))
    resumed = trainer_of(grown, callback, out=whole.args.output_dir)
    resumed.train(resume_from_checkpoint=checkpoint(whole, 2))
    assert losses(resumed) == losses(whole) and callback.grower.calls == 4
    assert_equal_tensors(resumed.model.state_dict(), whole.model.state_dict())


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_weights_that_the_file_names_otherwise():
    whole = trainer_of(mixtral(), growth(monitor="eval_loss"), best=2)
    whole.train()
    assert_same_model(whole.model, mixtral().from_pretrained(checkpoint(whole, 2)))
    resumed = trainer_of(mixtral(), growth(monitor="eval_loss"), best=99)
    resumed.train(
        resume_from_checkpoint=checkpoint(whole, 2)
    )  # the Trainer alone leaves the experts as they were built
    assert losses(resumed) == losses(whole)


def test_resumed_with_an_optimizer_of_ones_own():
    def run(resume=None):
        model = llama()
        optimizer = torch.optim.AdamW([*reversed(list(model.parameters()))], lr=1e-2)  # head first: no stock resume
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        trainer = trainer_of(model, growth(), optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    assert losses(run(checkpoint(whole, 2))) == losses(whole)


# ---- the best model


@pytest.mark.parametrize("best", [1, 2, 3, 4])  # before a growth, after it, between two, after both
def test_the_best_model_is_loaded_with_its_structure(best):
    callback = growth(monitor="eval_loss")
    trainer = trainer_of(llama(), callback, best=best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == checkpoint(trainer, best)
    assert len(trainer.model.model.layers) == (2, 3, 3, 4)[best - 1]
    assert_same_model(trainer.model, llama().from_pretrained(checkpoint(trainer, best)))
    callback.grower.verify()
    assert len(callback.grower.state_dict()["journal"]) == (0, 1, 1, 2)[best - 1]


@pytest.mark.parametrize("original", [True, False])
def test_the_best_model_of_a_resumed_run_is_older_than_its_growth(original):
    first = trainer_of(llama(), growth(monitor="eval_loss"), best=1)
    first.train()
    callback = growth(monitor="eval_loss")
    model = llama() if original else llama().from_pretrained(checkpoint(first, 3))
    resumed = trainer_of(model, callback, best=99, out=first.args.output_dir)
    resumed.train(resume_from_checkpoint=checkpoint(first, 3))
    assert resumed.state.best_model_checkpoint == checkpoint(first, 1)
    assert_same_model(resumed.model, llama().from_pretrained(checkpoint(first, 1)))
    callback.grower.verify()
    callback.grower.state_dict()


@pytest.mark.parametrize("best", [1, 2])
def test_the_best_adapters_are_loaded_on_their_blocks(best):
    keep = Keep()
    growing = growth(monitor="eval_loss", edits=ax.Duplicate("base_model.model.model.layers", by=1))
    trainer = trainer_of(with_adapters(), growing, keep, best=best)
    trainer.train()
    assert_equal_tensors(trainer.model.state_dict(), keep.weights[best])


def test_adapters_on_a_grown_block_train():
    start = {}

    def grown(change):
        (path, new), *_ = change.added
        start.update({f"{path}.{name}": p.detach().clone() for name, p in new.module.named_parameters()})

    edits = ax.Duplicate("base_model.model.model.layers", by=1)
    trainer = trainer_of(with_adapters(), growth(edits=edits, when=ax.when.at([1]), on_growth=grown))
    trainer.train()
    assert trainer.model.config.num_hidden_layers == 3
    new = {name: p for name, p in trainer.model.named_parameters() if name in start}
    assert len(new) == len(start) and any("lora" in name for name in new)
    for name, p in new.items():
        assert p.requires_grad is ("lora" in name) and torch.equal(p, start[name]) is ("lora" not in name), name


# ---- what else happens in a Trainer


def test_early_stopping_ends_the_run_and_the_best_is_loaded():
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    callback = growth(monitor="eval_loss")
    trainer = trainer_of(llama(), callback, stopping, best=1)
    trainer.train()
    assert trainer.state.global_step == 9 and callback.grower.calls == 1  # of the best, to which it was taken back
    assert_same_model(trainer.model, llama().from_pretrained(checkpoint(trainer, 1)))


class Averaging(transformers.TrainerCallback):
    def __init__(self, average, model):
        self.average, self.model = average, model

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update_parameters(self.model)


def test_an_average_keeps_step():
    model = llama()
    average = torch.optim.swa_utils.AveragedModel(model)
    trainer = trainer_of(model, Averaging(average, model), growth(companions=[average]))
    trainer.train()
    assert [n for n, _ in average.module.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert len(average.module.model.layers) == 4


def test_only_evaluations_of_the_training_count():
    callback = growth()
    trainer = trainer_of(llama(), callback)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert callback.grower.calls == 4 and len(trainer.model.model.layers) == 4


def test_a_second_training_goes_on_from_the_first():
    callback = growth(when=ax.when.at([1, 5]))
    trainer = trainer_of(llama(), callback)
    trainer.train()
    trainer.train()
    assert callback.grower.calls == 8 and len(trainer.model.model.layers) == 4
    assert [entry.at["calls"] for entry in callback.grower.journal] == [1, 5]


def test_a_training_interrupted_while_gradients_gather_is_resumed_in_the_same_process():
    class Interrupted(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    options = {"gradient_accumulation_steps": 2}
    whole = trainer_of(llama(), growth(), **options)
    whole.train()
    trainer = trainer_of(llama(), growth(), interruption := Interrupted(), **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert any(p.grad is not None for p in trainer.model.parameters())
    trainer.remove_callback(interruption)
    trainer.train(resume_from_checkpoint=checkpoint(trainer, 1))  # from before the growth
    assert losses(trainer) == losses(whole)


def test_each_training_of_a_model_init_begins_anew():
    callback = growth()
    trainer = trainer_of(llama(), callback)
    trainer.model_init = lambda: llama()
    trainer.train()
    first = losses(trainer)
    trainer.train()
    assert losses(trainer) == first and callback.grower.calls == 4 and len(trainer.model.model.layers) == 4


def test_a_callback_that_was_taken_out_does_nothing():
    callback = growth()
    trainer, plain = trainer_of(llama(), callback), trainer_of(llama())
    trainer.remove_callback(callback)
    trainer.train()
    plain.train()
    trainer.train(resume_from_checkpoint=checkpoint(trainer, 2))
    assert callback.grower is None and losses(trainer) == losses(plain)


def test_one_of_several_evaluation_sets_is_looked_at():
    callback = growth(monitor="b_loss")
    trainer = trainer_of(llama(), callback, test={"a": TEST, "b": TRAIN})
    trainer.train()
    assert callback.grower.calls == 4 and "eval_a_loss" not in callback.grower.progress.metrics


def test_the_checkpoint_holds_the_journal_of_its_moment():
    trainer = trainer_of(llama(), growth())
    trainer.train()
    held = [json.loads(open(f"{checkpoint(trainer, n)}/auxin.json").read()) for n in (1, 2, 3, 4)]
    assert [len(one["journal"]) for one in held] == [0, 1, 1, 2]
    assert held[0]["state"]["pending"] is not None


# ---- bad input


def test_two_callbacks():
    with pytest.raises(ax.GrowthError, match=r"two GrowthCallbacks .* edits=\[first, second\]"):
        trainer_of(llama(), growth(), growth())
    trainer = trainer_of(llama(), growth())
    trainer.add_callback(growth())
    with pytest.raises(ax.GrowthError, match="two GrowthCallbacks"):
        trainer.train()


@pytest.mark.parametrize("kind", ["DeepSpeed", "FSDP"])
def test_what_cannot_grow_is_refused_with_the_way_round(kind, monkeypatch):
    class Set(transformers.Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, f"is_{kind.lower()}_enabled", True)

    monkeypatch.setattr("trainers.Trainer", Set)
    monkeypatch.setattr(transformers.Trainer, "_move_model_to_device", lambda *_: None)
    with pytest.raises(ax.GrowthError, match=rf"uses {kind}.*auxin.grow\(model, edit, probe=batch\)"):
        trainer_of(llama(), growth())


def test_a_monitor_that_no_evaluation_gives():
    trainer = trainer_of(llama(), growth(monitor="accuracy"))
    with pytest.raises(ax.GrowthError, match=r"no evaluation gave eval_accuracy, only eval_loss, .*compute_metrics"):
        trainer.train()
    assert trainer.state.global_step == EVERY


def test_a_trigger_that_takes_for_better_what_the_trainer_takes_for_worse():
    plateau = ax.when.plateau(patience=2)
    with pytest.raises(ax.GrowthError, match=r"eval_planned is better when it is greater.*Pass mode='max' to the trig"):
        trainer_of(llama(), growth(when=plateau), best=1).train()
    trainer_of(llama(), growth(when=plateau, monitor="loss"), best=1, max_steps=EVERY).train()
    trainer_of(llama(), growth(when=ax.when.plateau(patience=2, mode="max")), best=1, max_steps=EVERY).train()


def test_a_checkpoint_without_a_journal_is_where_counting_begins():
    plain, callback = trainer_of(llama()), growth(monitor="eval_loss")
    plain.train()
    resumed = trainer_of(llama(), callback)
    with pytest.warns(UserWarning, match="holds no auxin.json: GrowthCallback begins to count anew"):
        resumed.train(resume_from_checkpoint=checkpoint(plain, 2))
    assert callback.grower.calls == 2 and len(callback.grower.journal) == 1


def test_added_after_the_trainer_was_built():
    trainer, callback = trainer_of(llama()), growth(monitor="eval_loss")
    trainer.add_callback(callback)
    trainer.train()
    assert callback.grower.calls == 4
    late = trainer_of(llama().from_pretrained(checkpoint(trainer, 2)))
    late.add_callback(growth())
    with pytest.raises(ax.GrowthError, match=r"added after the Trainer was built.*callbacks=\[GrowthCallback"):
        late.train(resume_from_checkpoint=checkpoint(trainer, 2))


def test_no_evaluations():
    with pytest.warns(UserWarning, match="with eval_strategy='no' nothing grows"):
        trainer_of(llama(), growth(), eval_strategy="no", max_steps=1).train()


def test_a_hyperparameter_search():
    class Trial(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_hyper_param_search = True

    with pytest.raises(ax.GrowthError, match="give each trial a Trainer of its own"):
        trainer_of(llama(), Trial(), growth()).train()


def test_a_version_that_was_not_tested(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "6.1.0")
    monkeypatch.delitem(sys.modules, "auxin.hosts.transformers")
    with pytest.warns(UserWarning, match="tested with transformers 5.23 to 5.24, and 6.1.0 is installed"):
        importlib.import_module("auxin.hosts.transformers")


def test_the_directory_of_another_run():
    other = trainer_of(bert(), growth(edits=ax.Duplicate("bert.encoder.layer", by=1, fade=3), stock=False))
    other.train()
    model = llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainer = trainer_of(model, growth())
    with pytest.raises(ax.GrowthError, match="growth 0 of the journal .* does not fit this model"):
        trainer.train(resume_from_checkpoint=checkpoint(other, 4))
    assert_equal_tensors(model.state_dict(), before)


def test_weights_of_another_depth_without_a_journal():
    deeper = trainer_of(llama(3))
    deeper.train()
    with pytest.raises(ax.GrowthError, match=r"weights in .* are of another network.*from_pretrained"):
        trainer_of(llama(), growth()).train(resume_from_checkpoint=checkpoint(deeper, 1))


def test_a_file_that_is_not_ours(tmp_path):
    trainer = trainer_of(llama(), growth())
    trainer.train()
    place = f"{checkpoint(trainer, 2)}/auxin.json"
    for text, words in (("{", "is not what auxin writes"), ('{"format": 99}', "has format 99")):
        with open(place, "w") as file:
            file.write(text)
        with pytest.raises(ax.GrowthError, match=words):
            trainer_of(llama(), growth()).train(resume_from_checkpoint=checkpoint(trainer, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"edit": 1}, "takes no edit. It takes .* edits, when"), ({"when": 3}, "when")],
)
def test_options_that_no_grower_takes(options, words):
    with pytest.raises(ax.GrowthError, match=words):
        growth(**options)


def test_outside_of_a_trainer():
    with pytest.raises(ax.GrowthError, match="works in a transformers.Trainer"):
        growth().on_init_end(None, None, None)
