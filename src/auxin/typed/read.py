"""Plain JSON data -> values; nothing is imported, and nothing is called but the caller's own ``resolve``."""

from __future__ import annotations

import base64
import functools
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from auxin.errors import GrowthError
from auxin.typed.common import (
    BIG,
    DTYPES,
    FACTORIES,
    MAX_DEPTH,
    MAX_TENSOR,
    MAX_TEXT,
    Stored,
    short,
    tensor_dtype,
)

Resolve = Callable[[str], Any]

_MAPPINGS = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}


class _Bad(Exception):
    """What is wrong with a tagged object; the caller adds where it stands."""


def decode(data: Any, resolve: Resolve | None = None, name: str = "value") -> Any:
    """The value that ``encode`` wrote.

    Args:
        data: what ``encode`` returned.
        resolve: "module:qualname" -> class or function, as ``refs.Allowed.resolve``; None refuses references.
        name: what to call the value in an error.

    Returns:
        An equal value of the same types.

    Raises:
        GrowthError: where ``data`` is nothing that ``encode`` writes.
    """
    return _decode(data, resolve, name, 0)


def _decode(data: Any, resolve: Resolve | None, at: str, depth: int) -> Any:
    # A level of a dict with free keys takes two of JSON.
    if depth > 2 * MAX_DEPTH + 2:
        raise GrowthError(f"{at}: nested deeper than anything that auxin saves.")
    kind = type(data)
    if data is None or kind in (bool, int, str) or (kind is float and math.isfinite(data)):
        return data
    if kind is list:
        return [_decode(item, resolve, f"{at}[{index}]", depth + 1) for index, item in enumerate(data)]
    if kind is not dict:
        raise GrowthError(f"{at}: a {kind.__name__} ({short(data)}) is nothing that JSON holds.")
    if any(type(key) is not str for key in data):
        raise GrowthError(f"{at}: the keys of an object in JSON are text.")
    if "$" not in data:
        return {key: _decode(item, resolve, f"{at}[{key!r}]", depth + 1) for key, item in data.items()}
    tag = data["$"]
    fields = _FIELDS.get(tag) if type(tag) is str else None
    if fields is None:
        raise GrowthError(f"{at}: the type {short(tag)} is unknown. The file is damaged, or a newer auxin wrote it.")
    if set(data) != {"$", *fields}:
        raise GrowthError(f"{at}: a {tag} has the fields {sorted(['$', *fields])}, not {short(sorted(data))}.")
    try:
        return _decode_tagged(tag, data, resolve, at, depth)
    except GrowthError:
        raise
    except (_Bad, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise GrowthError(f"{at}: this is not a {tag}: {error}") from None


def _decode_tagged(tag: str, data: dict[str, Any], resolve: Resolve | None, at: str, depth: int) -> Any:
    if tag in _SCALARS:
        return _SCALARS[tag](data["v"])
    if tag == "tensor":
        return _read_tensor(data)
    if tag == "ref":
        return _read_reference(data["v"], resolve, at)
    if tag == "partial":
        parts = [_decode(data[key], resolve, f"{at}.{key}", depth + 1) for key in ("f", "args", "kwargs")]
        if not all(type(key) is str for key in _expect(dict, parts[2])):
            raise _Bad("the names of its arguments are text")
        return functools.partial(parts[0], *_expect(list, parts[1]), **parts[2])
    if tag == "edit":
        cls = _read_reference(data["type"], resolve, at)
        if not (isinstance(cls, type) and hasattr(cls, "__dataclass_fields__") and hasattr(cls, "plan")):
            raise _Bad(f"{short(data['type'])} is not an edit")
        fields = _expect(dict, data["v"]).items()
        return cls(**{name: _decode(value, resolve, f"{at}.{name}", depth + 1) for name, value in fields})
    items = [_decode(item, resolve, f"{at}[{index}]", depth + 1) for index, item in enumerate(_expect(list, data["v"]))]
    if tag in ("tuple", "size"):
        return tuple(items) if tag == "tuple" else torch.Size(_sizes(items))
    if tag in ("set", "frozenset"):
        if len(found := frozenset(items)) != len(items):
            raise _Bad("an element occurs twice")
        return set(items) if tag == "set" else found
    return _read_mapping(tag, data, items)


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise _Bad(f"{short(value)} is not a {kind.__name__}")
    return value


def _read_mapping(tag: str, data: dict[str, Any], pairs: list[Any]) -> Any:
    if tag == "defaultdict":
        if _expect(str, data["of"]) not in FACTORIES:
            raise _Bad(f"'of' is one of {sorted(FACTORIES)}")
        found: Any = defaultdict(FACTORIES[data["of"]])
    else:
        found = _MAPPINGS[tag]()
    for pair in pairs:
        if len(_expect(list, pair)) != 2 or isinstance(pair[0], Tensor):
            raise _Bad(f"{short(pair)} is not a [key, value]")
        if pair[0] in found:
            raise _Bad(f"the key {short(pair[0])} occurs twice")
        found[pair[0]] = pair[1]
    return found


def _read_reference(name: Any, resolve: Resolve | None, at: str) -> Any:
    if resolve is None:
        raise GrowthError(
            f"{at}: refers to {short(name)}, and no classes or functions are looked up here. "
            f"Load it through `ax.load(path, model, allow=[...])`."
        )
    try:
        return resolve(_expect(str, name))
    except GrowthError as error:
        raise GrowthError(f"{at}: {error}") from None


def _read_tensor(data: dict[str, Any]) -> Tensor:
    dtype, shape = tensor_dtype(data["dtype"]), _sizes(_expect(list, data["shape"]))
    if dtype is None:
        raise _Bad(f"unknown dtype {short(data['dtype'])}")
    raw = _read_bytes(data["v"])
    if len(raw) > MAX_TENSOR or len(shape) > 64 or math.prod(shape) * dtype.itemsize != len(raw):
        raise _Bad(f"{len(raw)} bytes do not fill the shape {short(shape)}")
    if dtype is torch.bool and raw.strip(b"\0\1"):
        raise _Bad("a bool is 0 or 1")
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).clone().view(dtype).reshape(shape)


def _sizes(values: list[Any]) -> list[int]:
    if not all(type(value) is int and 0 <= value < 1 << 40 for value in values):
        raise _Bad(f"{short(values)} is not a list of sizes")
    return values


def _read_bytes(text: Any) -> bytes:
    return base64.b64decode(_expect(str, text), validate=True)


def _read_int(text: Any) -> int:
    if len(_expect(str, text)) > MAX_TEXT or hex(value := int(text, 16)) != text or abs(value) < BIG:
        raise _Bad("not an int in hexadecimal")
    return value


def _read_float(text: Any) -> float:
    if _expect(str, text) not in ("inf", "-inf", "nan"):
        raise _Bad(f"{short(text)} is not inf, -inf or nan")
    return float(text)


def _read_complex(parts: Any) -> complex:
    if len(_expect(list, parts)) != 2:
        raise _Bad("it has two parts")
    return complex(*(_expect(float, _decode(part, None, "part", 0)) for part in parts))


def _read_dtype(name: Any) -> torch.dtype:
    if _expect(str, name) not in DTYPES:
        raise _Bad(f"unknown dtype {short(name)}")
    return DTYPES[name]


def _read_device(name: Any) -> torch.device:
    device = torch.device(_expect(str, name))
    if str(device) != name:
        raise _Bad(f"{short(name)} is not how {device} is written")
    return device


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": _read_int,
    "float": _read_float,
    "complex": _read_complex,
    "str": lambda codes: "".join(map(chr, _expect(list, codes))),
    "bytes": _read_bytes,
    "dtype": _read_dtype,
    "device": _read_device,
    "stored": lambda key: Stored(_expect(str, key)),
}
_FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_SCALARS, *_MAPPINGS, "tuple", "size", "set", "frozenset", "ref"), ("v",)),
    "defaultdict": ("of", "v"),
    "tensor": ("dtype", "shape", "v"),
    "partial": ("f", "args", "kwargs"),
    "edit": ("type", "v"),
}
