"""Growths broken on purpose, as people break them: the checks must catch each, with the engine's own guards off."""

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable

import families
import pytest
import torch
from companions import make_companions, make_optimizers
from edits import BLOCKS
from torch import nn
from torch.optim.swa_utils import AveragedModel

from auxin import Duplicate, GrowthError, Insert, follow
from auxin.follow import _followers
from auxin.follow import optimizer as optimizer_follower
from auxin.follow.structure import apply, builder
from auxin.testing import check
from auxin.testing.run import Run

COPY = Duplicate("blocks", by=1)
WITH_STATE = Duplicate("blocks", by=1, output="keep", state="copy")
LAYER = Insert("blocks", BLOCKS["mlp"], index=1)


def run_check(edit=COPY, optimizer: str = "AdamW-loop", groups: str = "one", model: nn.Module | None = None):
    return check(
        families.build("mlp") if model is None else model,
        edit,
        lambda m: make_optimizers(m, optimizer, groups),
        families.batch("mlp"),
        companions=lambda m, *o: make_companions(m, list(o), "LambdaLR", "ema", "none"),
    )


def caught(name: str, **arguments) -> None:
    with pytest.raises(AssertionError, match=rf"^auxin\.testing\.check: {name}: "):
        run_check(**arguments)


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The engine without its own proof, so that only the checks are left."""
    for module in ("auxin.engine", "auxin.surgery"):
        monkeypatch.setattr(sys.modules[module], "verify", lambda *_: None)
        monkeypatch.setattr(sys.modules[module], "prove", lambda model, change, look, before: change)
    monkeypatch.setattr(sys.modules["auxin.grower"], "verify", lambda *_: None)
    return monkeypatch


def group_of(run: Run) -> dict:
    return run.optimizers[0].param_groups[0]


def afterwards(patch: pytest.MonkeyPatch, spoil: Callable[[Run], None]) -> None:
    """Do something to a run right after it has grown."""
    right = Run.grow

    def grow(self: Run, *args, **kwargs):
        change = right(self, *args, **kwargs)
        if not kwargs.get("dry_run"):
            spoil(self)
        return change

    patch.setattr(Run, "grow", grow)


@pytest.mark.parametrize("edit", [COPY, WITH_STATE, LAYER], ids=["copy", "with-state", "layer"])
def test_the_unbroken_one_passes(unguarded, edit) -> None:
    assert run_check(edit).checks


def test_forgot_the_average(unguarded) -> None:
    def forgetful(average, change):
        yield
        yield

    unguarded.setitem(_followers, AveragedModel, forgetful)
    caught("average")


def test_average_started_afresh(unguarded) -> None:
    def afresh(run: Run) -> None:
        run.companions[-1].module = copy.deepcopy(run.model)

    afterwards(unguarded, afresh)
    caught("average")


def test_average_shares_the_new_layer(unguarded) -> None:
    def shared(run: Run) -> None:
        run.companions[-1].module.blocks[2] = run.model.blocks[2]

    afterwards(unguarded, shared)
    caught("average")


def test_average_counts_afresh(unguarded) -> None:
    afterwards(unguarded, lambda run: run.companions[-1].n_averaged.zero_())
    caught("average")


def test_average_with_a_live_copy_of_the_layer(unguarded) -> None:
    def live(average, change):
        yield
        build = builder(change.before, average.module)
        apply(average.module, change, build)
        with torch.no_grad():
            average.module.blocks[2].down.weight.fill_(0.1)
        yield

    unguarded.setitem(_followers, AveragedModel, live)
    caught("average")


def test_appended_out_of_order(unguarded) -> None:
    def append(run: Run) -> None:
        entries = group_of(run)["params"]
        new = {id(p) for p in run.model.blocks[2].parameters()}
        entries.sort(key=lambda p: id(p) in new)

    afterwards(unguarded, append)
    caught("optimizer")


def test_entries_sorted_into_model_order(unguarded) -> None:
    def sort(run: Run) -> None:
        order = {id(p): i for i, p in enumerate(run.model.parameters())}
        group_of(run)["params"].sort(key=lambda p: order[id(p)])

    afterwards(unguarded, sort)
    caught("optimizer", groups="reversed")


def test_compared_tensors_by_value(unguarded) -> None:
    """As Lightning's filter_on_optimizer does: what equals an old tensor counts as there already."""

    def by_value(run: Run) -> None:
        entries = group_of(run)["params"]
        new = {id(p) for p in run.model.blocks[2].parameters()}
        old = [p for p in entries if id(p) not in new]
        equal = {i for p in entries if (i := id(p)) in new and any(torch.equal(p, q) for q in old)}
        entries[:] = [p for p in entries if id(p) not in equal]

    afterwards(unguarded, by_value)
    caught("optimizer")


def test_new_group_per_growth(unguarded) -> None:
    def new_group(run: Run) -> None:
        group, mine = group_of(run), list(run.model.blocks[2].parameters())
        group["params"][:] = [p for p in group["params"] if all(p is not q for q in mine)]
        run.optimizers[0].add_param_group({**group, "params": mine})

    afterwards(unguarded, new_group)
    caught("optimizer")


def test_entered_twice(unguarded) -> None:
    afterwards(unguarded, lambda run: group_of(run)["params"].append(run.model.blocks[2].up.bias))
    caught("optimizer")


def test_entered_the_wrong_group(unguarded) -> None:
    def wrong(run: Run) -> None:
        heavy, light = (g["params"] for g in run.optimizers[0].param_groups)
        index = next(i for i, p in enumerate(light) if p is run.model.blocks[2].norm.weight)
        heavy.insert(next(i for i, p in enumerate(heavy) if p is run.model.blocks[2].up.weight), light.pop(index))

    afterwards(unguarded, wrong)
    caught("optimizer", groups="decay")


def test_forgot_the_names(unguarded) -> None:
    afterwards(unguarded, lambda run: group_of(run)["param_names"].pop())
    caught("optimizer", groups="named")


def test_names_of_before(unguarded) -> None:
    def keep(run: Run) -> None:
        names = group_of(run)["param_names"]
        names[:] = [name.replace("blocks.2", "blocks.1") for name in names]

    afterwards(unguarded, keep)
    caught("optimizer", groups="named", edit=LAYER)


def test_global_random_generator_used(unguarded) -> None:
    unguarded.setattr("auxin.engine.random_state", lambda *_: contextlib.nullcontext())
    unguarded.setattr("auxin.edits.insert.random_state", lambda *_: contextlib.nullcontext())
    caught("random", edit=LAYER)


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


def test_state_copied_onto_the_wrong_tensor(unguarded) -> None:
    def wrong(run: Run) -> None:
        state, blocks = run.optimizers[0].state, run.model.blocks
        state[blocks[2].up.weight] = {k: v.clone() for k, v in state[blocks[0].up.weight].items()}

    afterwards(unguarded, wrong)
    caught("state", edit=WITH_STATE)


def test_state_shared_with_its_source(unguarded) -> None:
    def shared(run: Run) -> None:
        state, blocks = run.optimizers[0].state, run.model.blocks
        state[blocks[2].up.weight] = dict(state[blocks[1].up.weight])

    afterwards(unguarded, shared)
    caught("state", edit=WITH_STATE)


def test_state_by_position(unguarded) -> None:
    def by_position(run: Run) -> None:
        optimizer = run.optimizers[0]
        values = list(optimizer.state.values())
        optimizer.state.clear()
        optimizer.state.update(zip(optimizer.param_groups[0]["params"], values, strict=False))

    afterwards(unguarded, by_position)
    caught("state", edit=Insert("blocks", BLOCKS["mlp"], index=0))


def test_state_dropped(unguarded) -> None:
    afterwards(unguarded, lambda run: run.optimizers[0].state.clear())
    caught("state")


@dataclasses.dataclass(frozen=True)
class Forgetful(Duplicate):
    """Forgets to zero one of the last writers."""

    def plan(self, model, look):
        change = super().plan(model, look)
        if not look.structural:
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

    def plan(self, model, look):
        change = super().plan(model, look)
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


def test_learning_rate_touched(unguarded) -> None:
    afterwards(unguarded, lambda run: group_of(run).update(lr=0.123))
    caught("optimizer")


def test_schedule_started_afresh(unguarded) -> None:
    def afresh(run: Run) -> None:
        run.companions[0] = torch.optim.lr_scheduler.ExponentialLR(run.optimizers[0], 0.5)

    afterwards(unguarded, afresh)
    caught("(schedule|optimizer)")


def test_schedule_touched(unguarded) -> None:
    afterwards(unguarded, lambda run: run.companions[0].base_lrs.append(0.1))
    caught("schedule")


def test_list_assigned_to_the_group_of_lbfgs(unguarded) -> None:
    """torch's LBFGS goes on stepping the list that it was built with: it runs, and the new layer never trains."""

    def assign(run: Run) -> None:
        optimizer = run.optimizers[0]
        group = group_of(run)
        new = {id(p) for p in run.model.blocks[2].parameters()}
        group["params"], optimizer._params = list(group["params"]), [p for p in group["params"] if id(p) not in new]

    afterwards(unguarded, assign)
    caught("learning", optimizer="LBFGS")


def test_average_not_taken_back(unguarded) -> None:
    def keeps(average, change):
        build = builder(change.before, average.module)
        yield
        apply(average.module, change, build)
        yield

    unguarded.setitem(_followers, AveragedModel, keeps)
    caught("rollback")


def test_state_not_taken_back(unguarded) -> None:
    held = []

    def deaf(optimizer, change):
        held.append(optimizer_follower.follow_optimizer(optimizer, change))
        yield next(held[-1])
        yield next(held[-1])

    unguarded.setitem(_followers, torch.optim.AdamW, deaf)
    caught("rollback")


def test_checkpoint_without_moments(unguarded) -> None:
    unguarded.setattr("auxin.checkpoint.companions.restore_optimizer", lambda *_: None)
    caught("checkpoint")


def test_checkpoint_without_the_average(unguarded) -> None:
    unguarded.setattr("auxin.checkpoint.companions._write_average", lambda *_: None)
    caught("checkpoint")


@dataclasses.dataclass(frozen=True)
class Unresolved(Duplicate):
    """Records itself as it was asked for, not as it was carried out."""

    def plan(self, model, look):
        change = super().plan(model, look)
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


class Journalled:
    """A companion of a user's own that forgets to take back."""

    def __init__(self):
        self.seen: list[int] = []


def test_own_follower_that_forgets_to_take_back() -> None:
    @follow(Journalled)
    def follow_journalled(companion, change):
        yield
        companion.seen.append(len(change.added))
        yield

    try:
        with pytest.raises(AssertionError, match="rollback: after an exception at the last moment .*seen"):
            check(
                families.build("mlp"),
                COPY,
                lambda m: torch.optim.AdamW(m.parameters()),
                families.batch("mlp"),
                companions=lambda m, o: [Journalled()],
            )
    finally:
        del _followers[Journalled]
