import enum
import functools
import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from auxin.errors import GrowthError
from auxin.refs import Allowed
from auxin.typed import Stored, decode, dumps, encode, loads
from auxin.typed.common import DTYPES, MAX_DEPTH, tensor_dtype

LIMITS = settings(max_examples=150, deadline=None)
TENSOR_DTYPES = sorted(name for name in DTYPES if tensor_dtype(name))


def rule(x: float, base: float = 2.0) -> float:
    raise AssertionError("nothing is called to find out")


ALLOWED = Allowed.of(None, [rule])


class Colour(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, types and order included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return math.isnan(a) and math.isnan(b) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, torch.Tensor):
        raw = [t.reshape(-1).view(torch.uint8).tolist() for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and raw[0] == raw[1]
    if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, functools.partial):
        return a.func is b.func and same(a.args, b.args) and same(a.keywords, b.keywords)
    return a == b


def round_trip(value: Any) -> Any:
    return loads(dumps(value).encode("utf-8"), ALLOWED.resolve)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = DTYPES[draw(st.sampled_from(TENSOR_DTYPES))]
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    raw = draw(st.binary(min_size=(n := math.prod(shape) * dtype.itemsize), max_size=n))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.tensor(list(raw), dtype=torch.uint8).view(dtype).reshape(shape)


KEYS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())
    | st.just("$")
    | st.binary()
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])]),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
LEAVES = (
    KEYS
    | st.floats()
    | st.complex_numbers()
    | st.integers(min_value=1 << 500)
    | st.integers(max_value=-1 << 500)
    | st.sets(KEYS, max_size=3)
    | tensors()
    | st.builds(Stored, st.text())
    | st.sampled_from([nn.Linear, rule, torch.device("cuda:1"), torch.device("meta")])
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(KEYS, inner), max_size=4)
    texts = st.dictionaries(st.sampled_from(["$", "v", "a", ""]) | st.text(), inner, max_size=3)
    return (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | texts
        | pairs.map(dict)
        | pairs.map(OrderedDict)
        | pairs.map(lambda p: Counter(dict(p)))
        | st.builds(lambda f, p: defaultdict(f, p), st.sampled_from([int, list, dict, None]), pairs)
        | st.builds(lambda a, k: functools.partial(rule, *a, **k), st.lists(inner, max_size=2), texts)
    )


VALUES = st.recursive(LEAVES, containers, max_leaves=12)


@LIMITS
@given(VALUES)
def test_round_trip(value: Any) -> None:
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -0.0,
        1e-320,
        0.1 + 0.2,
        "grünes Blatt",
        [1, 2.5, "x", None, [True]],
        {"lr": 0.1, "betas": [0.9, 0.99], "": {}},
    ],
)
def test_plain_json_stays_plain(value: Any) -> None:
    assert json.loads(dumps(value)) == value
    assert "$" not in dumps(value)
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        {"$": "tuple", "v": [1]},
        {"$": 3},
        {"a": {"$": "ref", "v": "os:system"}},
        {"x": math.inf, "y": -math.inf, "z": math.nan},
        Counter({3: 1, 10: 2}),
        {3: "three", "3": "text", (1, 2.0): "tuple", 2.5: "float"},
        "\ud83d\ude00\ud800",
        {"\ud800": 1},
        10**5000,
        functools.partial(functools.partial(nn.Linear, 3, bias=False), out_features=torch.Size([2])[0]),
        functools.partial(nn.Sequential, functools.partial(nn.ReLU)),
        torch.tensor(0.1, dtype=torch.bfloat16),
        torch.tensor(True),
        torch.empty(0, 3, dtype=torch.float64),
        torch.arange(12.0).reshape(3, 4),
        torch.zeros(1 << 18),
    ],
    ids=lambda value: type(value).__name__,
)
def test_examples(value: Any) -> None:
    assert same(round_trip(value), value)


def test_a_view_is_written_by_its_values() -> None:
    value = torch.arange(12.0).reshape(3, 4).t()[1:, ::2]
    assert torch.equal(round_trip(value), value)
    assert torch.equal(round_trip(torch.tensor([1 + 2j]).conj()), torch.tensor([1 - 2j]))


def test_numpy_becomes_python_and_torch() -> None:
    value = [numpy.float64(0.1), numpy.int32(7), numpy.bool_(True), numpy.float32("inf"), numpy.str_("x")]
    assert same(round_trip(value), [0.1, 7, True, math.inf, "x"])
    assert same(round_trip(numpy.arange(3, dtype=numpy.int16)), torch.arange(3, dtype=torch.int16))
    with pytest.raises(GrowthError, match=r"extra\['a'\].*tolist"):
        encode({"a": numpy.array(["x"])}, "extra")


def loop() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [0, 1, 2, Path("x")]}, "extra['a'][3]: a pathlib"),
        ({"a": (0, {"b": object()})}, "extra['a'][1]['b']: a builtins.object"),
        ({3: {Path("x"): 1}}, "extra[3][PosixPath('x')]: a PosixPath as the key"),
        ({"a": Colour.RED}, "extra['a']: <Colour.RED: 1> is a member of an Enum. Store its `.value`"),
        (Point(1, 2), "extra: a"),
        (lambda: 3, "is a lambda"),
        ([nn.Linear(64, 64)], "extra[0]: Linear(in_features=64"),
        (functools.partial(nn.Linear, nn.ReLU()), "extra.args[0]: ReLU() is a ready module"),
        (functools.partial(lambda: 3), "extra.f: "),
        (nn.Parameter(torch.ones(2)), "extra: this tensor cannot be written here: it is a Parameter"),
        (torch.ones(2, requires_grad=True), "it requires a gradient"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "it is nested. Store `[*tensor.unbind()]`"),
        (torch.ones(2).to_sparse(), "its layout is torch.sparse_coo"),
        (torch.ones(2, device="meta"), "on the meta device"),
        (torch.zeros((1 << 18) + 1), "it takes 1,048,580 bytes"),
        (defaultdict(lambda: 3), "Store dict(...) of it"),
        ({torch.ones(2): 1}, "a Tensor as the key of a dict"),
        (loop(), "or it contains itself"),
        (bytearray(b"x"), "a builtins.bytearray"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refusals_name_the_place(value: Any, text: str) -> None:
    with pytest.raises(GrowthError) as info:
        dumps(value, "extra")
    assert text in str(info.value)


def nested(depth: int, kind: str) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"list": lambda v: [v], "tuple": lambda v: (v,), "dict": lambda v: {1: v}}[kind](value)
    return value


@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_what_may_be_written_can_be_read(kind: str) -> None:
    assert same(round_trip(nested(MAX_DEPTH, kind)), nested(MAX_DEPTH, kind))
    with pytest.raises(GrowthError, match="nested more than"):
        dumps(nested(MAX_DEPTH + 1, kind))


def test_references_need_a_resolver() -> None:
    text = dumps({"a": [nn.Linear]})
    with pytest.raises(GrowthError, match=r"value\['a'\]\[0\]: refers to 'torch.nn.*allow="):
        loads(text)
    with pytest.raises(GrowthError, match=r"extra: The file refers to 'os:system'"):
        loads('{"$": "ref", "v": "os:system"}', ALLOWED.resolve, "extra")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[Infinity]",
        "-Infinity",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"a":' * 100_000,
        nested(140, "list").__repr__(),
        "1" * 10_000,
        "1e999",
        '{"$": "nothing", "v": 1}',
        '{"$": ["tuple"], "v": 1}',
        '{"$": "tuple"}',
        '{"$": "tuple", "v": 1}',
        '{"$": "tuple", "v": [], "x": 1}',
        '{"$": "size", "v": [-1]}',
        '{"$": "size", "v": [true]}',
        '{"$": "set", "v": [[1]]}',
        '{"$": "set", "v": [1, 1]}',
        '{"$": "dict", "v": [[1, 2], [1, 3]]}',
        '{"$": "dict", "v": [[[], 2]]}',
        '{"$": "dict", "v": [[1]]}',
        '{"$": "dict", "v": [1]}',
        '{"$": "defaultdict", "of": "eval", "v": []}',
        '{"$": "defaultdict", "of": ["int"], "v": []}',
        '{"$": "dtype", "v": "float33"}',
        '{"$": "device", "v": "nowhere"}',
        '{"$": "device", "v": 3}',
        '{"$": "bytes", "v": "*"}',
        '{"$": "int", "v": "0x3"}',
        '{"$": "float", "v": "1"}',
        '{"$": "complex", "v": [1]}',
        '{"$": "complex", "v": ["a", "b"]}',
        '{"$": "str", "v": [-1]}',
        '{"$": "str", "v": ["a"]}',
        '{"$": "stored", "v": 1}',
        '{"$": "ref", "v": 1}',
        '{"$": "partial", "f": 3, "args": [], "kwargs": {}}',
        '{"$": "partial", "f": {"$": "ref", "v": "torch.nn:Linear"}, "args": {}, "kwargs": {}}',
        '{"$": "partial", "f": {"$": "ref", "v": "torch.nn:Linear"}, "args": [],'
        ' "kwargs": {"$": "dict", "v": [[1, 2]]}}',
        '{"$": "tensor", "dtype": "float32", "shape": [1], "v": ""}',
        '{"$": "tensor", "dtype": "float32", "shape": [0, 99999999999999], "v": ""}',
        '{"$": "tensor", "dtype": "qint8", "shape": [1], "v": "AA=="}',
        '{"$": "tensor", "dtype": "bool", "shape": [1], "v": "Ag=="}',
        '{"$": "tensor", "dtype": "uint8", "shape": [1.0], "v": "AA=="}',
        '{"$": "tensor", "dtype": ["uint8"], "shape": [1], "v": "AA=="}',
        b"\xff",
    ],
    ids=lambda text: str(text)[:40],
)
def test_hostile_text_is_only_refused(text: str | bytes) -> None:
    with pytest.raises(GrowthError):
        loads(text, ALLOWED.resolve)


@pytest.mark.parametrize("data", [math.nan, (1,), {1: 2}, {"$": "tuple", "v": (1,)}, object(), {"$": "tuple", 1: 2}])
def test_hostile_data_is_only_refused(data: Any) -> None:
    with pytest.raises(GrowthError):
        decode(data)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["AA==", "0x1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["$", "v", "of", "f", "args", "kwargs", "dtype", "shape"]),
            inner | st.sampled_from(["tuple", "size", "set", "dict", "tensor", "partial", "ref", "Counter", "int"]),
        )
    ),
    max_leaves=20,
)


@LIMITS
@given(JUNK)
def test_junk_is_read_or_refused(data: Any) -> None:
    try:
        value = decode(data, ALLOWED.resolve)
    except GrowthError:
        return
    assert same(decode(encode(value), ALLOWED.resolve), value)


def test_damaged_text_is_read_or_refused() -> None:
    rng = random.Random(0)
    value = [
        (1, 2.5),
        {3: torch.arange(3)},
        Counter(a=1),
        {"$": b"xyz"},
        functools.partial(rule, 1),
        math.inf,
    ]
    text = dumps(value).encode()
    for _ in range(500):
        raw = bytearray(text)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        try:
            loads(bytes(raw[: rng.choice([len(raw), rng.randrange(len(raw))])]), ALLOWED.resolve)
        except GrowthError:
            pass
