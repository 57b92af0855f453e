"""Averages and schedules of other packages through everything that a run does to them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scenarios"))
from growing import Block, Net, batch, train
from optimizer_trial import EDIT, WARM, Cell, Wrong, cell
from their_averages import AVERAGES
from their_schedules import SCHEDULES
from torch.optim.lr_scheduler import LRScheduler

import auxin as ax

GROW = {"edits": EDIT, "when": ax.when.every(10**9), "probe": batch()[0]}


class Hung:
    """A run with one companion beside its optimizer."""

    def __init__(self, name: str, warm: int = WARM):
        torch.manual_seed(0)
        self.model, self.number = Net(), 0
        self.is_average = name in AVERAGES
        if self.is_average:
            build, self._step, self._held = AVERAGES[name]
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
            self.one = build(self.model)
        else:
            build, self._step = SCHEDULES[name]
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
            self.one = build(self.optimizer)
            if not isinstance(self.one, LRScheduler):
                ax.follow(type(self.one), like=LRScheduler)
        self.companions = [self.optimizer, self.one]
        self.go_on(warm)

    def go_on(self, count: int = 3) -> list[list[float]]:
        """Some steps; the learning rates after each."""
        seen = []
        for _ in range(count):
            train(self.model, self.optimizer, seed=self.number)
            self.number += 1
            self._step(self.one, self.model if self.is_average else self.number)
            seen.append([float(group["lr"]) for group in self.optimizer.param_groups])
        return seen

    def grow(self, edit: Any = EDIT, **words: Any) -> Any:
        return ax.grow(self.model, edit, *self.companions, probe=batch()[0], **words)

    def values(self) -> list[torch.Tensor]:
        return [t.detach().clone() for t in self._held(self.one)] if self.is_average else []

    def check(self) -> None:
        """What an average holds has the shapes of the network."""
        if self.is_average and [v.shape for v in self.values()] != [p.shape for p in self.model.parameters()]:
            raise Wrong("the average has other tensors than the network")


def same(ours: Any, theirs: Any, what: str) -> None:
    if len(ours) != len(theirs) or not all(map(torch.equal, ours, theirs)):
        raise Wrong(what)


def grow(name: str) -> str:
    run, twin = Hung(name), Hung(name)
    old = run.values()
    run.grow()
    run.check()
    ax.verify(run.model, *run.companions)
    kept = [t for t in run.values() if any(t.shape == o.shape and torch.equal(t, o) for o in old)]
    if len(kept) < len(old):
        raise Wrong("an old average has changed")
    if run.go_on() != twin.go_on():
        raise Wrong("other rates than without the growth")
    return ""


def wider(name: str) -> str:
    run, twin = Hung(name), Hung(name)
    old = run.values()
    run.grow(ax.Widen("blocks.*.up", by=8, init="zero"))
    run.check()
    for now, was in zip(run.values(), old, strict=True):
        same([now[tuple(map(slice, was.shape))]], [was], "an old average has changed")
    if run.go_on() != twin.go_on():
        raise Wrong("other rates than without the growth")
    return ""


def rates(name: str) -> str:
    """Half the rate of the others in a group of its own, all along; averages have none."""
    if name in AVERAGES:
        return "it has no rates"
    run, twin = Hung(name), Hung(name)
    donor = run.optimizer.param_groups[0]
    run.grow(group={"lr": float(donor.get("initial_lr", donor["lr"])) / 2})
    for ours, theirs in zip(run.go_on(12), twin.go_on(12), strict=True):
        if ours[:1] != theirs or abs(ours[1] - ours[0] / 2) > 1e-6 * ours[0]:
            raise Wrong(f"rates {ours}, without a growth {theirs}")
    return ""


def save_and_load(name: str, directory: Path) -> str:
    run = Hung(name)
    grower = ax.Grower(run.model, *run.companions, **GROW)
    grower.grow(EDIT)
    run.go_on(2)
    ax.save(grower, directory)
    rates = run.go_on()
    torch.save((run.number, rates, [*run.values(), *map(torch.clone, run.model.parameters())]), directory / "wanted.pt")
    return "saved"


def loaded(name: str, directory: Path) -> str:
    """The other half, in another process."""
    number, rates, wanted = torch.load(directory / "wanted.pt")
    run = Hung(name, warm=0)
    ax.load(directory, ax.Grower(run.model, *run.companions, **GROW))
    run.number = number - 3
    if run.go_on() != rates:
        raise Wrong("other rates from a checkpoint")
    same([*run.values(), *run.model.parameters()], wanted, "goes on otherwise from a checkpoint")
    return ""


def undo(name: str) -> str:
    run, twin = Hung(name), Hung(name)
    grower = ax.Grower(run.model, *run.companions, **GROW)
    grower.grow(EDIT)
    grower.undo()
    same(run.values(), twin.values(), "undo leaves another average")
    if run.go_on() != twin.go_on():
        raise Wrong("other rates after undo")
    same(run.values(), twin.values(), "goes on otherwise after undo")
    return ""


def surgery(name: str) -> str:
    run, twin = Hung(name), Hung(name)
    with ax.surgery(run.model, *run.companions):
        run.model.blocks.append(Block())
    run.check()
    if run.go_on() != twin.go_on():
        raise Wrong("other rates than without it")
    return ""


PARTS = {
    "grow": grow,
    "wider": wider,
    "rates": rates,
    "save, load": save_and_load,
    "undo": undo,
    "surgery": surgery,
}


def trial(name: str, directory: Path) -> dict[str, Cell]:
    """All columns of an average or a schedule."""
    torch.set_num_threads(1)
    return {column: cell(part, name, *([directory] if part is save_and_load else [])) for column, part in PARTS.items()}
