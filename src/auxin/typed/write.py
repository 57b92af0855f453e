"""Values -> plain JSON data."""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import json
import math
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from auxin.errors import GrowthError
from auxin.refs import name_of
from auxin.typed.common import BIG, FACTORIES, MAX_DEPTH, MAX_TENSOR, Stored, short, tensor_dtype

_KEYS = (type(None), bool, int, float, complex, str, bytes, tuple, frozenset)
_KEYS_OF_TORCH = (torch.Size, torch.dtype, torch.device)


def encode(value: Any, name: str = "value") -> Any:
    """A value as plain JSON data.

    Args:
        value: None, bool, int, float, complex, str, bytes; list, tuple, dict (any keys), set, frozenset,
            Counter, OrderedDict, defaultdict; torch.Size, dtype, device, tensors up to 1 MiB (they come back
            on the CPU); importable classes and functions, ``functools.partial`` of them; edits; ``Stored``. Numbers
            and arrays of numpy become Python numbers and tensors.
        name: what to call the value in an error.

    Returns:
        None, bool, int, str, finite floats, lists and dicts of them.

    Raises:
        GrowthError: for anything else; names the place in the value and what to do.
    """
    return _encode(value, name, 0)


def _encode(value: Any, at: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise GrowthError(f"{at}: nested more than {MAX_DEPTH} deep, or it contains itself. Store it flat.")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    if kind is list:
        return _items(value, at, depth)
    if kind is dict:
        return _mapping(value, at, depth)
    if kind in (tuple, torch.Size):
        return {"$": "tuple" if kind is tuple else "size", "v": _items(value, at, depth)}
    if kind in (set, frozenset):
        items = [_encode(item, f"{at}{{{short(item)}}}", depth + 1) for item in value]
        return {"$": kind.__name__, "v": sorted(items, key=json.dumps)}
    if kind in (Counter, OrderedDict):
        return {"$": kind.__name__, "v": _pairs(value, at, depth)}
    if kind is defaultdict:
        of = [known for known, factory in FACTORIES.items() if factory is value.default_factory]
        if not of:
            raise GrowthError(f"{at}: a defaultdict of {short(value.default_factory)}. Store dict(...) of it.")
        return {"$": "defaultdict", "of": of[0], "v": _pairs(value, at, depth)}
    return _encode_object(value, at, depth)


def _encode_object(value: Any, at: str, depth: int) -> Any:
    if isinstance(value, Tensor):
        return _encode_tensor(value, at)
    if type(value) is functools.partial:
        if vars(value):
            raise GrowthError(f"{at}: a partial with attributes {sorted(vars(value))}. Store it without them.")
        parts = (("f", value.func), ("args", list(value.args)), ("kwargs", value.keywords))
        return {"$": "partial"} | {key: _encode(part, f"{at}.{key}", depth + 1) for key, part in parts}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and not isinstance(value.item(), numpy.generic):
        return _encode(value.item(), at, depth)
    if numpy is not None and type(value) is numpy.ndarray:
        try:
            return _encode_tensor(torch.from_numpy(value.copy()), at)
        except (TypeError, ValueError) as error:
            raise GrowthError(f"{at}: {error} Store `.tolist()` of it.") from None
    if isinstance(value, torch.Generator):
        raise GrowthError(f"{at}: a generator. Store `generator.get_state()`, and give it `set_state(...)` afterwards.")
    if isinstance(value, enum.Enum):
        raise GrowthError(f"{at}: {value!r} is a member of an Enum. Store its `.value`, or its `.name`.")
    if isinstance(value, type | FunctionType | BuiltinFunctionType | nn.Module) or callable(value):
        try:
            return {"$": "ref", "v": name_of(value)}
        except GrowthError as error:
            raise GrowthError(f"{at}: {error}") from None
    if dataclasses.is_dataclass(value) and hasattr(type(value), "plan"):  # an edit inside another
        fields = {
            f.name: _encode(getattr(value, f.name), f"{at}.{f.name}", depth + 1) for f in dataclasses.fields(value)
        }
        return {"$": "edit", "type": name_of(type(value)), "v": fields}
    raise GrowthError(
        f"{at}: a {type(value).__module__}.{type(value).__qualname__}, which is not among the types that "
        f"are written exactly. Store the numbers, text, tensors, lists and dicts that it is made of."
    )


def _encode_int(value: int) -> Any:
    return value if abs(value) < BIG else {"$": "int", "v": hex(value)}


def _encode_float(value: float) -> Any:
    return value if math.isfinite(value) else {"$": "float", "v": repr(value)}


def _encode_str(value: str) -> Any:
    # Half of a surrogate pair cannot be written in UTF-8, and two halves would come back as one character.
    return value if _writable(value) else {"$": "str", "v": [ord(character) for character in value]}


def _writable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _items(values: Iterable[Any], at: str, depth: int) -> list[Any]:
    return [_encode(value, f"{at}[{index}]", depth + 1) for index, value in enumerate(values)]


def _mapping(value: dict[Any, Any], at: str, depth: int) -> Any:
    if all(type(key) is str and key != "$" and _writable(key) for key in value):
        return {key: _encode(item, f"{at}[{key!r}]", depth + 1) for key, item in value.items()}
    return {"$": "dict", "v": _pairs(value, at, depth)}


def _pairs(value: dict[Any, Any], at: str, depth: int) -> list[Any]:
    pairs = []
    for key, item in value.items():
        place = f"{at}[{short(key)}]"
        if type(key) not in (*_KEYS, *_KEYS_OF_TORCH) and not isinstance(key, type):
            raise GrowthError(f"{place}: a {type(key).__qualname__} as the key of a dict. Use text or numbers.")
        pairs.append([_encode(key, f"the key of {place}", depth + 1), _encode(item, place, depth + 1)])
    return pairs


def _encode_tensor(value: Tensor, at: str) -> Any:
    """The bytes of a small tensor."""
    if value.is_nested:  # has no one shape, and torch raises where it is asked for it
        raise GrowthError(f"{at}: this tensor cannot be written here: it is nested. Store `[*tensor.unbind()]`.")
    name = str(value.dtype).removeprefix("torch.")
    size = value.numel() * value.element_size()
    # Whatever would not come back as it was.
    problems = {
        f"it is a {type(value).__name__}": type(value) is not Tensor,
        "it requires a gradient": value.requires_grad,
        f"its layout is {value.layout}": value.layout is not torch.strided,
        "it is on the meta device and has no values": value.device.type == "meta",
        f"its dtype is {value.dtype}": tensor_dtype(name) is None,
        f"it takes {size:,} bytes, and {MAX_TENSOR:,} is the most for text": size > MAX_TENSOR,
    }
    for problem, found in problems.items():
        if found:
            raise GrowthError(
                f"{at}: this tensor cannot be written here: {problem}. Store `tensor.detach().clone()` of an "
                f"ordinary small one; a large one belongs into the network, as a buffer, or its own file."
            )
    flat = value.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = bytes(flat.view(torch.uint8).tolist())
    return {"$": "tensor", "dtype": name, "shape": list(value.shape), "v": base64.b64encode(raw).decode()}


_SCALARS: dict[type, Callable[[Any], Any]] = {
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    complex: lambda value: {"$": "complex", "v": [_encode_float(value.real), _encode_float(value.imag)]},
    bytes: lambda value: {"$": "bytes", "v": base64.b64encode(value).decode()},
    torch.dtype: lambda value: {"$": "dtype", "v": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"$": "device", "v": str(value)},
    Stored: lambda value: {"$": "stored", "v": value.key},
}
