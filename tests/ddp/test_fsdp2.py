"""Growth of a network under FSDP2: as one plain process grows and trains it, and torch's own set-up afterwards."""

import functools
import gc
import warnings
from typing import Any

import pytest
import torch
from processes import on_ranks
from ranked import Block, Net, batch, share, train_step
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from under_fsdp import PROBE, built, full, plain, same, set_up, shard, shards

import auxin as ax

LAYER = functools.partial(Block, 8)
EDITS = [
    ax.Duplicate("blocks", by=1),
    ax.Insert("blocks", LAYER, index=0),
    ax.Duplicate("blocks", order=[0, 1, 2, 3, 3]),
]
FIRST = EDITS[0]
LENGTH = [3, 4, 5]


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def trained(model: Any, optimizer: Any, steps: int, batches: Any, clip: float = 0.0) -> list[float]:
    """Growths at a quarter, a half and three quarters of the way; the losses."""
    grower = ax.Grower(model, optimizer, edits=EDITS, when=lambda reading: False, probe=PROBE)
    losses = []
    for step in range(steps):
        losses.append(train_step(model, optimizer, *batches(step)))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if (step + 1) % (steps // 4) == 0 and len(grower.journal) < len(EDITS):
            grower.grow(EDITS[len(grower.journal)])
    return losses


def on_shards(rank: int, size: int, steps: int) -> Any:
    model = built()
    optimizer = adam(model)
    losses = trained(model, optimizer, steps, lambda step: share(step, rank, size))
    set_up(model)
    ax.verify(model, optimizer)
    for p in model.parameters():
        assert hasattr(optimizer.state[p]["exp_avg"], "full_tensor")
        assert optimizer.state[p]["exp_avg"].placements == p.placements
    later = [train_step(model, optimizer, *share(100 + step, rank, size)) for step in range(10)]
    return full(model), losses + later


def compare(size: int, steps: int) -> None:
    model = plain()
    optimizer = adam(model)
    expected = trained(model, optimizer, steps, batch)
    expected += [train_step(model, optimizer, *batch(100 + step)) for step in range(10)]
    weights = dict(model.named_parameters())
    found = on_ranks(size, on_shards, size, steps, timeout=300)
    mean = torch.tensor([losses for _, losses in found]).mean(0)
    assert float((mean - torch.tensor(expected)).abs().max()) <= 1e-6
    for tensors, _ in found:
        assert tensors.keys() == weights.keys()
        assert max(float((tensors[name] - weights[name]).abs().max()) for name in weights) <= 1e-6


def test_two_ranks_train_as_one_process_does() -> None:
    compare(2, 16)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_a_hundred_steps_as_one_process_takes_them(size: int) -> None:
    compare(size, 100)


def grown_at_once(rank: int, size: int) -> None:
    """Shards equal those of the expected full tensors, to the bit."""
    model, expected = built(), plain()
    optimizer, other = adam(model), adam(expected)
    for edit in [*EDITS, ax.Remove("blocks.1")]:
        change = ax.grow(model, edit, optimizer, probe=PROBE)
        ax.grow(expected, edit, other, probe=PROBE)
        assert change.max_difference == 0 or isinstance(edit, ax.Remove)
        for name, p in expected.named_parameters():
            part = p.detach().chunk(size)
            local = model.get_parameter(name).to_local()
            assert torch.equal(local, part[rank] if rank < len(part) else p[:0]), name
        set_up(model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_shards_are_those_of_the_expected_tensors() -> None:
    on_ranks(2, grown_at_once, 2)


def policies(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    options = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "reshard_after_forward": False,
        "shard_placement_fn": on_last_axis,
    }
    model = built(**options)
    optimizer = adam(model)
    ax.grow(model, FIRST, optimizer, probe=PROBE)
    ax.grow(model, ax.Insert("blocks", LAYER), optimizer, probe=PROBE)
    units = [block._get_fsdp_state() for block in model.blocks]
    for state in units[1:]:
        ours, theirs = state._fsdp_param_groups[0], units[0]._fsdp_param_groups[0]
        assert ours.mp_policy == theirs.mp_policy == state._mp_policy == options["mp_policy"]
        assert ours.offload_policy == theirs.offload_policy
        assert ours.mesh_info.mesh == theirs.mesh_info.mesh
        assert ours.post_forward_mesh_info is None and state._auto_reshard_after_forward is False
    for block in model.blocks:
        assert [p.placements for p in block.parameters()] == [p.placements for p in model.blocks[0].parameters()]
    assert model.blocks[2].up.weight.placements[0].dim == 1
    assert model(PROBE).dtype == torch.bfloat16


def on_last_axis(p: nn.Parameter) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(p.dim() - 1) if p.dim() > 1 else None


def test_new_blocks_have_the_policies_of_their_neighbours() -> None:
    on_ranks(2, policies)


def clipped(rank: int, size: int) -> float:
    model = built() if size > 1 else plain()
    optimizer = adam(model)
    ax.grow(model, ax.Duplicate("blocks", by=1, output="keep", state="copy"), optimizer, probe=PROBE)
    x, y = share(0, rank, size)
    nn.functional.mse_loss(model(x), y).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return float(norm.full_tensor() if size > 1 else norm)


def test_gradients_are_clipped_over_all_ranks() -> None:
    expected = clipped(0, 1)
    for norm in on_ranks(2, clipped, 2):
        assert abs(norm - expected) <= 1e-6 * expected


def averaged(rank: int, size: int) -> Any:
    if size > 1:
        model, average = built(), AveragedModel(plain(), multi_avg_fn=get_ema_multi_avg_fn(0.5))
        shard(average.module)
    else:
        model = plain()
        average = AveragedModel(plain(), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = adam(model)
    grower = ax.Grower(model, optimizer, average, edits=EDITS, when=lambda reading: False, probe=PROBE)
    for step in range(6):
        train_step(model, optimizer, *share(step, rank, size))
        average.update_parameters(model)
        if step in (2, 3):
            average(PROBE)  # an evaluation leaves the root with full parameters
            grower.grow(EDITS[step - 2])
    ax.verify(model, optimizer, average)
    if size > 1:
        set_up(average.module)
    return full(average.module) if size > 1 else dict(average.module.named_parameters())


def test_averages_keep_their_own_values() -> None:
    expected = averaged(0, 1)
    for tensors in on_ranks(2, averaged, 2):
        assert tensors.keys() == expected.keys()
        assert max(float((tensors[n] - expected[n]).abs().max()) for n in expected) <= 1e-6


def there_and_back(rank: int) -> None:
    """A dry run, a trial, an undo and a refusal leave every shard, every state and the set-up as they were."""
    model = built()
    optimizer = adam(model)
    words = {"edits": EDITS, "when": lambda reading: False, "probe": PROBE}
    grower = ax.Grower(model, optimizer, **words, keep=True)
    for step in range(2):
        train_step(model, optimizer, *share(step, rank, 2))
    before, moments = shards(model), held(optimizer)
    ids = [id(p) for p in model.parameters()]

    def as_before() -> None:
        assert same(before, shards(model)) and same(moments, held(optimizer))
        assert ids == [id(p) for p in model.parameters()]
        set_up(model)

    model(PROBE)
    optimizer.zero_grad()
    ax.grow(model, FIRST, optimizer, probe=PROBE, dry_run=True)
    as_before()
    with grower.trial(EDITS[1]):
        for step in range(2, 4):
            train_step(model, optimizer, *share(step, rank, 2))
        assert len(model.blocks) == 3
    as_before()
    grower.grow(FIRST)
    grower.undo()
    as_before()
    grower.grow(FIRST)
    for step in range(2, 4):
        train_step(model, optimizer, *share(step, rank, 2))
    grower.undo()
    as_before()
    with pytest.raises(ax.GrowthError, match="does not take"):
        grower.grow(ax.Insert("blocks", functools.partial(Block, 9)))
    as_before()
    grower.grow(ax.Remove("blocks.0"))
    set_up(model)
    grower.undo()
    as_before()
    train_step(model, optimizer, *share(4, rank, 2))


def held(optimizer: Any) -> dict[str, torch.Tensor]:
    state = enumerate(optimizer.state.values())
    return {f"{i} {k}": getattr(v, "to_local", v.clone)().clone() for i, one in state for k, v in one.items()}


def test_undo_and_trial_give_every_shard_back() -> None:
    on_ranks(2, there_and_back)


class Nested(Net):
    """Blocks that hold units of their own."""

    def __init__(self, dim: int = 8, depth: int = 2):
        super().__init__(dim, depth)
        self.blocks = nn.ModuleList(nn.Sequential(Block(dim), Block(dim)) for _ in range(depth))


class Normed(nn.Module):
    """A block whose copy has to fade in."""

    def __init__(self, dim: int = 8):
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.relu(self.linear(x)))


def networks() -> dict[str, Any]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    made = {kind: Net(depth=2) for kind in ("compiled", "checkpointed", "fades in")} | {"nested": Nested()}
    for block in made["compiled"].blocks:
        block.compile(backend="eager")
    made["checkpointed"].blocks = nn.ModuleList(map(checkpoint_wrapper, made["checkpointed"].blocks))
    made["fades in"].blocks = nn.ModuleList(Normed() for _ in range(2))
    for block in made["nested"].blocks:
        fully_shard(block[0])
    return {kind: shard(model) for kind, model in made.items()}


def every_network(rank: int) -> None:
    from torch.distributed.fsdp import FSDPModule

    for kind, model in networks().items():
        optimizer = adam(model)
        grower = ax.Grower(model, optimizer, edits=FIRST, when=ax.when.every(2), probe=PROBE)
        for step in range(4):
            train_step(model, optimizer, *share(step, rank, 2))
            with torch.no_grad():
                loss = model(PROBE).mean()  # leaves the root with full parameters
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                change = grower.step(loss)
            assert (change is None) == (step % 2 == 0)
        train_step(model, optimizer, *share(4, rank, 2))
        assert [p for _, p in model.named_parameters()] and len(model.blocks) == 4, kind
        units = [[isinstance(m, FSDPModule) for m in block.modules()] for block in model.blocks]
        assert units == [units[0]] * 4
        assert not kind.startswith("nested") or sum(units[0]) == 2
        if kind != "nested":
            set_up(model)
        for block in model.blocks:  # no hook of the block that was copied
            states = [hook.__self__ for m in block.modules() for hook in m._forward_pre_hooks.values()]
            assert len(set(map(id, states))) == sum(units[0])
        model.state_dict()


def test_nested_compiled_checkpointed_and_fading_blocks() -> None:
    on_ranks(2, every_network)


def test_copies_of_checkpointed_blocks_in_one_process() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = plain()
    model.blocks = nn.ModuleList(map(checkpoint_wrapper, model.blocks))
    change = ax.grow(model, FIRST, adam(model), probe=PROBE)
    assert change.how == "last writers zero" and change.max_difference == 0


def taken_out_again(rank: int) -> int:
    """Rank 0 still holds a block that has been taken out, with its gradients, while rank 1 has freed it."""
    model = built()
    optimizer = adam(model)
    grower = ax.Grower(model, optimizer, edits=FIRST, when=lambda reading: False, probe=PROBE)
    train_step(model, optimizer, *share(0, rank, 2))
    grower.grow(FIRST)
    train_step(model, optimizer, *share(1, rank, 2))
    held = model.blocks[2] if rank == 0 else None
    grower.grow(ax.Remove("blocks.2"))
    for step in range(2, 5):
        train_step(model, optimizer, *share(step, rank, 2))
        gc.collect()
    grower.step(1.0)
    assert held is None or held.up.weight.grad is not None
    return len(grower.flow.readings)


def test_gradients_are_read_alike_where_one_rank_has_not_freed_yet_what_was_taken_out() -> None:
    first, second = on_ranks(2, taken_out_again)
    assert first == second
