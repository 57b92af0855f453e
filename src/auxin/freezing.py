"""Training only what is new: old parameters that stand still, and which modules of a network have grown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from auxin.errors import GrowthError


class Growth(Protocol):
    """What of a journal entry is looked at."""

    @property
    def added(self) -> Sequence[Mapping[str, Any]]:
        """The new modules, each with its "path"."""
        ...

    @property
    def parts(self) -> Sequence[str]:
        """Names of parameters of which some entries are new."""
        ...

    @property
    def renamed(self) -> Mapping[str, str]:
        """Old path -> new path of modules that moved."""
        ...


def grown_paths(entries: Iterable[Growth], model: nn.Module) -> list[str]:
    """Where the modules stand now that the entries of a journal have added, those that are still there.

    A module onto whose place another one has moved is gone. One that was replaced counts as new, with all in it.
    """
    paths: list[str] = []
    for entry in entries:
        moved = [_moved(path, entry.renamed) for path in paths]
        taken = set(entry.renamed.values())
        paths = [new for old, new in zip(paths, moved, strict=True) if new != old or not _inside(new, taken)]
        paths = list(dict.fromkeys([*paths, *(added["path"] for added in entry.added)]))
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    return [path for path in paths if path in modules]


def refuse_parts(entries: Iterable[Growth]) -> None:
    """Refuse to freeze what has not grown where a tensor has grown in part: it is frozen whole, or trains whole.

    Raises:
        GrowthError: names the tensor.
    """
    parts = [name for entry in entries for name in entry.parts]
    if parts:
        raise GrowthError(
            f"freeze_old: {parts[0]} is new only in part, and a tensor is frozen whole or trains whole. Freeze by hand "
            "what is to stand still (requires_grad_(False)), or let new entries begin with shorter steps: rewarm=100."
        )


def freeze_all_but(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Let only what lies below ``paths`` train; a tensor that something outside holds as well is frozen.

    Returns:
        Names of the parameters that no longer train; their gradients are dropped.

    Raises:
        GrowthError: nothing would train.
    """
    outside = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if not _inside(n, paths)]
    still = {id(p) for _, p in outside}
    if not any(p.requires_grad and id(p) not in still for p in model.parameters()):
        where = f"below {', '.join(paths[:4])}" if paths else "for nothing has grown yet"
        raise GrowthError(f"freeze_old: no parameter of {type(model).__name__} would be left to train, {where}.")
    frozen: dict[int, str] = {}
    for name, p in outside:
        if p.requires_grad and id(p) not in frozen:
            frozen[id(p)] = name
    freeze(p for _, p in outside if id(p) in frozen)
    return list(frozen.values())


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """No gradient from now on, and none left over with which an optimizer would go on moving them."""
    for p in parameters:
        p.requires_grad_(False)
        p.grad = None


def _inside(path: str, around: Iterable[str]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in around)


def _moved(path: str, renamed: Mapping[str, str]) -> str:
    """A path after the renames, which may name a module around it."""
    for old in sorted(renamed, key=len, reverse=True):
        if path == old or path.startswith(f"{old}."):
            return f"{renamed[old]}{path[len(old) :]}"
    return path
