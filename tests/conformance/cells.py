"""Which cells of the table run: each companion varied alone, all pairs of companions, and the full product."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

from companions import ALL_OPTIMIZERS, AVERAGES, GROUPS, OPTIMIZERS, SCALERS, SCHEDULES, SPECIAL
from families import FAMILIES
from rows import rows

SEVERAL = ("decay", "layered", "named-decay", "own")


class Cell(NamedTuple):
    """One cell of the table."""

    family: str
    edit: str
    optimizer: str = "AdamW-foreach"
    schedule: str = "LambdaLR"
    average: str = "ema"
    scaler: str = "none"
    groups: str = "one"

    @property
    def fits(self) -> bool:
        """Whether a person could run this at all."""
        if self.edit not in rows(self.family):
            return False
        if self.edit in ("widen", "by-hand-resize") and self.groups == "own":
            return False  # a tensor stays in its group as a whole: refused by name
        if self.optimizer in SPECIAL and (self.groups != "one" or self.scaler != "none"):
            return False
        if self.family == "tcn" and self.edit in ("after", "after-inside") and self.groups in SEVERAL:
            return False  # a linear layer among convolutions: it is refused without `group=`, see its own test
        if self.optimizer == "Muon+AdamW" and self.family in ("cnn", "tcn"):
            return False  # their blocks hold no matrices
        return self.optimizer != "SparseAdam+AdamW" or self.family == "gpt"

    def __str__(self) -> str:
        base = Cell(self.family, self.edit)
        fields = zip(self._fields[2:], self[2:], base[2:], strict=True)
        told = [value if value != "none" else f"no {field}" for field, value, usual in fields if value != usual]
        return "-".join([self.family, self.edit, *told])


LEVELS = {
    "optimizer": ALL_OPTIMIZERS,
    "schedule": tuple(SCHEDULES),
    "average": tuple(AVERAGES),
    "scaler": tuple(SCALERS),
    "groups": tuple(GROUPS),
}
PAIRED = {
    "family": tuple(FAMILIES),
    "edit": ("interleave", "list", "keep", "insert", "insert-default", "by-hand-block", "identity"),
    **LEVELS,
    "optimizer": tuple(f"{name}-foreach" for name in OPTIMIZERS),
    "schedule": tuple(name for name in SCHEDULES if name not in ("none", "ConstantLR", "LinearLR", "PolynomialLR")),
}


def all_edits() -> list[Cell]:
    """Every family with every edit."""
    return [Cell(family, edit) for family in FAMILIES for edit in rows(family)]


def varied(base: Cell) -> list[Cell]:
    """One companion varied at a time."""
    return [cell for field, levels in LEVELS.items() for v in levels if (cell := base._replace(**{field: v})).fits]


def paired(shown: Iterable[Cell]) -> list[Cell]:
    """Few cells in which every family meets each of its edits, and every two levels of two fields each other, where
    they can and ``shown`` does not show them yet.

    Built greedily, always the same; among levels that show as many new pairs the one that stands in fewest cells, so
    that what takes long (a convolutional network, two averages at once) is not in all of them.
    """
    fields = list(PAIRED)
    rest = {
        pair
        for a, b in combinations(fields, 2)
        for x in PAIRED[a]
        for y in PAIRED[b]
        if _possible(dict(pair := ((a, x), (b, y))))
    }
    first = [(("family", family), ("edit", edit)) for family in FAMILIES for edit in rows(family)]
    for cell in shown:
        rest -= pairs_of(cell)
        first = [pair for pair in first if pair not in pairs_of(cell)]
    cells, used = [], Counter()
    while first or rest:
        chosen: dict[str, str] = dict(first[0] if first else min(rest))
        for field in sorted(fields, key=lambda name: -len(PAIRED[name])):
            if field not in chosen:
                fitting = [level for level in PAIRED[field] if _possible({**chosen, field: level})]
                chosen[field] = max(fitting, key=lambda one: (_gain(chosen, field, one, rest), -used[field, one]))
        cells.append(Cell(**chosen))
        used.update(chosen.items())
        shown = pairs_of(cells[-1])
        rest -= shown
        first = [pair for pair in first if pair not in shown]
    return cells


def pairs_of(cell: Cell) -> set:
    """The pairs of levels that a cell shows, of the fields and levels that are paired."""
    levels = [(field, getattr(cell, field)) for field in PAIRED]
    return set(combinations(levels, 2))


def _gain(chosen: dict[str, str], field: str, level: str, missing: set) -> int:
    order = list(PAIRED)
    pairs = [tuple(sorted(((field, level), other), key=lambda p: order.index(p[0]))) for other in chosen.items()]
    return sum(pair in missing for pair in pairs)


def _possible(chosen: dict[str, str]) -> bool:
    """Whether some family with some edit can have what was chosen."""
    families = [chosen["family"]] if "family" in chosen else FAMILIES
    edits = [chosen["edit"]] if "edit" in chosen else PAIRED["edit"]
    return any(Cell(**{**chosen, "family": family, "edit": edit}).fits for family in families for edit in edits)


def daily() -> list[Cell]:
    """What `make test` runs, without repetition."""
    extra = [
        Cell("gpt", "interleave", optimizer="SparseAdam+AdamW"),
        Cell("gpt", "by-hand-resize", optimizer="SparseAdam+AdamW"),
        Cell("gpt", "by-hand-resize", optimizer="Adafactor-loop"),
        Cell("mlp", "keep-stack", groups="layered"),
    ]
    # What is paired as well meets every level of the others there.
    alone = [
        c for c in varied(Cell("mlp", "interleave")) if any(getattr(c, name) not in PAIRED[name] for name in LEVELS)
    ]
    first = [*alone, *extra]
    return list(dict.fromkeys([*first, *paired(first)]))


def product() -> Iterator[Cell]:
    """Every family with every edit and every companion varied alone."""
    seen = set()
    for base in all_edits():
        for cell in varied(base):
            if cell not in seen:
                seen.add(cell)
                yield cell
