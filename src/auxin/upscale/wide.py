"""``widen``: a checkpoint directory in, a wider one out, of the same function."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auxin.anatomy.hugging_face.fields import BlockList
from auxin.anatomy.probe import PlanContext
from auxin.anatomy.tree import join
from auxin.change import Change
from auxin.edits.widen import Widen
from auxin.errors import GrowthError
from auxin.randomness import random_state
from auxin.upscale import model
from auxin.upscale.directory import Checkpoint, read
from auxin.upscale.files import DTYPES, Widened
from auxin.upscale.plan import Plan, find_blocks, followed_configs
from auxin.upscale.run import LEADING, write_upscale
from auxin.whole_directory import check_target

FIELDS = {"ffn": re.compile(r"intermediate|inner|ffn|mlp|d_ff|feed"), "heads": re.compile(r"head")}
EXACT = 1e-4  # of the largest output, in float32: how far the small model may be moved by rounding


@dataclass(frozen=True)
class _Solved:
    """What becomes of one kind of block.

    Attributes:
        fields: of the configuration, dotted: new values.
        shapes: of the model's tensors, by name inside a block.
        widened: of the files' tensors, by name inside a block.
    """

    fields: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    widened: Mapping[str, Widened]


def widen(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    ffn: int | None = None,
    heads: int | None = None,
    at: str | None = None,
    dry_run: bool = False,
    show: Callable[[float, str], None] | None = None,
) -> Plan:
    """Write a wider copy of a Hugging Face checkpoint, one tensor at a time; it computes the same.

    What shares a width is read off a small model of one block of each kind, as ``auxin.Widen`` does it. What makes the
    new entries starts at random, as widely spread as the old ones; what reads them starts at zero.

    Args:
        source: directory with config.json and safetensors; never written to.
        target: a directory that does not exist yet, or is empty. It appears when it is whole.
        ffn: how many hidden units more in the feed-forward layers of every block.
        heads: how many heads of attention more in every block; where keys are shared, as many as fit their groups.
        at: the list of blocks, as the files name it ("model.layers"), where it is not the only one.
        dry_run: plan and check only.
        show: told how far it is, 0 to 1, and in words.

    Returns:
        What was done; prints itself.

    Raises:
        GrowthError: the checkpoint is incomplete, its configuration cannot say the new width, or it cannot be written.
            Nothing is left behind then.

    Examples:
        ``widen("llama", "llama-wider", ffn=1024)``; on the command line ``auxin upscale llama llama-wider --ffn
        +1024``.
    """
    plan = plan_wider(source, target, ffn, heads, at)
    if not dry_run:
        write_upscale(plan, target, show)
    return plan


def plan_wider(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    ffn: int | None = None,
    heads: int | None = None,
    at: str | None = None,
) -> Plan:
    """What ``widen`` would do, checked as far as that goes without writing; arguments and errors are the same."""
    wanted = {name: by for name, by in (("ffn", ffn), ("heads", heads)) if by is not None}
    if not wanted or any(type(by) is not int or by < 1 for by in wanted.values()):
        raise GrowthError(f"ffn={ffn!r}, heads={heads!r}: pass a whole number from 1 for one of them, or for both.")
    checkpoint = read(source)
    check_target(checkpoint.path, Path(target))
    cls = model.model_class(checkpoint.config)
    full = model.full_config(cls, checkpoint.config)
    if any("quantization" in name for name in checkpoint.config):
        raise GrowthError(f"'{source}': its weights are quantized. Widen a checkpoint that is not.")
    blocks = find_blocks(checkpoint, full, at)
    solved = _solved_kinds(cls, checkpoint, full, blocks, wanted)
    fields = {name: value for one in solved for name, value in one.fields.items()}
    config, edits = _followed(cls, checkpoint.config, full, fields, blocks, solved)
    widened = {
        f"{blocks.path}.{number}.{name}": how for number, one in enumerate(solved) for name, how in one.widened.items()
    }
    odd = [
        name for name in widened if DTYPES.get(checkpoint.tensors[name].dtype, torch.int8).is_floating_point is False
    ]
    if odd:
        raise GrowthError(f"{odd[0]} is {checkpoint.tensors[odd[0]].dtype}; only floating-point weights get wider.")
    sources = tuple(range(blocks.length))
    return Plan(checkpoint, blocks, sources, config, edits, "zero", widened=widened)


def _solved_kinds(
    cls: Any, checkpoint: Checkpoint, full: Any, blocks: BlockList, wanted: Mapping[str, int]
) -> list[_Solved]:
    """What becomes of every block; blocks of one kind are solved once."""
    known: dict[str, _Solved] = {}
    found = []
    for source in range(blocks.length):
        leading = [[*range(lead), source] for lead in range(min(source, LEADING) + 1)]
        ways = [next(followed_configs(checkpoint.config, full, blocks, way))[0] for way in leading]
        shapes = [(name, t.dtype, t.shape) for name, t in model.stored_in(checkpoint, blocks, source)]
        kind = json.dumps([sorted(shapes), ways[0]], sort_keys=True)
        if kind not in known:
            with random_state(seed=0):
                known[kind] = _solved(cls, checkpoint, ways, blocks, source, wanted)
        found.append(known[kind])
    return found


def _solved(
    cls: Any,
    checkpoint: Checkpoint,
    configs: Sequence[Mapping[str, Any]],
    blocks: BlockList,
    source: int,
    wanted: Mapping[str, int],
) -> _Solved:
    where = f"{blocks.path}.{source}"
    config, standing, origins = model.origins_of(cls, checkpoint, configs, blocks, source)
    stored = {
        f"{blocks.path}.{position}.{name}": t
        for position, block in enumerate(standing)
        for name, t in model.stored_in(checkpoint, blocks, block)
    }
    state = {name: t.load() for name, t in stored.items()}
    network = model.few_blocks(cls, config, blocks, state, torch.float32, len(standing)).eval()
    state.clear()
    container = model.container_of(network, blocks, len(standing)).path
    probe = model.probe_of(network, where)
    context = PlanContext(network, probe)
    fields: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    widened: dict[str, Widened] = {}
    inside = f"{container}.{len(standing) - 1}."
    for what, by in wanted.items():
        change = _planned(network, context, container, inside, what, by, where)
        fields |= {a.name.removeprefix("config."): a.value for a in change.assigns if a.name.startswith("config.")}
        for own, shape, file, how in _inside(change, inside, origins, checkpoint, blocks, source, where):
            if own in shapes:
                raise GrowthError(f"{where}: {own} grows with both widths at once; widen one after the other.")
            shapes[own], widened[file] = shape, how
        del change  # and with it the wider tensors, before more are made
    context.calls({})
    before = context.outputs or []
    around = {n: t for n, t in network.state_dict().items() if not n.startswith(f"{container}.")}
    del network, context  # the wider one is built in the memory of this one
    for name, t in stored.items():
        how = widened.get(name.removeprefix(f"{blocks.path}.").partition(".")[2])
        state[name] = t.load() if how is None else how.values(t.load(), name)
    other = model.few_blocks(cls, _pinned(cls, config, fields), blocks, state, torch.float32, len(standing)).eval()
    state.clear()
    other.load_state_dict(around, strict=False)
    after = PlanContext(other, probe)
    after.calls({})
    for a, b in zip(before, after.outputs or [], strict=True):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=EXACT * float(a.abs().max().clamp(min=1e-6))):
            raise GrowthError(
                f"{where}: what plain transformers builds from the wider configuration computes otherwise."
            )
    return _Solved(fields, shapes, widened)


def _planned(
    network: nn.Module, context: PlanContext, container: str, inside: str, what: str, by: int, where: str
) -> Change:
    """The widening of all blocks of the small model that a field of its configuration says."""
    refused: list[str] = []
    for path, module in network.named_modules():
        if path.startswith(inside) and any(p.dim() > 1 for p in module.parameters(recurse=False)):
            found = _planned_at(network, context, container, path, path.removeprefix(inside), what, by)
            if isinstance(found, Change):
                return found
            refused += [found] if found else []
    reasons = "; ".join(dict.fromkeys(refused)) or "no layer of it has weights"
    raise GrowthError(
        f"{where}: {what} cannot get wider by {by} in a way that its configuration says: {reasons[:600]}. Open the "
        "model and use auxin.Widen, which needs no configuration."
    )


def _planned_at(
    network: nn.Module, context: PlanContext, container: str, path: str, inner: str, what: str, by: int
) -> Change | str:
    """The same at one layer of a block; in words why not, where that is worth saying."""
    try:
        change = Widen(f"{container}.*.{inner}", by=by, unit="heads" if what == "heads" else None).plan(
            network, context
        )
    except GrowthError as error:
        return str(error)
    fields = [a for a in change.assigns if a.name.startswith("config.") and FIELDS[what].search(a.name)]
    if not fields:
        return f"{path}: no field of the configuration about {what} says the new width, and is taken by it"
    if what == "heads" and max(a.value - a.old for a in fields) != by:
        return ""  # of keys, each with several queries: as many more heads are another number
    beside = [join(a.path, a.name) for a in change.assigns if type(a.value) is float]
    if beside:
        return f"{path}: {beside[0]} would have to change, in these layers alone"
    outside = [n for s in change.swaps if not (n := join(s.path, s.name)).startswith(f"{container}.")]
    return f"{path}: {outside[0]} outside of the blocks would get wider too" if outside else change


def _inside(
    change: Change,
    inside: str,
    origins: Mapping[str, list[float]],
    checkpoint: Checkpoint,
    blocks: BlockList,
    source: int,
    where: str,
) -> Iterator[tuple[str, tuple[int, ...], str, Widened]]:
    """Of each wider tensor of the block its name there, its shape, the name in the files, and how it becomes larger."""
    for swap in change.swaps:
        name = join(swap.path, swap.name)
        if name.startswith(inside) and swap.value is not None:
            own = name.removeprefix(inside)
            file, how = _in_files(swap, own, origins[own], checkpoint, blocks, source, where)
            yield own, tuple(swap.value.shape), file, how


def _in_files(
    swap: Any, own: str, marks: list[float], checkpoint: Checkpoint, blocks: BlockList, source: int, where: str
) -> tuple[str, Widened]:
    """The tensor of the files that one of the model's is, and how it becomes larger."""
    stored = model.stored_in(checkpoint, blocks, source)
    axes = [(number, axis) for number, axis in enumerate(swap.axes) if not axis.is_same]
    whole = len(marks) == 1 and marks[0] in range(1, len(stored) + 1)
    name, tensor = stored[int(marks[0]) - 1] if whole else ("", None)
    old = tuple(int((axis.index >= 0).sum()) for axis in swap.axes)
    if tensor is None or tensor.shape != old or len(axes) != 1:
        raise GrowthError(
            f"{where}: {own} would get wider, and the files hold it in another form (joined, split or turned). Open "
            "the model, use auxin.Widen, and save it."
        )
    number, axis = axes[0]
    index = tuple(int(i) for i in axis.index)
    born = torch.tensor([position for position, entry in enumerate(index) if entry < 0])
    zero = not bool(swap.value.index_select(number, born).any())
    return name, Widened(number, index, tuple(swap.value.shape), zero)


def _pinned(cls: Any, raw: Mapping[str, Any], fields: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with new values, and with everything written down that its class would now derive otherwise."""
    old = dict(_leaves(model.full_config(cls, raw)))
    config = copy.deepcopy(dict(raw))
    for name, value in fields.items():
        _set(config, name, value)
    for name, value in dict(_leaves(model.full_config(cls, config))).items():
        if name not in fields and name in old and old[name] != value:
            _set(config, name, old[name])
    return config


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and "config" in name.lower():
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _set(config: dict[str, Any], dotted: str, value: Any) -> None:
    *through, name = dotted.split(".")
    for part in through:
        config = config.setdefault(part, {})
    config[name] = value


def _followed(
    cls: Any,
    raw: Mapping[str, Any],
    full: Mapping[str, Any],
    fields: Mapping[str, int],
    blocks: BlockList,
    solved: Sequence[_Solved],
) -> tuple[dict[str, Any], tuple[tuple[str, Any, Any], ...]]:
    """The new configuration, once the model that is built from it has exactly the wider tensors."""
    config = _pinned(cls, raw, fields)
    old, new = model.on_meta(cls, raw), model.on_meta(cls, config)
    path = model.container_of(old, blocks).path
    wanted = {name: tuple(t.shape) for name, t in old.state_dict().items()}
    for number, one in enumerate(solved):
        wanted |= {f"{path}.{number}.{name}": shape for name, shape in one.shapes.items()}
    built = {name: tuple(t.shape) for name, t in new.state_dict().items()}
    differ = sorted(name for name in wanted.keys() | built.keys() if wanted.get(name) != built.get(name))
    if differ:
        told = [f"{name} would be {wanted.get(name, 'gone')}, is built as {built.get(name, 'none')}" for name in differ]
        raise GrowthError(
            f"plain transformers would not open the result: {'; '.join(told[:3])}. The configuration has one width for "
            "layers that do not all grow; open the model and use auxin.Widen."
        )
    before, after = dict(_leaves(raw)), dict(_leaves(config))
    known = dict(_leaves(full))
    edits = tuple((n, known.get(n, before.get(n)), v) for n, v in after.items() if n not in before or before[n] != v)
    return config, edits
