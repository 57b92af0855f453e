"""What writing and reading share: the limits, and the closed sets of types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MAX_DEPTH = 64
MAX_TEXT = 1 << 28  # characters
MAX_TENSOR = 1 << 20  # bytes
BIG = 1 << 512  # an int from here on is written in hexadecimal: Python limits the decimal digits that it reads

DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
FACTORIES = {"None": None, "int": int, "float": float, "list": list, "dict": dict, "set": set, "str": str}

_SHORT_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
_PACKED = ("q", "bits", "float4")


@dataclass(frozen=True)
class Stored:
    """Stands in a value for a tensor that is kept elsewhere, under ``key``."""

    key: str


def tensor_dtype(name: Any) -> torch.dtype | None:
    """The dtype of that name, if each of its elements is whole bytes of its own."""
    if not isinstance(name, str) or name in _SHORT_INTEGERS or name.startswith(_PACKED):
        return None
    return DTYPES.get(name)


def short(obj: Any) -> str:
    """At most one line of what it is."""
    try:
        text = " ".join(repr(obj).split())
    except Exception:
        text = f"<{type(obj).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."
