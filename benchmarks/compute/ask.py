"""Asks ``auxin.verdict`` before the ends are known, and tells whether it names the plan that won."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from settings import Config, Row
from training import Learner, Trainer, edits_of

import auxin as ax


@dataclass(frozen=True)
class Plans:
    """The rows that a verdict judges: one that goes on, one that grows, one that starts anew.

    Attributes:
        go_on, grow, anew: rows.
    """

    go_on: Row
    grow: Row
    anew: Row

    @classmethod
    def of(cls, config: Config) -> "Plans":
        """By what their stages do; the rows among ``plans``."""
        rows = [config.row(name) for name in config.plans]
        grow = next(row for row in rows if any("edit" in stage for stage in row.stages))
        anew = next(row for row in rows if "rate" not in row.stages[0])
        return cls(next(row for row in rows if row not in (grow, anew)), grow, anew)


def asked(config: Config, trainer: Trainer, budget: float, seed: int, unit: float) -> dict[str, Any]:
    """What the verdict says of one budget and one seed: the name of a row or "no difference", and its price."""
    plans, settings = Plans.of(config), config.first_settings()
    run = config.run(plans.go_on, budget, settings, seed, unit)
    old = trainer.begun(run)
    stage, rate = plans.grow.stages[-1], run["stages"][0]["rate"]
    for group in old.optimizer.param_groups:
        group["lr"] = rate

    def anew() -> tuple[Any, Any]:
        learner = Learner({**run, "depth": plans.anew.depth}, old.case)
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        return learner.model, learner.optimizer

    told = ax.verdict(
        old.model,
        old.optimizer,
        budget=unit * budget,
        evidence=ax.Evidence(old.loss, old.batches, validation=old.case.validation),
        edits=[edits_of(stage["edit"], plans.grow.width)],
        anew=anew,
        history=old.past or None,
        rewarm=stage.get("rewarm", 0),
    )
    names = {"go on": plans.go_on.name, "grow": plans.grow.name, "start anew": plans.anew.name}
    return {"winner": names.get(told.winner, told.winner), "price": told.price / told.budget, "sure": told.sure}


def line(budget: float, truth: tuple[str, bool], told: Mapping[int, dict[str, Any]]) -> str:
    """One budget: what won, and what was said of it, seed by seed."""
    name, sure = truth
    right = [one["winner"] == (name if sure else "no difference") for one in told.values()]
    said = ", ".join(one["winner"] for one in told.values())
    price = max(one["price"] for one in told.values())
    won = name if sure else f"no difference ({name} lowest)"
    return f"  budget {budget:<6g} won: {won:<36} right {sum(right)} of {len(right)}, price {price:.1%} at most: {said}"
