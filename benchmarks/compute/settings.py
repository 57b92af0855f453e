"""What a configuration says, as the runs that it asks for: plain data, by which a run is known."""

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWEPT = ("rate", "dropout", "weight_decay")
ROW = {"name", "depth", "width", "budgets", "stages", "decay", "tune_at", "settings_of", "fixed"}
STAGE = {"flops", "rate", "weight_decay", "edit", "fresh", "rewarm"}

Run = dict[str, Any]


class BadSetting(ValueError):
    """The configuration does not fit together."""


@dataclass(frozen=True)
class Row:
    """A way to spend compute.

    Attributes:
        name: in the tables.
        depth: blocks to begin with.
        width: of the network.
        budgets: that it is tried at, in units.
        stages: in order; of each ``flops`` = (a, c), which is a + c times the budget, in units; ``rate``, constant, and
            ``weight_decay`` of an old network, where they are not swept; ``edit``, with which the stage begins;
            ``fresh``, whether the optimizer is a new one then; ``rewarm``, as ``auxin.grow`` has it.
        decay: last part of the FLOPs with swept rates over which the rate falls in a line to 0.
        tune_at: the budget whose sweep serves all; None: each has its own.
        settings_of: the row whose settings it takes over, instead of being swept.
        fixed: whether it is one of the fixed sizes of which the best is chosen in hindsight.
    """

    name: str
    depth: int
    width: int
    budgets: tuple[float, ...]
    stages: tuple[dict[str, Any], ...]
    decay: float
    tune_at: float | None = None
    settings_of: str | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Config:
    """One scale.

    Attributes:
        title: of the tables.
        task: name and arguments of a task, and of what is printed of it: ``bits``.
        unit: FLOPs of ``steps`` training steps at ``depth`` are one unit of budget.
        training: ``warmup`` (steps of every new optimizer), ``betas``, ``clip``, ``device``, ``precision``,
            ``compile``, ``fused`` (AdamW).
        sweep: values of ``rate``, ``dropout``, ``weight_decay``, the same for every row, tried one after another;
            ``extend``, how often another rate is tried beyond an end of the sweep that was best; and ``seeds``.
        seeds: of the runs that are reported.
        rows: in the order of the tables.
        reference: the row that others are compared with, seed by seed.
        plans: rows among which one could decide beforehand; the table says which was best.
        savings: ``target``, a row, at ``budget``; ``within``, how much higher its loss may be; ``rows``.
        gains: each of a row, ``of``, over others, ``over``, at a ``budget``: much depends on whom one compares with.
    """

    title: str
    task: dict[str, Any]
    unit: dict[str, int]
    training: dict[str, Any]
    sweep: dict[str, Any]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    reference: str
    plans: tuple[str, ...] = ()
    savings: dict[str, Any] | None = None
    gains: tuple[dict[str, Any], ...] = ()

    def row(self, name: str) -> Row:
        """By its name."""
        return next(row for row in self.rows if row.name == name)

    def first_settings(self) -> dict[str, float]:
        """Those that the sweep begins with."""
        return {name: self.sweep[name][0] for name in SWEPT}

    def run(self, row: Row, budget: float, settings: dict[str, float], seed: int, unit: float) -> Run:
        """One run, to the last of its settings. What is not here has no influence on it."""
        stages = []
        for stage in row.stages:
            constant, per_budget = stage["flops"]
            rest = {name: value for name, value in stage.items() if name != "flops"}
            stages.append({"flops": unit * (constant + per_budget * budget), **rest})
        return {
            "task": {name: value for name, value in self.task.items() if name != "bits"},
            "depth": row.depth,
            "width": row.width,
            "stages": stages,
            "decay": row.decay,
            **settings,
            **self.training,
            "seed": seed,
            "test": seed in self.seeds,
        }


def key_of(run: Run) -> str:
    """A run's name."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path, device: str | None = None) -> Config:
    """A configuration from a file; ``device`` instead of its own.

    Raises:
        BadSetting: with what does not fit.
    """
    held = tomllib.loads(path.read_text())
    try:
        training = {**held["training"], **({"device": device} if device else {})}
        sweep = {"extend": 0, "dropout": [0.0], "weight_decay": [0.1], **held["sweep"]}
        common = {"width": held["network"]["width"], "decay": training.pop("decay"), "budgets": held.get("budgets")}
        rows = tuple(_row({**common, **row}) for row in held["rows"])
        seeds = tuple(held["report"]["seeds"])
        config = Config(
            title=held["title"],
            task=held["task"],
            unit=held["unit"],
            training=training,
            sweep=sweep,
            seeds=seeds,
            rows=rows,
            reference=held["report"]["reference"],
            plans=tuple(held["report"].get("plans", ())),
            savings=held.get("savings"),
            gains=tuple(held.get("gains", ())),
        )
    except KeyError as error:
        raise BadSetting(f"{path}: {error} is missing.") from error
    _check(config, path)
    return config


def _row(held: dict[str, Any]) -> Row:
    unknown = [name for name in held if name not in ROW] + [n for s in held["stages"] for n in s if n not in STAGE]
    if unknown:
        raise BadSetting(f"row {held['name']!r}: {', '.join(unknown)} is not known.")
    return Row(**{**held, "budgets": tuple(held["budgets"]), "stages": tuple(held["stages"])})


def _check(config: Config, path: Path) -> None:
    names = [row.name for row in config.rows]
    both = set(config.seeds) & set(config.sweep["seeds"])
    if both:
        raise BadSetting(f"{path}: seeds {sorted(both)} are swept and reported; report others than those of the sweep.")
    if len(set(names)) < len(names):
        raise BadSetting(f"{path}: two rows have one name.")
    savings = config.savings or {"target": config.reference, "rows": []}
    told = [config.reference, *config.plans, savings["target"], *savings["rows"]]
    told += [name for gain in config.gains for name in (gain["of"], *gain["over"])]
    told += [row.settings_of for row in config.rows if row.settings_of]
    missing = [name for name in told if name not in names]
    if missing:
        raise BadSetting(f"{path}: there is no row {missing[0]!r}; there are {', '.join(map(repr, names))}.")
    for row in config.rows:
        if row.settings_of and config.row(row.settings_of).settings_of:
            raise BadSetting(f"{path}: row {row.name!r} takes its settings from one that has none of its own.")
