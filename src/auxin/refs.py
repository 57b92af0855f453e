"""Classes and functions as text, "module:qualname", and back: only what the user's process trusts already."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from auxin.errors import GrowthError

# Packages whose modules may be imported to find a class, because the process runs on them anyway.
_OURS: tuple[str, ...] = ("torch.nn", "auxin")
_SURGERY = "or put the ready object in yourself, inside `with ax.surgery(model, optimizer): ...`"
_MISSING = object()
# The slots themselves: a module or a metaclass may answer an ordinary attribute look-up with code.
_MODULE_SPACE: Any = vars(ModuleType)["__dict__"]
_CLASS_SPACE: Any = vars(type)["__dict__"]
_CLASS_LINE: Any = vars(type)["__mro__"]


def name_of(obj: Any) -> str:
    """The text under which a class or a module-level function is found again.

    Args:
        obj: a class (nested in other classes if need be) or a function at the top level of a module.

    Returns:
        ``"module:qualname"``.

    Raises:
        GrowthError: where a later process could not find ``obj`` under any name; says what to pass instead.
    """
    if isinstance(obj, nn.Module):
        raise GrowthError(
            f"{_short(obj)} is a ready module, which cannot be written down as data. {_recipe(obj)}; {_SURGERY}."
        )
    if isinstance(obj, MethodType) or isinstance(getattr(obj, "__self__", None), nn.Module | type):
        raise GrowthError(
            f"{_short(obj)} is a method of an object, which cannot be written down as data. Pass a function at the "
            f"top level of a module, with its arguments as `functools.partial(function, ...)`; {_SURGERY}."
        )
    if not isinstance(obj, type | FunctionType | BuiltinFunctionType):
        raise GrowthError(
            f"{_short(obj)} is neither a class nor a function. Pass an importable class or function, with "
            f"its arguments as `functools.partial(nn.Linear, 64, 64)`; {_SURGERY}."
        )
    module, qualname = obj.__module__, obj.__qualname__
    if "<lambda>" in qualname or "<locals>" in qualname:
        raise GrowthError(_hidden(obj, qualname))
    loaded = sys.modules.get(module) if isinstance(module, str) else None
    nested_function = "." in qualname and not isinstance(obj, type)
    if nested_function or not isinstance(loaded, ModuleType) or _walk(loaded, qualname) is not obj:
        raise GrowthError(
            f"{module}:{qualname} does not lead back to the same object: it was replaced or wrapped, "
            f"or is not a class or function at the top level of its module. Define it there under its own "
            f"name and pass that, with its arguments as `functools.partial(...)`; {_SURGERY}."
        )
    return f"{module}:{qualname}"


@dataclass(frozen=True)
class Allowed:
    """What text from a file may refer to; made by ``Allowed.of``.

    Attributes:
        modules: modules whose own network classes and edits may be named.
        packages: the same for a whole package and everything below it.
        imports: packages that may be imported for it; all others must have been imported by the caller.
        given: what the caller handed over itself, by name; the only way to a function.
    """

    modules: frozenset[str]
    packages: tuple[str, ...]
    imports: tuple[str, ...]
    given: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module | None, allow: Iterable[Any] = ()) -> Allowed:
        """What may be named: torch.nn, auxin, ``__main__``, modules of the model's classes, ``allow``.

        Args:
            model: the network that the file belongs to; None for no network.
            allow: further classes, functions, modules, or names of modules (these may then be imported).

        Returns:
            The rule, as plain data.

        Raises:
            GrowthError: where an entry of ``allow`` is none of these.
        """
        modules = {type(module).__module__ for module in model.modules()} if model is not None else set()
        packages, imports, given = list(_OURS), list(_OURS), {}
        entries = [allow] if isinstance(allow, str | type | FunctionType | ModuleType) else list(allow)
        for entry in entries:
            if isinstance(entry, str):
                if not all(part.isidentifier() for part in entry.split(".")):
                    raise GrowthError(
                        f"allow=[{entry!r}]: this is not the name of a module. Name one, as in "
                        f"allow=['my_package.layers'], or hand over the class or function itself."
                    )
                packages.append(entry)
                imports.append(entry)
            elif isinstance(entry, ModuleType):
                packages.append(entry.__name__)
            else:
                given[name_of(entry)] = entry
        return cls(frozenset({*modules, "__main__"}), tuple(packages), tuple(imports), given)

    def resolve(self, name: str) -> Any:
        """The class or function that ``name`` refers to, if it may.

        Looks names up in the dictionaries of modules and classes; runs no code of what it finds.

        Args:
            name: ``"module:qualname"``.

        Returns:
            An ``nn.Module`` class, the class of an edit, or what was handed over in ``allow``.

        Raises:
            GrowthError: anything else; names the reference and what to pass.
        """
        module, qualname = _split(name)
        if name in self.given:
            return self.given[name]
        if not self._covers(module):
            raise GrowthError(_refusal(name, f"'{module}' is not among the modules that it may name"))
        found = _walk(self._module(module, name), qualname)
        if found is _MISSING:
            return self._moved(name, module, qualname)
        if not isinstance(found, type):
            raise GrowthError(_refusal(name, "it is no class, and a function must be handed over itself"))
        own = inspect.getattr_static(found, "__module__", None)
        if not isinstance(own, str) or not self._covers(own):
            raise GrowthError(_refusal(name, f"the class is defined in {own!r}, which it may not name"))
        if not _is_network_or_edit(found):
            raise GrowthError(_refusal(name, "it is neither an nn.Module class nor an edit"))
        return found

    def _covers(self, module: str) -> bool:
        return module in self.modules or any(_below(module, package) for package in self.packages)

    def _module(self, module: str, name: str) -> ModuleType:
        """The module itself; imported only where that was allowed."""
        loaded = sys.modules.get(module)
        if loaded is None and any(_below(module, package) for package in self.imports):
            if any(part.startswith("__") for part in module.split(".")):
                raise GrowthError(_refusal(name, "it names a module that runs something when imported"))
            try:
                loaded = importlib.import_module(module)
            except Exception as error:
                raise GrowthError(_refusal(name, f"importing '{module}' failed: {error}")) from error
        if not isinstance(loaded, ModuleType):
            raise GrowthError(_refusal(name, f"'{module}' has not been imported"))
        return loaded

    def _moved(self, name: str, module: str, qualname: str) -> Any:
        """A class that the writer's main script defined, handed over from where it lives now."""
        same = [obj for key, obj in self.given.items() if key.partition(":")[2] == qualname]
        if module == "__main__" and len(same) == 1:
            return same[0]
        raise GrowthError(_refusal(name, f"'{module}' has no class of that name"))


def _split(name: Any) -> tuple[str, str]:
    """Module and qualname of a reference that is well formed."""
    if isinstance(name, str) and len(name) <= 1000 and name.count(":") == 1:
        module, qualname = name.split(":")
        if all(part.isidentifier() for part in (*module.split("."), *qualname.split("."))):
            return module, qualname
    raise GrowthError(f"{_short(name)} is not a reference; one reads 'package.module:Class'.")


def _below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _walk(module: ModuleType, qualname: str) -> Any:
    """What stands at ``qualname``, through dictionaries of classes only, or ``_MISSING``."""
    space = _MODULE_SPACE.__get__(module)
    found: Any = _MISSING
    for part in qualname.split("."):
        if space is None or part not in space:
            return _MISSING
        found = space[part]
        space = _CLASS_SPACE.__get__(found) if isinstance(found, type) else None
    return found


def _is_network_or_edit(cls: type) -> bool:
    if nn.Module in _CLASS_LINE.__get__(cls):
        return True
    fields = inspect.getattr_static(cls, "__dataclass_fields__", None)
    return fields is not None and isinstance(inspect.getattr_static(cls, "plan", None), FunctionType)


def _refusal(name: str, why: str) -> str:
    module, _, qualname = name.partition(":")
    last = qualname.rpartition(".")[2]
    text = f"The file refers to {name!r}, which was not looked up: {why}. If you trust it, hand it over: "
    if module == "__main__":
        return text + f"define {last} in your main script as it was there, or pass allow=[{last}]."
    return text + f"allow=[{last}] (imported by you from {module}), or for classes allow=['{module}']."


def _hidden(obj: type | FunctionType | BuiltinFunctionType, qualname: str) -> str:
    what = "a lambda" if "<lambda>" in qualname else f"defined inside a function ({qualname!r})"
    if isinstance(obj, type) and issubclass(obj, nn.Module):
        fix = f"Move the class to the top level of a module and pass `{_call(obj.__name__, obj)}`"
    else:
        fix = (
            "For a layer pass its class with the arguments, as `functools.partial(nn.Linear, 64, 64)`; "
            "for a rule of your own, a function at the top level of a module"
        )
    return f"{_short(obj)} is {what}, so no other process could find it again. {fix}; {_SURGERY}."


def _recipe(module: nn.Module) -> str:
    """What to pass instead of a ready module."""
    cls = type(module)
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return "Pass a class (or a function) at the top level of a module that builds it"
    if getattr(nn, cls.__name__, None) is not cls:
        return f"Pass its class: `{_call(cls.__name__, cls)}`"
    arguments = None if module._modules else _arguments(cls, module.extra_repr())
    if arguments is None:
        return f"Pass its class: `{_call('nn.' + cls.__name__, cls)}`"
    shown = f"functools.partial(nn.{cls.__name__}, {arguments})" if arguments else f"nn.{cls.__name__}"
    return f"Pass its class: `{shown}`"


def _arguments(cls: type, text: str) -> str | None:
    """``extra_repr`` as arguments that the constructor takes, or None where it says something else."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call):
            return None
        values = [_literal(value) for value in call.args]
        keywords = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        inspect.signature(cls).bind(*values, **keywords)
    except (SyntaxError, ValueError, TypeError):
        return None
    return ", ".join([*map(repr, values), *(f"{key}={value!r}" for key, value in keywords.items())])


def _literal(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _call(shown: str, cls: type) -> str:
    """``functools.partial(Block, dim=...)``: the class with the arguments that it cannot do without."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (ValueError, TypeError):
        return f"functools.partial({shown}, ...)"
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        parameter.name if parameter.kind in plain[:1] else f"{parameter.name}=..."
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind in (*plain, inspect.Parameter.KEYWORD_ONLY)
    ]
    return f"functools.partial({', '.join([shown, *needed])})" if needed else shown


def _short(obj: Any) -> str:
    """At most one line of what it is."""
    try:
        text = repr(obj)
    except Exception:
        text = f"<{type(obj).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."
