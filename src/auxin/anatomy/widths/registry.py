"""The rules by which axes go through operations of torch, by the name of the operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from auxin.anatomy.widths.tracer import Axes, Tracer

Rule = Callable[[Tracer, Any, Any, "list[Tensor]", "list[Axes]"], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Say that a function is the rule of operations.

    It is given the tracer, the arguments, the results, and the axes of the tensors among the arguments.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def axis_of(axis: int, count: int) -> int:
    """A number of a dimension from 0 on."""
    return axis + count if axis < 0 else axis
