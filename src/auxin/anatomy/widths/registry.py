"""The rules by which axes go through operations of torch, by the name of the operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from auxin.anatomy.widths.tracer import Axes, Tracer

Rule = Callable[[Tracer, Any, Any, "list[Tensor]", "list[Axes]"], None]
RULES: dict[str, Rule] = {}
Item = TypeVar("Item")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Say that a function is the rule of operations.

    It is given the tracer, the arguments, the results, and the axes of the tensors among the arguments.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def ends(a: Sequence[Item], b: Sequence[Item]) -> Iterator[tuple[Item, Item]]:
    """Pairs from the end on, as long as there are two: the way tensors are broadcast."""
    count = min(len(a), len(b))
    return zip(reversed(a[len(a) - count :]), reversed(b[len(b) - count :]), strict=True)


def axis_of(axis: int, count: int) -> int:
    """A number of a dimension from 0 on."""
    return axis + count if axis < 0 else axis
