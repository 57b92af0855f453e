"""The wrapper stays the user's: its hooks, settings and modes, through growth, undo, trial, surgery and freezing."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from ranked import Block, Net, assert_ranks_equal, batch, share, train_step, values, wrapped
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

import auxin as ax

PROBE = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
MANY = pytest.mark.distributed  # in the suite that takes longer
ONE_MORE = ax.Duplicate("blocks", by=1)


def train(model: Any, optimizer: Any, steps: range, **words: Any) -> None:
    for step in steps:
        train_step(model, optimizer, *share(step, dist.get_rank(), dist.get_world_size()), **words)
        assert_ranks_equal(model, f"step {step}")


def built(rank: int, build: Any = Net, **options: Any) -> tuple[Any, Any]:
    warnings.simplefilter("ignore")
    model = wrapped(rank, build, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def expected(growing: Any, steps: int = 6, accumulate: int = 1) -> Tensor:
    """The weights of one process on the global batch; `growing(model, optimizer)` after half the steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        if step == steps // 2:
            growing(model, optimizer)
        train_step(model, optimizer, *batch(step), accumulate=accumulate)
    return values(*model.parameters())


def grow(model: Any, optimizer: Any) -> ax.Change:
    optimizer.zero_grad()
    return ax.grow(model, ONE_MORE, optimizer, probe=PROBE)


# ---- settings


def hooks_and_modes(rank: int) -> None:
    model, optimizer = built(rank)
    fired: list[str] = []

    def counting(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        fired.append("comm")
        return default_hooks.allreduce_hook(None, bucket)

    model.register_comm_hook("a state of the user's", counting)
    model.register_forward_pre_hook(lambda *_: fired.append("before"))
    model.register_forward_hook(lambda *_: fired.append("after"))
    model.register_full_backward_hook(lambda *_: fired.append("backward"))
    model.eval()
    model.mark = "mine"
    train(model, optimizer, range(2))
    held = model, model.module, model.reducer
    grow(model, optimizer)
    assert (model, model.module) == held[:2] and model.reducer is not held[2]
    assert not model.training and model.mark == "mine" and model._comm_hooks[0][1] == "a state of the user's"
    fired.clear()
    train(model, optimizer, range(2, 4))
    assert {name: fired.count(name) for name in fired} == {"before": 2, "after": 2, "backward": 2, "comm": 2}, fired
    again = pickle.loads(pickle.dumps(copy.deepcopy(model.module)))
    assert torch.equal(again(PROBE), model.module(PROBE))


def test_hooks_and_modes_stay() -> None:
    on_ranks(2, hooks_and_modes)


def compressed(rank: int, kind: str) -> Tensor:
    model, optimizer = built(rank)
    if kind == "builtin":
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    elif kind == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    else:
        state = PowerSGDState(None, matrix_approximation_rank=8, start_powerSGD_iter=3, min_compression_rate=0.5)
        model.register_comm_hook(state, powerSGD_hook)
    train(model, optimizer, range(5))
    grow(model, optimizer)
    train(model, optimizer, range(5, 10))
    name = model._get_ddp_logging_data()["comm_hook"]
    assert name == {"builtin": "BuiltinCommHookType.FP16_COMPRESS", "fp16": "fp16_compress_hook"}.get(
        kind, "powerSGD_hook"
    )
    if kind == "power":
        assert state.iter > 3 and state.error_dict
        before = dict(state.error_dict), state.iter
        optimizer.zero_grad()
        with pytest.raises(ZeroDivisionError), ax.surgery(model, optimizer):
            raise ZeroDivisionError
        assert (dict(state.error_dict), state.iter) == before
    return values(*model.parameters())


@pytest.mark.parametrize("kind", ["builtin", pytest.param("fp16", marks=MANY), pytest.param("power", marks=MANY)])
def test_comm_hooks_of_torch_go_on(kind: str) -> None:
    first, second = on_ranks(2, compressed, kind)
    assert torch.equal(first, second)


def accumulating(rank: int, options: dict[str, Any]) -> Tensor:
    model, optimizer = built(rank, **options)
    train(model, optimizer, range(3), accumulate=2)
    before = model.require_backward_grad_sync
    with model.no_sync():  # what is inside no_sync is inside of it afterwards
        grow(model, optimizer)
        assert not model.require_backward_grad_sync
    assert model.require_backward_grad_sync == before
    train(model, optimizer, range(3, 6), accumulate=2)
    return values(*model.parameters())


@pytest.mark.parametrize("options", [pytest.param({}, marks=MANY), {"gradient_as_bucket_view": True}])
def test_no_sync_goes_on(options: dict[str, Any]) -> None:
    weights = expected(grow, accumulate=2)
    for found in on_ranks(2, accumulating, options):
        assert float((found - weights).abs().max()) <= 1e-6


class WithBuffers(nn.Module):
    """Batch norm in its blocks, and one block that DDP is told to leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def buffers(rank: int, broadcast: bool) -> list[float]:
    model, optimizer = built(rank, WithBuffers, broadcast_buffers=broadcast)
    train(model, optimizer, range(3))
    ax.grow(model, ONE_MORE, optimizer, probe=PROBE) if optimizer.zero_grad() is None else None
    assert model.broadcast_buffers is broadcast and len(model.modules_buffers) == 9
    train(model, optimizer, range(3, 5))
    with torch.no_grad():
        model(PROBE)  # sends the buffers of rank 0 before it runs, if it sends any
        model.eval()(PROBE)
    return [float(block[1].running_mean.sum()) for block in model.module.blocks]


@pytest.mark.parametrize("broadcast", [True, pytest.param(False, marks=MANY)])
def test_buffers_are_sent_as_they_were(broadcast: bool) -> None:
    first, second = on_ranks(2, buffers, broadcast)
    assert len(first) == 3 and [a == b for a, b in zip(first, second, strict=True)] == [broadcast] * 3


def left_alone(rank: int) -> list[bool]:
    torch.manual_seed(rank)
    inner = Net(depth=2)
    names = [f"blocks.1.{name}" for name, _ in inner.blocks[1].named_parameters()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, names)
    model = nn.parallel.DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(4):
        if step == 2:
            optimizer.zero_grad()
            ax.grow(model, ax.Duplicate("blocks", by=1, order=[0, 0, 1]), optimizer, probe=PROBE)
        train_step(model, optimizer, *share(step, rank, 2))
    assert model.parameters_to_ignore == {name.replace("blocks.1", "blocks.2") for name in names}
    alike = []
    for block in inner.blocks:
        ours = values(*block.parameters())
        theirs = [torch.empty_like(ours) for _ in range(2)]
        dist.all_gather(theirs, ours)
        alike.append(torch.equal(*theirs))
    return alike


@MANY
def test_parameters_that_ddp_ignores_are_the_same_ones() -> None:
    assert on_ranks(2, left_alone) == [[True, True, False]] * 2


# ---- undo, trial, surgery, freezing


def grower_of(model: Any, optimizer: Any, **options: Any) -> ax.Grower:
    given = {"edits": ONE_MORE, "when": lambda reading: False, "probe": PROBE, **options}
    return ax.Grower(model, optimizer, **given)


def without_a_step(rank: int, to_none: bool) -> Tensor:
    model, optimizer = built(rank, gradient_as_bucket_view=True)
    grower = grower_of(model, optimizer)
    train(model, optimizer, range(3))
    gradients = [p.grad for p in model.parameters()]
    for _ in range(2):
        grower.grow(ONE_MORE)
        grower.undo()
        assert all(p.grad is grad for p, grad in zip(model.parameters(), gradients, strict=True))
    grower.grow(ONE_MORE)
    for step in range(3, 6):
        optimizer.zero_grad(set_to_none=to_none)
        x, y = share(step, rank, 2)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return values(*model.parameters())


@pytest.mark.parametrize("to_none", [False, pytest.param(True, marks=MANY)])
def test_gradients_that_are_views_of_buckets_stay_used(to_none: bool) -> None:
    weights = expected(grow)
    for found in on_ranks(2, without_a_step, to_none):
        assert float((found - weights).abs().max()) <= 1e-6


def there_and_back(rank: int, way: str) -> Tensor:
    model, optimizer = built(rank)
    grower = grower_of(model, optimizer, keep=way == "snapshot")
    train(model, optimizer, range(3))
    reducer = model.reducer
    if way == "undo":
        grower.grow(ONE_MORE)
        optimizer.zero_grad()
        model(share(9, rank, 2)[0]).sum().backward()  # through the new reducer, without a step
        optimizer.zero_grad()
        grower.undo()
    elif way == "snapshot":
        grower.grow(ONE_MORE)
        train(model, optimizer, range(20, 23))
        grower.undo()
    elif way == "trial":
        with grower.trial(ONE_MORE):
            train(model, optimizer, range(20, 23))
    elif way == "refused":
        grower.on_growth = lambda change: 1 // (1 - rank)
        with pytest.raises((ZeroDivisionError, ax.GrowthError)):
            grower.grow(ONE_MORE)
    assert model.reducer is reducer and len(model.module.blocks) == 1
    train(model, optimizer, range(3, 6))
    return values(*model.parameters())


@pytest.mark.parametrize(
    "way", ["undo", "refused", pytest.param("snapshot", marks=MANY), pytest.param("trial", marks=MANY)]
)
def test_after_a_way_back_all_is_as_if_it_had_not_been(way: str) -> None:
    never = on_ranks(2, there_and_back, "never")
    for found in on_ranks(2, there_and_back, way):
        assert torch.equal(found, never[0])


def operated(rank: int) -> Tensor:
    model, optimizer = built(rank)
    grower = grower_of(model, optimizer)
    train(model, optimizer, range(3))
    with grower.surgery():
        block = Block(8)
        block.down.requires_grad_(True).weight.data.zero_()
        block.down.bias.data.zero_()
        model.module.blocks.append(block)
    train(model, optimizer, range(3, 6))
    ax.verify(model, optimizer)
    return values(*model.parameters())


def test_surgery_is_synchronised() -> None:
    first, second = on_ranks(2, operated)
    assert torch.equal(first, second)


def widen(model: Any) -> None:
    inner = getattr(model, "module", model)
    for block in inner.blocks:
        up, down = block.up, block.down
        up.weight.data = torch.cat([up.weight.data, torch.full((3, 8), 0.1)])
        up.bias.data = torch.cat([up.bias.data, torch.full((3,), 0.1)])
        down.weight.data = torch.cat([down.weight.data, torch.zeros(8, 3)], 1)


def widened(rank: int, way: str) -> Any:
    model, optimizer = built(rank)
    grower = grower_of(model, optimizer)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    if way == "trial":
        with grower.trial(None):
            with grower.surgery():
                widen(model)
            train(model, optimizer, range(20, 22))
    elif way == "refused":
        grower.on_growth = lambda change: 1 // (1 - rank)
        with pytest.raises((ZeroDivisionError, ax.GrowthError)), grower.surgery():
            widen(model)
    else:
        with grower.surgery():
            widen(model)
    train(model, optimizer, range(3, 6))
    return values(*model.parameters())


def widened_alone(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    with ax.surgery(model, optimizer):
        widen(model)


@pytest.mark.parametrize("way", ["surgery", pytest.param("trial", marks=MANY), pytest.param("refused", marks=MANY)])
def test_tensors_of_another_shape_are_synchronised(way: str) -> None:
    weights = expected(widened_alone if way == "surgery" else lambda model, optimizer: None)
    for found in on_ranks(2, widened, way):
        assert float((found - weights).abs().max()) <= 1e-6


def frozen(rank: int) -> Tensor:
    model, optimizer = built(rank)
    grower = grower_of(model, optimizer)
    train(model, optimizer, range(2))
    grower.grow(ONE_MORE)
    grower.freeze_old()
    train(model, optimizer, range(2, 4))
    grower.grow(ONE_MORE)
    train(model, optimizer, range(4, 6))
    grower.undo() if grower.rollback.held else None
    grower.freeze_old(on=False)
    train(model, optimizer, range(6, 8))
    return values(*model.parameters())


def test_freezing_and_thawing_are_synchronised() -> None:
    first, second = on_ranks(2, frozen)
    assert torch.equal(first, second)


# ---- with much around it


def amp_and_one_cycle(rank: int) -> None:
    """Scenario: Adam, OneCycleLR, a scaler and an average, a layer in the middle of it all."""
    model, _ = built(rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=40)
    scaler = torch.amp.GradScaler("cpu")
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    grower = ax.Grower(
        model, optimizer, schedule, scaler, average, edits=ONE_MORE, when=ax.when.at([5, 12]), probe=PROBE
    )
    for step in range(20):
        x, y = share(step, rank, 2)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        average.update_parameters(model)
        old = [(p, {k: v.clone() for k, v in optimizer.state[p].items()}) for p in model.parameters()]
        before = scaler.state_dict(), schedule.get_last_lr()
        change = grower.step(loss.item())
        assert (change is not None) == (step in (4, 11))
        assert (scaler.state_dict(), schedule.get_last_lr()) == before
        assert all(torch.equal(v, optimizer.state[p][k]) for p, state in old for k, v in state.items())
        assert_ranks_equal(model, step)
        assert_ranks_equal(average.module, step)
    assert len(average.module.module.blocks) == 3
    ax.verify(model, optimizer, schedule, average)
    average(PROBE)


def test_adam_one_cycle_scaler_and_average() -> None:
    on_ranks(2, amp_and_one_cycle)


def refused_kinds(rank: int) -> list[str]:
    texts = []
    for spoil in ("mixed", "fused", "other"):
        model, optimizer = built(rank)
        if spoil == "mixed":
            model.mixed_precision = object()
        if spoil == "fused":
            next(model.parameters())._in_backward_optimizers = []
        with pytest.raises(ax.GrowthError) as error:
            if spoil == "other":
                ax.grow(Net(), ONE_MORE, model, probe=PROBE)
            else:
                ax.grow(model, ONE_MORE, optimizer, probe=PROBE)
        texts.append(str(error.value))
    return texts


@MANY
def test_kinds_of_ddp_that_cannot_be_built_anew() -> None:
    for mixed, fused, other in on_ranks(2, refused_kinds):
        assert "mixed_precision=" in mixed and "Grow at a checkpoint" in mixed
        assert "an optimizer inside the backward pass" in fused
        assert "wraps another Net" in other


def many_ranks(rank: int, way: str) -> Tensor:
    """Four ranks sum in an order that depends on the buckets: the way back leads to the old ones."""
    model, optimizer = built(rank)
    grower = grower_of(model, optimizer, keep=way == "snapshot")
    train(model, optimizer, range(4))
    if way != "never":
        grower.grow(ONE_MORE)
        if way == "snapshot":
            train(model, optimizer, range(20, 22))
        grower.undo()
    train(model, optimizer, range(4, 8))
    return values(*model.parameters())


@MANY
def test_four_ranks_come_back_to_the_bit() -> None:
    never = on_ranks(4, many_ranks, "never", timeout=200)
    for way in ("undo", "snapshot"):
        assert all(torch.equal(found, never[0]) for found in on_ranks(4, many_ranks, way, timeout=200))
