"""Carries out one run."""

import copy
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from no_size_search_larger import CASES, Case, judged
from settings import Run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import auxin as ax
from auxin.demo.demand import load_demand
from auxin.demo.forecaster import Dilated
from auxin.ledger import flops_of

CURVE = 20  # points of a training curve
KEPT = 7  # old networks


class Learner:
    """A network in training: what a stage of a run begins with and leaves behind.

    Args:
        run: it.
        case: task.
    """

    def __init__(self, run: Run, case: Case):
        self.run, self.case = run, case
        self.device = torch.device(run["device"])
        torch.manual_seed(run["seed"])
        dropout = {"dropout": run["dropout"]} if run["dropout"] else {}
        self.model = case.build(run["width"], run["depth"], **dropout).to(self.device)
        if run["compile"]:
            for block in self.model.blocks:
                block.compile()
        self.batches = case.train(run["seed"])
        self.probe = self.batch(-1)[0][:1]
        self.steps, self.spent = 0, 0.0
        self.past: list[tuple[int, float]] = []
        self.seconds = {"training": 0.0, "first steps": 0.0, "growing": 0.0}
        self.new_optimizer()

    def new_optimizer(self) -> None:
        """With nothing in it yet; it is warmed up."""
        run = self.run
        self.born = self.steps
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=0.0,
            betas=tuple(run["betas"]),
            weight_decay=run["weight_decay"],
            fused=run.get("fused", False),
        )

    def branch(self, run: Run) -> "Learner":
        """A copy that goes on by another run, for stages that runs have in common."""
        other = copy.copy(self)
        other.run, other.seconds = run, dict(self.seconds)
        other.model, other.optimizer = copy.deepcopy((self.model, self.optimizer))
        return other

    def batch(self, number: int) -> Any:
        """Every run of a seed has the same batch at the same step."""
        return _moved(self.batches[number] if number >= 0 else self.case.train(1 << 20)[0], self.device)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """In the precision of the run."""
        half = self.run["precision"] == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return self.case.loss(model, batch)

    def cost(self) -> float:
        """FLOPs of a training step; those of compiled blocks can only be counted on a copy, which is not compiled."""
        model = copy.deepcopy(self.model) if self.run["compile"] else self.model
        return flops_of(model, self.loss, self.batch(-1))

    def grow(self, stage: dict[str, Any]) -> None:
        """As the stage says; the FLOPs of the checks are spent."""
        started = self.clock()
        with FlopCounterMode(display=False) as counter:
            ax.grow(
                self.model,
                edits_of(stage["edit"], self.run["width"]),
                self.optimizer,
                probe=self.probe,
                seed=self.run["seed"],
                rewarm=stage.get("rewarm", 0),
            )
        self.spent += counter.get_total_flops()
        self.seconds["growing"] += self.clock() - started

    def train(self, until: float, rate: Callable[[float], float], curve: list[list[float]]) -> bool:
        """Take the steps that there are FLOPs for, at ``rate`` of what is spent. Returns whether the loss is finite."""
        cost = self.cost()
        count = int((until - self.spent) / cost)
        torch.manual_seed(self.run["seed"] * 1_000_003 + self.steps)  # of dropout
        began, noted = self.clock(), []
        for number in range(count):
            loss = self.step(rate(self.spent))
            self.spent += cost
            noted.append(loss.detach())
            if number == 0:
                self.seconds["first steps"] += self.clock() - began
                began = self.clock()
            if number == count - 1 or (number + 1) % max(1, count // CURVE) == 0:
                mean = float(torch.stack(noted).mean())
                noted.clear()
                if not math.isfinite(mean):
                    return False
                curve.append([self.spent, mean])
        self.optimizer.zero_grad()
        self.seconds["training"] += self.clock() - began
        return True

    def step(self, rate: float) -> torch.Tensor:
        """One, warmed up; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.steps - self.born + 1) / self.run["warmup"])
        loss = self.loss(self.model, self.batch(self.steps))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run["clip"])
        self.optimizer.step()
        self.steps += 1
        return loss

    def clock(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def judged(self, batches: list[Any]) -> float:
        """Mean loss."""
        model = copy.deepcopy(self.model) if self.run["compile"] else self.model
        return judged(model, self.loss, [_moved(batch, self.device) for batch in batches])


class Watch(list[list[float]]):
    """A curve that also keeps the steps and the validation loss of its learner.

    Args:
        learner: it.
    """

    def __init__(self, learner: Learner):
        super().__init__()
        self.learner = learner

    def append(self, point: list[float]) -> None:
        """When a point is added."""
        super().append(point)
        self.learner.past.append((self.learner.steps, self.learner.judged(self.learner.case.validation)))


class Trainer:
    """Carries out runs, and keeps the last networks that several of them begin with.

    Args:
        site: folder with the packages that data come from.
        watched: look at the validation loss of networks that runs begin with, as they are trained.
    """

    def __init__(self, site: Path, watched: bool = False):
        self.site, self.watched = site, watched
        self._begun: dict[str, Learner] = {}
        self._cases: dict[str, Case] = {}

    def case(self, task: dict[str, Any]) -> Case:
        """Of a configuration."""
        if repr(task) not in self._cases:
            words = {name: value for name, value in task.items() if name != "name"}
            self._cases[repr(task)] = CASES[task["name"]](self.site, **words)
        return self._cases[repr(task)]

    def unit(self, run: Run, steps: int) -> float:
        """FLOPs of so many steps of the network that a run begins with."""
        return steps * Learner({**run, "compile": False}, self.case(run["task"])).cost()

    def carry_out(self, run: Run) -> dict[str, Any]:
        """Validation loss (None: it diverged), test loss where the run is to be reported, curve and costs."""
        curve: list[list[float]] = []
        stages = run["stages"]
        learner, fixed = self.begun(run), _fixed(run)
        begin, end = learner.spent, sum(stage["flops"] for stage in stages)

        def falling(spent: float) -> float:
            left = 1 - (spent - begin) / (end - begin)
            return run["rate"] * (min(1.0, left / run["decay"]) if run["decay"] else 1.0)

        until, fine = sum(stage["flops"] for stage in stages[:fixed]), True
        for stage in stages[fixed:]:
            until += stage["flops"]
            fine = fine and self._stage(learner, stage, until, falling, curve)
        result = {"validation": None, "test": None}
        if fine:
            result["validation"] = learner.judged(learner.case.validation)
            result["test"] = learner.judged(learner.case.test) if run["test"] else None
        return {
            **result,
            "flops": learner.spent,
            "steps": learner.steps,
            "parameters": sum(p.numel() for p in learner.model.parameters()),
            "blocks": len(learner.model.blocks),
            "seconds": {name: round(value, 3) for name, value in learner.seconds.items()},
            "curve": [[round(flops), round(loss, 5)] for flops, loss in curve],
        }

    def begun(self, run: Run) -> Learner:
        """The learner behind the stages whose rate is not swept: they are the same for many runs."""
        fixed = _fixed(run)
        if not fixed:
            return Learner(run, self.case(run["task"]))
        own = {"rate": 0.0, "decay": 0.0, "dropout": 0.0, "weight_decay": run["stages"][0]["weight_decay"]}
        common = {**run, **own, "stages": run["stages"][:fixed]}
        if repr(common) not in self._begun:
            learner, until = Learner(common, self.case(run["task"])), 0.0
            for stage in common["stages"]:
                until += stage["flops"]
                curve = Watch(learner) if self.watched else []
                self._stage(learner, stage, until, functools.partial(_constant, stage["rate"]), curve)
            self._begun = {**dict([*self._begun.items()][-KEPT:]), repr(common): learner}
        learner = self._begun[repr(common)].branch(run)
        for group in learner.optimizer.param_groups:
            group["weight_decay"] = run["weight_decay"]
        return learner

    def _stage(
        self,
        learner: Learner,
        stage: dict[str, Any],
        until: float,
        rate: Callable[[float], float],
        curve: list[list[float]],
    ) -> bool:
        if "edit" in stage:
            learner.grow(stage)
        if stage.get("fresh"):
            learner.new_optimizer()
        return learner.train(until, rate, curve)


def _fixed(run: Run) -> int:
    """How many stages, from the first one, have a rate of their own."""
    stages = run["stages"]
    return next((n for n, stage in enumerate(stages) if "rate" not in stage), len(stages))


def dilated(width: int, index: int) -> Dilated:
    """The next block of a forecaster."""
    return Dilated(width, 2**index)


LAYERS = {"dilated": dilated}


def edit_of(words: dict[str, Any], width: int) -> Any:
    """``{do = "Duplicate", at = "blocks", by = 6}`` as an edit; ``layer`` names one of LAYERS."""
    words = {name: tuple(value) if isinstance(value, list) else value for name, value in words.items()}
    if "layer" in words:
        words["layer"] = functools.partial(LAYERS[words["layer"]], width)
    return getattr(ax, words.pop("do"))(**words)


def edits_of(several: list[dict[str, Any]], width: int) -> Any:
    """One growth: an edit, or a list of them."""
    edits = [edit_of(words, width) for words in several]
    return edits if len(edits) > 1 else edits[0]


def _constant(rate: float, spent: float) -> float:
    return rate


def naive(task: dict[str, Any]) -> tuple[str, float] | None:
    """A forecast that learns nothing, and its test loss, where there is one."""
    if task["name"] != "demand":
        return None
    test = load_demand().test
    return "as a day ago", test.error(test.as_a_day_ago())


def _moved(batch: Any, device: torch.device) -> Any:
    return tuple(part.to(device, non_blocking=True) for part in batch)
