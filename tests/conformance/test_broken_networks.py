"""Growths broken on purpose in the network: the checks catch each, with the engine's own guards off."""

import contextlib
import dataclasses

import families
import pytest
import torch
from rows import BLOCKS
from torch import nn
from twins import afterwards, caught, run_check

from auxin import Duplicate, GrowthError, Insert
from auxin.testing.run import Run


@dataclasses.dataclass(frozen=True)
class Drawing(Insert):
    """Draws its weights from the global generator."""

    def plan(self, model, context):
        change = super().plan(model, context)
        torch.rand(1)
        return change


def test_global_random_generator_used(unguarded) -> None:
    unguarded.setattr("auxin.engine.random_state", lambda *_: contextlib.nullcontext())
    caught("random", edit=Drawing("blocks", BLOCKS["mlp"]))


class Fixed(families.Mlp):
    """Runs the blocks that it was built with, whatever stands in the container later."""

    def forward(self, x):
        x = self.stem(x)
        for name in ("0", "1"):
            x = self.blocks[int(name)](x)
        return self.head(x)


def test_layer_that_never_runs(unguarded) -> None:
    caught("learning", edit=Insert("blocks", BLOCKS["mlp"]), model=Fixed())


def test_layer_that_never_runs_is_refused_by_the_engine_itself() -> None:
    with pytest.raises(GrowthError, match="never calls it"):
        run_check(edit=Insert("blocks", BLOCKS["mlp"]), model=Fixed())


@dataclasses.dataclass(frozen=True)
class Forgetful(Duplicate):
    """Forgets to zero one of the last writers."""

    def plan(self, model, context):
        change = super().plan(model, context)
        if not context.structural:
            with torch.no_grad():
                change.added[0][1].module.down.bias.fill_(0.01)
        return change


def test_forgot_to_zero_one_writer(unguarded) -> None:
    caught("function", edit=Forgetful("blocks", by=1))


def test_forgot_to_zero_one_writer_is_refused_by_the_engine_itself() -> None:
    with pytest.raises(GrowthError, match="the outputs changed by"):
        run_check(edit=Forgetful("blocks", by=1))


class Noisy(families.MlpBlock):
    """Leaves the function alone in eval mode only."""

    def forward(self, x):
        return super().forward(x) + (0.1 * x if self.training else 0.0)


def test_function_kept_in_eval_mode_only(unguarded) -> None:
    caught("function", edit=Insert("blocks", Noisy))


@dataclasses.dataclass(frozen=True)
class Dead(Duplicate):
    """Zeroes both factors of a product: the function is kept, and nothing will ever learn."""

    def plan(self, model, context):
        change = super().plan(model, context)
        with torch.no_grad():
            for p in change.added[0][1].module.parameters():
                p.zero_()
        return change


def test_both_factors_zero(unguarded) -> None:
    caught("learning", edit=Dead("blocks", by=1))


def test_old_parameters_replaced_by_clones(unguarded) -> None:
    def clone(run: Run) -> None:
        old = run.model.head.weight
        run.model.head.weight = new = nn.Parameter(old.detach().clone())
        for group in run.optimizers[0].param_groups:
            group["params"][:] = [new if p is old else p for p in group["params"]]
        run.optimizers[0].state[new] = run.optimizers[0].state.pop(old)

    afterwards(unguarded, clone)
    caught("old tensors")


def test_old_values_touched(unguarded) -> None:
    def touch(run: Run) -> None:
        with torch.no_grad():
            run.model.stem[0].bias[0] += 1e-7

    afterwards(unguarded, touch)
    caught("old tensors")


def test_blocks_in_another_order(unguarded) -> None:
    def swap(run: Run) -> None:
        run.model.blocks[0], run.model.blocks[1] = run.model.blocks[1], run.model.blocks[0]

    afterwards(unguarded, swap)
    caught("old tensors")


def test_hooks_lost(unguarded) -> None:
    model = families.build("mlp")
    model.head.register_forward_hook(count_calls)
    afterwards(unguarded, lambda run: run.model.head._forward_hooks.clear())
    caught("old tensors", model=model)


def count_calls(module, args, output) -> None:
    pass


def test_new_layer_in_eval_mode(unguarded) -> None:
    afterwards(unguarded, lambda run: run.model.blocks[2].eval())
    caught("inherited")


def test_new_layer_in_another_dtype(unguarded) -> None:
    afterwards(unguarded, lambda run: run.model.blocks[2].double())
    caught("inherited")


@dataclasses.dataclass(frozen=True)
class Unresolved(Duplicate):
    """Records itself as it was asked for, not as it was carried out."""

    def plan(self, model, context):
        change = super().plan(model, context)
        return dataclasses.replace(change, edit=Duplicate(self.at, order=[0, 1, 0]))


def test_recorded_another_place(unguarded) -> None:
    caught("replay", edit=Unresolved("blocks", by=1, order="last"), model=Uneven())


class Uneven(nn.Module):
    """Two blocks of the same shapes that compute differently."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, families.WIDTH)
        self.blocks = nn.ModuleList([Scaled(1.0), Scaled(2.0)])
        self.head = nn.Linear(families.WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scaled(families.MlpBlock):
    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x + self.scale * (super().forward(x) - x)
