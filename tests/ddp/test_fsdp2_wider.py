"""Wider layers under FSDP2: as one plain process widens and trains them, and torch's own set-up afterwards."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Block, Net, share, train_step
from test_fsdp2 import adam, held, on_last_axis
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from under_fsdp import PROBE, built, full, plain, same, set_up, shard, shards

import auxin as ax
from auxin import sharded

UP = ax.Widen("blocks.0.up", by=3)  # odd: the ranks hold shards of different sizes
EDITS = [
    ax.Duplicate("blocks", by=1),
    UP,
    ax.Insert("blocks", functools.partial(Block, 8), index=0),
    ax.Widen("blocks.*.up", by=2, init="split"),
    ax.Duplicate("blocks", order=[0, 1, 2, 3, 3]),
]
STREAM = ax.Widen("inp", by=3)  # the residual stream: every tensor of the network


def values(model: Any, size: int) -> dict[str, torch.Tensor]:
    return full(model) if size > 1 else {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(rank: int, size: int, steps: int, edits: Any, double: bool = False) -> Any:
    """The losses and the weights after growths at equal distances."""
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    model = plain() if size == 1 else built()
    optimizer = adam(model)
    grower = ax.Grower(
        model, optimizer, edits=edits, when=lambda reading: False, probe=PROBE.to(model.inp.weight.dtype)
    )
    losses = []
    for step in range(steps):
        x, y = (t.to(model.inp.weight.dtype) for t in share(step, rank, size))
        losses.append(train_step(model, optimizer, x, y))
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if (step + 1) % (steps // (len(edits) + 1)) == 0 and len(grower.journal) < len(edits):
            optimizer.zero_grad()
            grower.grow(edits[len(grower.journal)])
    ax.verify(model, optimizer)
    if size > 1 and not double:
        set_up(model)
    return losses, values(model, size)


def compare(size: int, steps: int, edits: Any, double: bool = False) -> None:
    try:
        expected, weights = trained(0, 1, steps, edits, double)
    finally:
        torch.set_default_dtype(torch.float32)
    found = on_ranks(size, trained, size, steps, edits, double, timeout=600)
    mean = torch.tensor([losses for losses, _ in found], dtype=torch.float64).mean(0)
    apart = float((mean - torch.tensor(expected, dtype=torch.float64)).abs().max())
    print(f"{size} ranks, {steps} steps: losses {apart:.1e} apart")
    limit = 1e-9 if double else 1e-6
    assert apart <= limit
    for _, tensors in found:
        assert tensors.keys() == weights.keys()
        worst = max(float((tensors[name] - weights[name]).abs().max()) for name in weights)
        print(f"weights {worst:.1e} apart")
        if double or steps < 100:  # in float32 Adam moves weights of hardly any gradient by its rounding errors
            assert worst <= limit


def test_two_ranks_train_as_one_process_does() -> None:
    compare(2, 18, EDITS)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_a_hundred_steps_with_growths_in_depth_and_width(size: int) -> None:
    compare(size, 100, EDITS)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_a_hundred_steps_in_float64(size: int) -> None:
    """Losses and weights; with a wider residual stream, where the first gradients of some new entries are rounding."""
    compare(size, 100, [*EDITS, STREAM], double=True)


def as_planned(rank: int, size: int) -> None:
    """Every shard of weights and moments is, to the bit, that of what one process makes of the same tensors."""
    model = built()
    optimizer = adam(model)
    for step, edit in enumerate([*EDITS, STREAM, ax.Widen("blocks.0.up", to=44, init="tile", noise=0.01)]):
        train_step(model, optimizer, *share(step, rank, size))
        optimizer.zero_grad()
        expected = copied(model)
        other = adam(expected)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            other.state[q] = {k: sharded.whole(v).clone() for k, v in optimizer.state[p].items()}
        ax.grow(model, edit, optimizer, probe=PROBE)
        ax.grow(expected, edit, other, probe=PROBE)
        for name, q in expected.named_parameters():
            p = model.get_parameter(name)
            pairs = [(p, q), *((optimizer.state[p][k], v) for k, v in other.state[q].items() if v.dim())]
            for ours, theirs in pairs:
                part = theirs.detach().chunk(size)
                assert torch.equal(sharded.here(ours.detach()), part[rank] if rank < len(part) else theirs[:0]), name
        set_up(model)


def copied(model: Any) -> nn.Module:
    """The same network in one plain process."""
    found = full(model)
    memo: dict[int, Any] = {}
    sharded.copy_plainly(model, memo)
    twin = copy.deepcopy(model, memo)
    sharded.unmark(twin)
    assert same(found, dict(twin.named_parameters()))
    return twin


def test_shards_are_those_of_the_planned_tensors() -> None:
    on_ranks(2, as_planned, 2, timeout=300)


KEPT = ("_module_info", "_post_load_hook_handle", "_param_fqn", "_orig_param_uid")


def states_of(model: Any) -> list[dict[str, Any]]:
    """All that FSDP2 knows of each parameter, tensors by their shapes."""
    told = []
    for known, group in sharded.holders(model).values():
        own = {n: tuple(v.shape) if isinstance(v, torch.Tensor) else v for n, v in vars(known).items() if n not in KEPT}
        own["fqn"], own["all_gather_outputs"] = known._param_fqn, [t.shape for t in known.all_gather_outputs]
        told.append({**own, "group": (group.mp_policy, group.offload_policy, group.post_forward_mesh_info)})
    return told


class Wide(Net):
    """A network that was built as wide as another one has grown."""

    def __init__(self, depth: int = 2):
        super().__init__(depth=depth)
        for block in self.blocks:
            block.up, block.down = nn.Linear(8, 20), nn.Linear(20, 8)


def in_the_states(rank: int) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for policies in (
        {},
        {"reshard_after_forward": False, "mp_policy": mixed},
        {"reshard_after_forward": True, "offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"shard_placement_fn": on_last_axis},
    ):
        model = built(**policies)
        optimizer = adam(model)
        train_step(model, optimizer, *share(0, rank, 2))
        optimizer.zero_grad()
        ax.grow(model, ax.Widen("blocks.*.up", by=4), optimizer, probe=PROBE)
        other = built(build=Wide, **policies)
        for one in (model, other):
            train_step(one, adam(one), *share(0, rank, 2))
            sharded.settle(one)
        for ours, theirs in zip(states_of(model), states_of(other), strict=True):
            assert ours == theirs
        states = [block._get_fsdp_state() for block in model.blocks]
        assert len({id(state._comm_ctx) for state in (*states, model._get_fsdp_state())}) == 1


def test_fsdp2_knows_of_a_wider_tensor_what_it_knows_of_one_built_so() -> None:
    on_ranks(2, in_the_states, timeout=300)


def averaged(rank: int, size: int) -> dict[str, torch.Tensor]:
    if size > 1:
        model = built()
        average = AveragedModel(plain(), multi_avg_fn=get_ema_multi_avg_fn(0.5))
        average.module = shard(average.module)
    else:
        model = plain()
        average = AveragedModel(plain(), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = adam(model)
    grower = ax.Grower(model, optimizer, average, edits=UP, when=lambda reading: False, probe=PROBE, rewarm=3)
    for step in range(7):
        train_step(model, optimizer, *share(step, rank, size))
        average.update_parameters(model)
        if step in (2, 4):
            average(PROBE)
            optimizer.zero_grad()
            grower.grow(UP if step == 2 else ax.Widen("blocks.1.up", by=16, init="tile"))
    ax.verify(model, optimizer, average)
    if size > 1:
        set_up(average.module)
    return values(average.module, size)


def test_averages_keep_their_own_values_and_new_entries_warm_up() -> None:
    expected = averaged(0, 1)
    for tensors in on_ranks(2, averaged, 2, timeout=300):
        assert tensors.keys() == expected.keys()
        assert max(float((tensors[n] - expected[n]).abs().max()) for n in expected) <= 1e-6


def there_and_back(rank: int) -> None:
    """A dry run, a trial, an undo and a refusal leave every shard, every state and the set-up as they were."""
    model = built()
    optimizer = adam(model)
    grower = ax.Grower(model, optimizer, edits=UP, when=lambda reading: False, probe=PROBE, keep=True)
    for step in range(2):
        train_step(model, optimizer, *share(step, rank, 2))
    sharded.settle(model)
    before, moments, known = shards(model), held(optimizer), states_of(model)
    ids = [id(p) for p in model.parameters()]

    def as_before() -> None:
        assert same(before, shards(model)) and same(moments, held(optimizer))
        assert ids == [id(p) for p in model.parameters()]
        assert model.blocks[0].up.out_features == 16
        set_up(model)
        assert states_of(model) == known

    optimizer.zero_grad()
    ax.grow(model, UP, optimizer, probe=PROBE, dry_run=True)
    as_before()
    with grower.trial(UP):
        for step in range(2, 4):
            train_step(model, optimizer, *share(step, rank, 2))
        assert model.blocks[0].up.weight.shape == (19, 8)
    as_before()
    with grower.trial(STREAM):
        assert model.blocks[0].up.weight.shape == (16, 11)
    as_before()
    grower.grow(UP)
    grower.undo()
    as_before()
    grower.grow(UP)
    for step in range(2, 4):
        train_step(model, optimizer, *share(step, rank, 2))
    grower.undo()
    as_before()
    with pytest.raises(ax.GrowthError, match="has no heads"):
        grower.grow(ax.Widen("blocks.0.up", by=1, unit="heads"))
    as_before()
    with pytest.raises(ax.GrowthError, match="no module of the network fits"):
        ax.grow(model, [UP, ax.Widen("nothing.*", by=1)], optimizer, probe=PROBE)
    as_before()
    train_step(model, optimizer, *share(4, rank, 2))


@pytest.mark.distributed
def test_undo_and_trial_give_every_shard_back() -> None:
    on_ranks(2, there_and_back, timeout=300)


def behind(rank: int, size: int) -> Any:
    """``After``: behind a module of the root, inside a block, behind a block; and taken out again."""
    model = built() if size > 1 else plain()
    optimizer = adam(model)
    edits = [
        ax.After("inp", functools.partial(nn.Linear, 8, 8)),
        ax.After("blocks.0.down"),
        ax.After("blocks.0", functools.partial(Block, 8)),
        ax.After("blocks.0", functools.partial(nn.Linear, 8, 8), as_hook=True),
        ax.Remove("inp._grown.0"),
    ]
    losses = []
    for step, edit in enumerate(edits):
        losses.append(train_step(model, optimizer, *share(step, rank, size)))
        optimizer.zero_grad()
        ax.grow(model, edit, optimizer, probe=PROBE)
    for step in range(5, 8):
        losses.append(train_step(model, optimizer, *share(step, rank, size)))
    if size > 1:
        assert not sharded.is_unit(model.blocks[0].down._grown)
        inner = model.blocks[0]._grown._get_fsdp_state()  # it runs when the block has resharded already
        assert not inner._is_root and inner._fsdp_param_groups[0].post_forward_mesh_info is not None
    return losses, values(model, size)


def test_a_layer_behind_a_module_belongs_to_the_unit_around_it() -> None:
    expected, weights = behind(0, 1)
    found = on_ranks(2, behind, 2, timeout=300)
    mean = torch.tensor([losses for losses, _ in found]).mean(0)
    assert float((mean - torch.tensor(expected)).abs().max()) <= 1e-6
    for _, tensors in found:
        assert tensors.keys() == weights.keys()
        assert max(float((tensors[name] - weights[name]).abs().max()) for name in weights) <= 1e-6


class Job:
    """A network of one seed with AdamW that has not grown yet."""

    def __init__(self, size: int):
        self.model = built() if size > 1 else plain()
        self.optimizer = adam(self.model)
        self.grower = ax.Grower(self.model, self.optimizer, edits=UP, when=lambda reading: False, probe=PROBE)


def saved(rank: int, size: int, path: str) -> Any:
    job = Job(size)
    for step, edit in enumerate(EDITS[:4]):
        train_step(job.model, job.optimizer, *share(step, rank, size))
        job.optimizer.zero_grad()
        job.grower.grow(edit)
    train_step(job.model, job.optimizer, *share(4, rank, size))
    ax.save(job.grower, path)
    state = {**shards(job.model), **held(job.optimizer)}
    return state, [train_step(job.model, job.optimizer, *share(step, rank, size)) for step in range(5, 10)]


def resumed(rank: int, size: int, path: str) -> Any:
    job = Job(size)
    ax.load(path, job.grower, allow=[Block])
    ax.verify(job.model, job.optimizer)
    state: dict[str, torch.Tensor] = {}
    if size > 1:
        set_up(job.model)
        state = {**shards(job.model), **held(job.optimizer)}
    return state, [train_step(job.model, job.optimizer, *share(step, rank, size)) for step in range(5, 10)]


@pytest.mark.distributed
def test_a_wider_run_is_saved_and_goes_on(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    before, after = on_ranks(2, saved, 2, path, timeout=300), on_ranks(2, resumed, 2, path, timeout=300)
    for ours, theirs in zip(before, after, strict=True):
        assert same(ours[0], theirs[0]) and ours[1] == theirs[1]
    mean = torch.tensor([losses for _, losses in before]).mean(0)
    assert float((mean - torch.tensor(resumed(0, 1, path)[1])).abs().max()) <= 1e-6
