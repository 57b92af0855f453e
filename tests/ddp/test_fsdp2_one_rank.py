"""Under FSDP2, what raises or differs on one rank alone is the same GrowthError on all, long before any timeout."""

import dataclasses
import functools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from ranked import Block, Net, share, train_step
from test_fsdp2 import adam, held
from torch import Tensor, nn
from under_fsdp import PROBE, built, same, set_up, shards

import auxin as ax

EDITS = [ax.Duplicate("blocks", by=1), ax.Widen("blocks.0.up", by=3), ax.After("blocks.0.down")]
SPOIL: set[str] = set()  # what goes wrong on this rank


def spoiled(kind: str) -> bool:
    """Raise where this rank is the one."""
    if kind in SPOIL:
        raise ZeroDivisionError(f"{kind} of one rank")
    return False


class Fragile(Net):
    """Forwards that one rank may not come through: of the network, between two units, of what is new."""

    def forward(self, x: Tensor) -> Tensor:
        spoiled("forward")
        x = self.inp(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0:
                spoiled("between units")
            if len(self.blocks) > 2 or self.blocks[0].up.out_features > 16 or hasattr(self.blocks[0].down, "_grown"):
                spoiled("grown forward")
        return self.out(Backward.apply(x))


class Backward(torch.autograd.Function):
    """A backward that one rank may not come through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        spoiled("backward")
        return grad


@dataclasses.dataclass(eq=False)
class Mirror:
    """A companion with a follower of its own."""

    changes: int = 0


@ax.follow(Mirror)
def follow_mirror(mirror: Mirror, change: Any) -> Iterator[None]:
    spoiled("check")
    yield
    spoiled("follow")
    mirror.changes += 1
    try:
        yield
    except BaseException:
        mirror.changes -= 1
        raise


def layer() -> nn.Module:
    spoiled("layer")
    return Block(8)


def probe() -> Tensor:
    spoiled("probe")
    return PROBE


def trigger(reading: Any) -> bool:
    return spoiled("trigger") or True


def choose(edits: list[Any], grower: Any) -> Any:
    spoiled("chooser")
    return edits[0]


def proposed(edit: Any, model: nn.Module) -> list[Any]:
    spoiled("edits")
    return [edit]


def grown(change: Any) -> None:
    spoiled("on_growth")


Call = Callable[[Any, Any], Any]


def step_of(edit: Any, metric: bool = True, **words: Any) -> Call:
    def call(model: Any, optimizer: Any) -> Any:
        options = {"edits": functools.partial(proposed, edit), "when": trigger, "choose": choose, "probe": probe}
        later = set(SPOIL)
        SPOIL.clear()  # a Grower that one rank cannot build is no affair of the others
        grower = ax.Grower(model, optimizer, Mirror(), on_growth=grown, **{**options, **words})
        SPOIL.update(later)
        return grower.step("no number" if "reading" in SPOIL else 1.0) if metric else grower.grow(edit)

    return call


def differing(edit: Any) -> dict[str, Call]:
    """What is given otherwise on the one rank."""
    other = ax.Duplicate("blocks", by=2) if isinstance(edit, ax.Duplicate) else ax.Duplicate("blocks", by=1)

    def one(kind: str, mine: Any, theirs: Any) -> Any:
        return mine if kind in SPOIL else theirs

    def scheduled(model: Any, optimizer: Any) -> Any:
        schedules = [torch.optim.lr_scheduler.ConstantLR(optimizer)] * bool(SPOIL)
        return ax.grow(model, edit, adam(model) if "scheduler" in SPOIL else optimizer, *schedules, probe=PROBE)

    return {
        "edit": lambda model, optimizer: ax.grow(model, one("edit", other, edit), optimizer, probe=PROBE),
        "seed": lambda model, optimizer: ax.grow(model, edit, optimizer, probe=PROBE, seed=one("seed", 1, 2)),
        "rewarm": lambda model, optimizer: ax.grow(model, edit, optimizer, probe=PROBE, rewarm=one("rewarm", 3, 0)),
        "shape": lambda model, optimizer: ax.grow(model, edit, optimizer, probe=one("shape", PROBE[:3], PROBE)),
        "scheduler": scheduled,
        "limit": lambda model, optimizer: step_of(edit, limit=ax.Limit(growths=one("limit", 0, 3)))(model, optimizer),
        "accumulated": lambda model, optimizer: accumulated(edit, model, optimizer),
    }


def accumulated(edit: Any, model: Any, optimizer: Any) -> Any:
    """One rank has a gradient that no step has used."""
    p = model.inp.weight
    if "accumulated" in SPOIL:
        p.grad = torch.ones_like(p)
    try:
        return ax.grow(model, edit, optimizer, probe=PROBE)
    finally:
        p.grad = None


RAISING = ("forward", "between units", "grown forward", "backward", "check", "follow", "probe", "trigger", "chooser")
RAISING = (*RAISING, "edits", "on_growth", "reading")


def kinds(edit: Any) -> dict[str, Call]:
    inserted = ax.Insert("blocks", layer)
    return {**dict.fromkeys(RAISING, step_of(edit)), "layer": step_of(inserted, metric=False), **differing(edit)}


def fails(kind: str, edit: Any, who: int, model: Any, optimizer: Any, rank: int) -> tuple[str, float]:
    """The text on this rank, and the seconds; the network and the optimizer are as they were."""
    before, moments, names = shards(model), held(optimizer), [n for n, _ in model.named_parameters()]
    SPOIL.update({kind} if rank == who else ())
    started = time.perf_counter()
    try:
        with pytest.raises((ax.GrowthError, ZeroDivisionError)) as error:
            kinds(edit)[kind](model, optimizer)
    finally:
        SPOIL.clear()
    seconds = time.perf_counter() - started
    optimizer.zero_grad()
    assert names == [n for n, _ in model.named_parameters()], kind
    assert same(before, shards(model)) and same(moments, held(optimizer)), kind
    return f"{type(error.value).__name__}: {error.value}", seconds


def every_kind(rank: int, size: int) -> dict[str, tuple[str, float]]:
    model = built(build=Fragile)
    optimizer = adam(model)
    train_step(model, optimizer, *share(0, rank, size))
    optimizer.zero_grad()
    found = {}
    for number, kind in enumerate(kinds(EDITS[0])):
        edit = EDITS[number % 2]
        found[kind] = fails(kind, edit, size - 1, model, optimizer, rank)
    train_step(model, optimizer, *share(1, rank, size))
    set_up(model)
    optimizer.zero_grad()
    for edit in EDITS:
        ax.grow(model, edit, optimizer, probe=PROBE)
    return found


def test_what_goes_wrong_on_one_rank_is_told_on_all() -> None:
    found = on_ranks(2, every_kind, 2, timeout=300, patience=120)
    assert len(found[0]) >= 15
    print(f"{len(found[0])} kinds, at most {max(s for one in found for _, s in one.values()):.1f} s")
    for kind, (text, _) in found[0].items():
        assert "did not come within" not in text, (kind, text)
        assert "GrowthError" in text or "BadMoment" in text or "on_growth" in text, (kind, text)
        assert "rank 1" in text, (kind, text)
        if kind in RAISING and kind != "reading":
            assert f"{kind} of one rank" in text, (kind, text)


def at_random(rank: int, size: int, runs: int) -> list[float]:
    chance = random.Random(0)
    model = built(build=Fragile)
    optimizer = adam(model)
    took = []
    for run in range(runs):
        train_step(model, optimizer, *share(run, rank, size))
        optimizer.zero_grad()
        kind, edit, who = chance.choice(list(kinds(EDITS[0]))), chance.choice(EDITS), chance.randrange(size)
        text, seconds = fails(kind, edit, who, model, optimizer, rank)
        assert "did not come within" not in text, (run, kind, text)
        took.append(seconds)
        dist.barrier()
    return took


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_two_hundred_runs_in_which_one_rank_fails_somewhere(size: int) -> None:
    found = on_ranks(size, at_random, size, 200, timeout=850, patience=120)
    print(f"{size} ranks: {len(found[0])} runs, at most {max(map(max, found)):.1f} s")
