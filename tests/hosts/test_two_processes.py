"""The Trainer and Accelerate in two processes, under DistributedDataParallel on loopback."""

import os
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent / "ddp"))
from accelerated import Run
from processes import on_ranks
from trainers import checkpoint, growth, llama, losses, trainer_of


def as_rank(rank):
    """What torchrun tells a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def weights(model):
    return {name: t.tolist() for name, t in model.state_dict().items()}


def train(rank, out):
    as_rank(rank)
    callback = growth(monitor="eval_loss")
    trainer = trainer_of(llama(), callback, out=out, best=3, ddp_backend="gloo", ddp_find_unused_parameters=False)
    trainer.train()
    wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    best = weights(trainer.model)
    again = trainer_of(llama(), growth(monitor="eval_loss"), best=99, out=out + "/again", ddp_backend="gloo")
    again.train(resume_from_checkpoint=checkpoint(trainer, 2))
    return wrapped, len(trainer.model.model.layers), best, losses(trainer), losses(again), weights(again.model)


def test_the_trainer_grows_resumes_and_loads_the_best(tmp_path):
    (first, second) = on_ranks(2, train, str(tmp_path), timeout=100)
    assert first[0] and second[0]
    assert first[1] == second[1] == 3
    assert first[2] == second[2] and first[5] == second[5]  # no rank has drifted
    assert first[3] == first[4]  # the losses of the whole run, and of the resumed one


def accelerate(rank, out):
    as_rank(rank)
    run = Run()
    epochs = [run.epoch() for _ in range(4)]
    depth = len(run.model.module.blocks)
    run.save(out)
    run.accelerator.wait_for_everyone()
    after = run.epoch()
    new = Run()
    new.accelerator.load_state(out)
    loaded = len(new.model.module.blocks)
    return depth, loaded, after == new.epoch(), weights(run.model), len(epochs)


def test_accelerate_grows_and_loads(tmp_path):
    (first, second) = on_ranks(2, accelerate, str(tmp_path / "state"), timeout=60)
    assert first[:2] == second[:2] == (3, 3)
    assert first[2] and second[2]
    assert first[3] == second[3]
    torch.set_num_threads(1)
