"""Adapters of PEFT: ``save_pretrained`` writes them, and not the network below them, which may have grown.

What is reloaded from there is another function, and neither saving nor loading says a word; so the save itself warns.
The configuration of an adapter does it, which every way of saving adapters writes; the network stays as it is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from auxin.change import Change, Move
from auxin.listing import modules_in

SAVE = "save_pretrained"


class SaveWithWarning:
    """``save_pretrained`` of the configuration of an adapter whose network has grown.

    Args:
        config: the configuration.
        changed: what has changed in the network below the adapters, in words.
    """

    def __init__(self, config: Any, changed: tuple[str, ...]):
        self.config, self.changed = config, changed

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Save it, and say what is not saved."""
        told = ", ".join(self.changed[:4]) + (f" and {len(self.changed) - 4} more" if len(self.changed) > 4 else "")
        warnings.warn(
            f"save_pretrained writes the adapters, and not what auxin has changed below them ({told}): on the base "
            "model as it was, from_pretrained gives another function. Write the whole network, "
            "model.merge_and_unload().save_pretrained(path); or, for adapters that stay apart, what is below them too, "
            "copy.deepcopy(model).unload().save_pretrained(base), and load both: "
            "PeftModel.from_pretrained(<class>.from_pretrained(base), <these adapters>). To train on, auxin.save and "
            "auxin.load, or a checkpoint of a Trainer with GrowthCallback, hold all of it.",
            stacklevel=3,
        )
        return getattr(type(self.config), SAVE)(self.config, *args, **options)


def follow_adapters(model: nn.Module, change: Change) -> Iterator[None]:
    """Let the adapters on a network that changes say so when they are saved."""
    yield
    configs = list(_configs(model)) if "peft" in sys.modules and (change.rewires or change.swaps) else []
    before = [config.__dict__.get(SAVE) for config in configs]
    adapters = tuple(f".{name}." for module in modules_in(model) for name in _held(module)) if configs else ()
    below = [move for move in change.moves if not any(name in f"{move.name}. {move.old_name}." for name in adapters)]
    found = [
        _path(move, change)
        for move in below
        if move.new is None or move.old is not move.new or move.new.shape != move.old_shape
    ]
    try:
        for config, held in zip(configs, before, strict=True) if found else ():
            known = held.changed if isinstance(held, SaveWithWarning) else ()
            config.__dict__[SAVE] = SaveWithWarning(config, tuple(dict.fromkeys((*known, *found))))
        yield
    except GeneratorExit:
        raise
    except BaseException:
        for config, held in zip(configs, before, strict=True):
            config.__dict__.pop(SAVE, None)
            config.__dict__.update({SAVE: held} if held is not None else {})
        raise


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configurations of all adapters in a network, each once."""
    found = {id(config): config for module in modules_in(model) for config in _held(module).values()}
    yield from (config for config in found.values() if hasattr(config, SAVE))


def _held(module: nn.Module) -> dict[str, Any]:
    held = module.__dict__.get("peft_config")
    return held if isinstance(held, dict) else {}


def _path(move: Move, change: Change) -> str:
    """Where something has changed: the block that is new or gone, or the tensor itself."""
    if move.added:
        return next((path for path, _ in change.added if f"{move.name}".startswith(f"{path}.")), f"{move.name}")
    if not move.removed:
        return f"{move.name}"
    around = next(
        (f"{rewire.path}." for rewire in change.rewires if f"{move.old_name}".startswith(f"{rewire.path}.")), ""
    )
    return f"{around}{f'{move.old_name}'.removeprefix(around).partition('.')[0]} (gone)"
