"""What a Grower leaves beside a host's own checkpoint, and whether the weights there are those of this network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from auxin import typed
from auxin.errors import GrowthError
from auxin.freezing import grown_paths
from auxin.gate import NAME as GATE
from auxin.grower import Grower
from auxin.journal import FORMAT
from auxin.randomness import random_state
from auxin.refs import Allowed
from auxin.version import __version__

STATE = "auxin.json"
BLOCKS = "auxin_blocks.safetensors"  # of a checkpoint that holds adapters only: the blocks that they are on
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_state(grower: Grower, directory: str | os.PathLike[str], name: str = STATE) -> None:
    """Write the state of a Grower into a directory, whole or not at all."""
    state = grower.state_dict()
    whole = {"format": FORMAT, "auxin": __version__, "journal": state.pop("journal"), "state": typed.encode(state)}
    temporary = Path(directory, f".{name}.tmp")
    temporary.write_text(json.dumps(whole, allow_nan=False, indent=1))
    os.replace(temporary, Path(directory, name))


def read_state(directory: str | os.PathLike[str], model: nn.Module, allow: Iterable[Any], name: str = STATE) -> Any:
    """What ``write_state`` has written, or None where it has written nothing.

    Raises:
        GrowthError: the file is something else.
    """
    file = Path(directory, name)
    if not file.exists():
        return None
    try:
        whole = json.loads(file.read_text())
        if whole["format"] == FORMAT:
            state = typed.decode(whole["state"], Allowed.of(model, allow).resolve, name)
            return {**state, "journal": whole["journal"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GrowthError(f"'{file}' is not what auxin writes ({type(error).__name__}: {error}).") from error
    raise GrowthError(f"'{file}' has format {whole['format']!r}, this version of auxin reads {FORMAT}.")


def write_blocks(grower: Grower, directory: str | os.PathLike[str]) -> None:
    """Write all tensors of what has grown: where only adapters are saved, nothing else holds the blocks below them."""
    inside = tuple(f"{path}." for path in grown_paths(grower.journal, grower.model))
    found = {name: t.detach().cpu().clone() for name, t in grower.model.state_dict().items() if name.startswith(inside)}
    if found:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, Path(directory, BLOCKS))


def read_blocks(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Load what ``write_blocks`` has written, if anything."""
    file = Path(directory, BLOCKS)
    if file.exists():
        model.load_state_dict(load_file(file), strict=False)


def check_weights(model: nn.Module, directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Check that the weights of a checkpoint are this network's: the Trainer loads what has the same name, and no more.

    Returns:
        What the Trainer will not load, though it is there: a file may name it otherwise, as the experts of a mixture.

    Raises:
        GrowthError: they are of another network; names the first differences.
    """
    whole, index = Path(directory, WEIGHTS), Path(directory, INDEX)
    if whole.exists():
        with safe_open(whole, "pt") as file:
            saved = set(file.keys())
    elif index.exists():
        saved = set(json.loads(index.read_text())["weight_map"])
    else:
        return {}  # adapters only, or a format of old
    own = model.state_dict(keep_vars=True)
    there = {id(own[name]) for name in saved if name in own}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    lost = [name for name, t in own.items() if id(t) not in there and name not in ignored]
    odd = sorted(name for name in {*lost, *(saved - set(own))} if not name.endswith(GATE))
    found = _by_stock(model, directory) if odd else {}
    if found is None:
        shown = ", ".join(odd[:4]) + (f" and {len(odd) - 4} more" if len(odd) > 4 else "")
        raise GrowthError(
            f"the weights in '{directory}' are of another network; only one of the two has {shown}. Build the model "
            f"with which that run began, or load the one that it has become: from_pretrained('{directory}')."
        )
    return found


def _by_stock(model: Any, directory: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """What plain transformers loads from there, if it is this network."""
    try:
        with random_state():
            found = type(model).from_pretrained(directory).state_dict()
    except Exception:  # whatever a model that transformers does not know brings about
        return None
    shapes = [{name: t.shape for name, t in state.items()} for state in (found, model.state_dict())]
    return found if shapes[0] == shapes[1] else None
