"""Growths broken on purpose around the network: the checks catch each, with the engine's own guards off."""

import copy
import dataclasses

import families
import pytest
import torch
from rows import BLOCKS
from torch.optim.swa_utils import AveragedModel
from twins import COPY, LAYER, WITH_STATE, afterwards, caught, group_of, run_check

from auxin import GrowthError, Insert, follow
from auxin.companion import Registration, _registered
from auxin.follow import optimizer as optimizer_follower
from auxin.follow.twins import builder
from auxin.structure import apply
from auxin.testing import check
from auxin.testing.run import Run


@pytest.mark.parametrize("edit", [COPY, WITH_STATE, LAYER], ids=["copy", "with-state", "layer"])
def test_the_unbroken_one_passes(unguarded, edit) -> None:
    assert run_check(edit).checks


def test_forgot_the_average(unguarded) -> None:
    def forgetful(average, change):
        yield
        yield

    unguarded.setitem(_registered, AveragedModel, dataclasses.replace(_registered[AveragedModel], follower=forgetful))
    with pytest.raises(GrowthError, match="AveragedModel: blocks of its averaged network would hold the children"):
        caught("average")  # the growth itself refuses it: averages are proved too
    unguarded.setattr("auxin.engine.prove_averages", lambda averages, change, context: change)
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

    unguarded.setitem(_registered, AveragedModel, dataclasses.replace(_registered[AveragedModel], follower=live))
    with pytest.raises(GrowthError, match="AveragedModel: the outputs of its averaged network on the probe would"):
        caught("average")  # the growth itself refuses it: averages are proved too


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


def test_state_copied_onto_the_wrong_tensor(unguarded) -> None:
    def wrong(run: Run) -> None:
        state, blocks = run.optimizers[0].state, run.model.blocks
        state[blocks[2].up.weight] = {k: v.clone() for k, v in state[blocks[0].up.weight].items()}

    afterwards(unguarded, wrong)
    caught("state", edit=WITH_STATE)


def test_state_not_copied(unguarded) -> None:
    afterwards(unguarded, lambda run: run.optimizers[0].state.pop(run.model.blocks[2].up.weight))
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

    unguarded.setitem(_registered, AveragedModel, dataclasses.replace(_registered[AveragedModel], follower=keeps))
    caught("rollback")


def test_state_not_taken_back(unguarded) -> None:
    held = []

    def deaf(optimizer, change):
        held.append(optimizer_follower.follow_optimizer(optimizer, change))
        yield next(held[-1])
        yield next(held[-1])

    unguarded.setitem(_registered, torch.optim.AdamW, Registration(deaf))
    caught("rollback")


def test_checkpoint_without_moments(unguarded) -> None:
    unguarded.setattr("auxin.checkpoint.companions.restore_optimizer", lambda *_, **__: None)
    caught("checkpoint")


def test_checkpoint_without_the_average(unguarded) -> None:
    unguarded.setattr("auxin.checkpoint.companions.write_copies", lambda *_, **__: None)
    caught("checkpoint")


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
        del _registered[Journalled]
