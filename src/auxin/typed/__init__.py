"""JSON that keeps its types: what is written comes back exactly, hostile text brings nothing but an error.

Plain JSON where it loses nothing; all else is an object with the key ``"$"``: ``{"$": "tuple", "v": [1]}``.
"""

from __future__ import annotations

import json
from typing import Any

from auxin.errors import GrowthError
from auxin.typed.common import MAX_TENSOR, MAX_TEXT, Stored
from auxin.typed.read import Resolve, decode
from auxin.typed.write import encode

__all__ = ["MAX_TENSOR", "MAX_TEXT", "Resolve", "Stored", "decode", "dumps", "encode", "loads"]


def dumps(value: Any, name: str = "value", indent: int | None = None) -> str:
    """A value as text.

    Args:
        value: anything that ``encode`` takes.
        name: what to call the value in an error.
        indent: spaces per level; None for one line.

    Returns:
        JSON that ``loads`` turns into an equal value of the same types.

    Raises:
        GrowthError: where a part of it cannot be written down exactly.
    """
    text = json.dumps(encode(value, name), allow_nan=False, ensure_ascii=False, indent=indent)
    if len(text) > MAX_TEXT:
        raise GrowthError(f"{name} is {len(text):,} characters of JSON; at most {MAX_TEXT:,} are written.")
    return text


def loads(text: str | bytes, resolve: Resolve | None = None, name: str = "value") -> Any:
    """The value that ``dumps`` wrote.

    Args:
        text: JSON, as text or in UTF-8.
        resolve: "module:qualname" -> class or function, as ``refs.Allowed.resolve``; None refuses references.
        name: what to call the value in an error.

    Returns:
        The value.

    Raises:
        GrowthError: where the text is not what ``dumps`` writes.
    """
    if len(text) > MAX_TEXT:
        raise GrowthError(f"{name} is {len(text):,} characters of JSON; at most {MAX_TEXT:,} are read.")
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_doubles)
    except RecursionError:
        raise GrowthError(f"{name} is nested too deeply to be anything that auxin saved.") from None
    except ValueError as error:
        raise GrowthError(f"{name} is not valid JSON: {error}") from None
    return decode(data, resolve, name)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs][:20]}")
    return found
