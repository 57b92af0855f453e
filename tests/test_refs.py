import functools
import math
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import auxin.errors
from auxin.errors import GrowthError
from auxin.refs import Allowed, name_of

HERE = __name__


class Block(nn.Module):
    class Inner(nn.Module):
        pass

    @staticmethod
    def build() -> "Block":
        return Block(1, k=2)

    def __init__(self, dim: int, *, k: int, p: float = 0.1) -> None:
        super().__init__()


class NotANetwork:
    pass


@dataclass(frozen=True)
class Grow:
    at: str

    def plan(self, model: Any, context: Any) -> None:
        raise AssertionError("nothing is called to find out")


@dataclass
class Plain:
    plan: int = 3


def factory() -> nn.Module:
    raise AssertionError("nothing is called to find out")


def local_class() -> type:
    class Local(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

    return Local


class Watchful(type):
    """A metaclass that would run code on every look-up."""

    def __getattr__(cls, name: str) -> Any:
        raise AssertionError("nothing is called to find out")


class Watched(metaclass=Watchful):
    pass


@pytest.mark.parametrize(
    ("obj", "name"),
    [
        (nn.Linear, "torch.nn.modules.linear:Linear"),
        (Block, f"{HERE}:Block"),
        (Block.Inner, f"{HERE}:Block.Inner"),
        (factory, f"{HERE}:factory"),
        (math.sqrt, "math:sqrt"),
        (GrowthError, "auxin.errors:GrowthError"),
    ],
)
def test_name(obj: Any, name: str) -> None:
    assert name_of(obj) == name


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Linear(64, 32), "functools.partial(nn.Linear, in_features=64, out_features=32, bias=True)"),
        (nn.Conv2d(3, 4, 3, padding="same"), "padding='same')"),
        (nn.LSTM(3, 4, 2), "functools.partial(nn.LSTM, 3, 4, num_layers=2)"),
        (nn.ReLU(), "`nn.ReLU`"),
        (
            nn.MultiheadAttention(8, 2),
            "functools.partial(nn.MultiheadAttention, embed_dim=..., num_heads=...)",
        ),
        (Block(1, k=2), "`functools.partial(Block, dim=..., k=...)`"),
        (nn.Sequential(nn.ReLU()), "a class (or a function) at the top level of a module that builds it"),
        (nn.LayerNorm(3), "functools.partial(nn.LayerNorm, (3,), "),
    ],
)
def test_instances_are_refused_with_the_partial_to_write(module: nn.Module, text: str) -> None:
    with pytest.raises(GrowthError, match="a ready module") as info:
        name_of(module)
    assert text in str(info.value)
    assert "with ax.surgery(" in str(info.value)


@pytest.mark.parametrize("module", [nn.Linear(64, 32), nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm1d(7)])
def test_the_partial_shown_builds_the_same_module(module: nn.Module) -> None:
    with pytest.raises(GrowthError) as info:
        name_of(module)
    shown = str(info.value).split("`")[1]
    assert repr(eval(shown, {"functools": functools, "nn": nn})()) == repr(module)


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        (lambda: nn.Linear(3, 3), "is a lambda"),
        (local_class(), "`functools.partial(Local, width=...)`"),
        (nn.Linear(2, 2).forward, "a method of an object"),
        (dict.fromkeys, "a method of an object"),
        (Block.build, "does not lead back"),
        (nn.Linear.forward, "does not lead back"),
        (functools.partial(nn.Linear, 3), "neither a class nor a function"),
        (3, "neither a class nor a function"),
        (types.FunctionType(factory.__code__, {}, "renamed"), "does not lead back"),
        (torch.relu, "does not lead back"),
    ],
)
def test_what_no_process_could_find_again(obj: Any, text: str) -> None:
    with pytest.raises(GrowthError) as info:
        name_of(obj)
    assert text in str(info.value)
    assert "functools.partial" in str(info.value)
    assert "ax.surgery" in str(info.value)


def test_a_replaced_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Block
    monkeypatch.setattr(sys.modules[HERE], "Block", type("Block", (nn.Module,), {}))
    with pytest.raises(GrowthError, match="does not lead back"):
        name_of(old)


@pytest.mark.parametrize("obj", [nn.Linear, nn.TransformerEncoderLayer, Block, Block.Inner, Grow])
def test_round_trip(obj: type) -> None:
    assert Allowed.of(Block(1, k=2)).resolve(name_of(obj)) is obj


def test_functions_only_if_handed_over() -> None:
    name = name_of(factory)
    with pytest.raises(GrowthError, match=r"a function must be handed over itself.*allow=\[factory\]"):
        Allowed.of(Block(1, k=2)).resolve(name)
    with pytest.raises(GrowthError, match="handed over itself"):
        Allowed.of(None, [sys.modules[HERE]]).resolve(name)
    assert Allowed.of(None, [factory]).resolve(name) is factory


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "torch.nn:functional.torch.os.system",
        "torch.nn.functional:torch.os.system",
        "torch.nn.functional:relu",
        "torch.nn.modules.module:OrderedDict",
        "torch.nn.modules.linear:Tensor",
        "torch:Tensor",
        "torch.nnx:Linear",
        "torch:nn.Linear",
        "torch.nn:Linear.__init__",
        "torch.nn:Linear.__init__.__globals__",
        "torch.nn:Nothing",
        "torch.nn.nothing:Nothing",
        "auxin:GrowthError",
        "auxin.errors:GrowthError",
        "auxin.__main__:Anything",
        "builtins:eval",
        "sys:modules",
        f"{HERE}:NotANetwork",
        f"{HERE}:Plain",
        f"{HERE}:Watched",
        f"{HERE}:Watched.anything",
        f"{HERE}:os",
        f"{HERE}:os.system",
        f"{HERE}:nn.Linear.anything",
        "__main__:Nothing",
    ],
)
def test_refused(name: str) -> None:
    with pytest.raises(GrowthError) as info:
        Allowed.of(Block(1, k=2)).resolve(name)
    assert name in str(info.value)
    assert "allow=[" in str(info.value)


@pytest.mark.parametrize(
    "name", ["", "torch.nn", "a:b:c", ":", "a:", "a b:c", "a:b()", "../x:y", 3, None, "a:" + "b" * 2000]
)
def test_malformed(name: Any) -> None:
    with pytest.raises(GrowthError, match="is not a reference"):
        Allowed.of(None).resolve(name)


def test_a_class_handed_over_may_be_of_any_kind() -> None:
    assert Allowed.of(None, [NotANetwork]).resolve(name_of(NotANetwork)) is NotANetwork
    assert Allowed.of(None, NotANetwork).resolve(name_of(NotANetwork)) is NotANetwork


def test_a_reexported_class_is_judged_by_its_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Allowed.of(None).resolve("torch.nn:Linear") is nn.Linear
    stranger = type("Stranger", (nn.Module,), {"__module__": "elsewhere"})
    monkeypatch.setattr(auxin.errors, "Stranger", stranger, raising=False)
    with pytest.raises(GrowthError, match="defined in 'elsewhere'"):
        Allowed.of(None).resolve("auxin.errors:Stranger")


def test_modules_are_imported_only_if_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "grown_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "layers.py").write_text("from torch import nn\nclass Layer(nn.Module):\n    pass\n")
    (package / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = "grown_package.layers:Layer"
    with pytest.raises(GrowthError, match="not among the modules"):
        Allowed.of(None).resolve(name)
    package_module = __import__("grown_package")
    with pytest.raises(GrowthError, match="has not been imported"):
        Allowed.of(None, [package_module]).resolve(name)
    assert "grown_package.layers" not in sys.modules
    found = Allowed.of(None, ["grown_package"]).resolve(name)
    assert found.__name__ == "Layer"
    assert Allowed.of(None, [package_module]).resolve(name) is found
    assert Allowed.of(found()).resolve(name) is found
    with pytest.raises(GrowthError, match="importing 'grown_package.broken' failed: division by zero"):
        Allowed.of(None, ["grown_package"]).resolve("grown_package.broken:Layer")


@pytest.mark.parametrize("entry", ["not a module", "a:b", 3, lambda: 3])
def test_allow_that_is_nothing_of_the_kind(entry: str | int | Callable[[], int]) -> None:
    with pytest.raises(GrowthError):
        Allowed.of(None, [entry])


def test_main_classes_come_from_the_callers_main(monkeypatch: pytest.MonkeyPatch) -> None:
    script = type("Scripted", (nn.Module,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Scripted", script, raising=False)
    assert name_of(script) == "__main__:Scripted"
    assert Allowed.of(None).resolve("__main__:Scripted") is script


def test_a_main_class_that_moved_is_handed_over() -> None:
    with pytest.raises(GrowthError, match=r"define Block in your main script .* allow=\[Block\]"):
        Allowed.of(None).resolve("__main__:Block")
    assert Allowed.of(None, [Block]).resolve("__main__:Block") is Block


def test_nothing_of_a_module_is_run() -> None:
    module = types.ModuleType("watchful_module")
    module.__dict__["__getattr__"] = lambda name: os.abort()
    sys.modules[module.__name__] = module
    try:
        with pytest.raises(GrowthError, match="has no class of that name"):
            Allowed.of(None, [module]).resolve("watchful_module:Anything")
    finally:
        del sys.modules[module.__name__]
