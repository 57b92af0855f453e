"""``upscale``: a checkpoint directory in, a deeper one out; and which of its blocks are new."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from auxin.errors import GrowthError
from auxin.freezing import freeze_all_but
from auxin.upscale import files, model
from auxin.upscale.directory import (
    CONFIG,
    INDEX,
    RECORD,
    Checkpoint,
    read,
    write_json,
)
from auxin.upscale.plan import Plan, find_blocks, followed_configs, sources_of
from auxin.version import __version__
from auxin.whole_directory import check_target, whole

FORMAT = 1
LEADING = 3  # special blocks at the beginning of a list, behind which an ordinary one is tried


def upscale(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    blocks: int | None = None,
    order: str | Sequence[int] = "interleave",
    output: str = "zero",
    at: str | None = None,
    dry_run: bool = False,
    show: Callable[[float, str], None] | None = None,
) -> Plan:
    """Write a deeper copy of a Hugging Face checkpoint, tensor by tensor, without opening the model.

    Args:
        source: directory with config.json and safetensors; never written to.
        target: a directory that does not exist yet, or is empty. It appears when it is whole.
        blocks: how many blocks more; None: as many again (for "solar" half as many).
        order: "interleave" (AABB), "stack" (ABAB), "middle", "solar" (all but the last m blocks, then all but the first
            m), or the old block of every position, as [0, 0, 1, 1].
        output: "zero": the last writers of every copy are zeroed, so that the deeper model computes the same; which
            tensors these are is solved on one real block. "keep": copies as they are.
        at: the list, as the files name it ("model.layers"), where it is not the only one.
        dry_run: plan and check only.
        show: told how far it is, 0 to 1, and in words.

    Returns:
        What was done; prints itself.

    Raises:
        GrowthError: the checkpoint is incomplete or cannot be told apart, the deeper one would not be what its
            configuration builds, or it cannot be written. Nothing is left behind then.

    Sources: zeroed copies LLaMA Pro (arXiv:2401.02415), "solar" SOLAR 10.7B (arXiv:2312.15166), stacking StackBERT
    and G_stack (arXiv:2405.15319), any list the passthrough of mergekit.

    Examples:
        ``upscale("llama", "llama-deeper", blocks=8)``; on the command line ``auxin upscale llama llama-deeper
        --blocks 8``.
    """
    plan = plan_upscale(source, target, blocks, order, output, at)
    if not dry_run:
        write_upscale(plan, target, show)
    return plan


def plan_upscale(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    blocks: int | None = None,
    order: str | Sequence[int] = "interleave",
    output: str = "zero",
    at: str | None = None,
) -> Plan:
    """What ``upscale`` would do, checked as far as that goes without writing; arguments and errors are the same."""
    if output not in ("zero", "keep"):
        raise GrowthError(f"output={output!r}: it is 'zero' or 'keep'.")
    checkpoint = read(source)
    check_target(checkpoint.path, Path(target))
    return _planned(checkpoint, blocks, order, output, at)


def write_upscale(plan: Plan, target: str | os.PathLike[str], show: Callable[[float, str], None] | None = None) -> None:
    """Write what was planned: whole, or not at all.

    Raises:
        GrowthError: there is no room, or the disk says no; nothing is left behind.
    """
    check_target(plan.checkpoint.path, Path(target))
    _write(plan, Path(target), show or (lambda share, text: None))


def new_blocks(path: str | os.PathLike[str]) -> list[str]:
    """The blocks of an up-scaled checkpoint that are new, as the files name them: ["model.layers.1", ...].

    Raises:
        GrowthError: the directory was not written by ``upscale``.
    """
    try:
        found = json.loads((Path(path) / RECORD).read_text(encoding="utf-8"))
        names = [f"{found['at']}.{int(number)}" for number in found["new"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GrowthError(f"'{path}' has no {RECORD} of auxin upscale ({error}).") from error
    return names


def freeze_old(network: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Train only the new blocks of an up-scaled checkpoint; call it before the optimizer is made.

    Args:
        network: opened from the checkpoint.
        path: the directory of the checkpoint.

    Returns:
        Names of the parameters that no longer train.

    Raises:
        GrowthError: the directory was not written by ``upscale``, or the network has no such blocks.
    """
    names, modules = new_blocks(path), dict(network.named_modules())
    at = [_found(name, modules) for name in names]
    missing = [name for name, place in zip(names, at, strict=True) if place is None]
    if missing:
        raise GrowthError(f"{type(network).__name__} has no module {missing[0]}, a new block of '{path}'.")
    return freeze_all_but(network, [place for place in at if place is not None])


def _found(name: str, modules: dict[str, Any]) -> str | None:
    """The path in the model: that of the files, but for a head around the body, or the body without its head."""
    if name in modules:
        return name
    ends = [path for path in modules if path.endswith(f".{name}") or ("." in path and name.endswith(f".{path}"))]
    return ends[0] if len(ends) == 1 else None


def _planned(checkpoint: Checkpoint, new: int | None, order: str | Sequence[int], output: str, at: str | None) -> Plan:
    notes: list[str] = []
    try:
        cls: Any = model.model_class(checkpoint.config)
        full = model.full_config(cls, checkpoint.config)
    except GrowthError as error:
        if output == "zero":
            raise GrowthError(f"{error} output='zero' has to open a block; output='keep' has not.") from error
        cls, full = None, checkpoint.config
        notes.append(f"not checked: {error}")
    blocks = find_blocks(checkpoint, full, at)
    sources = sources_of(order, new, blocks.length)
    configs = list(followed_configs(checkpoint.config, full, blocks, sources))
    if cls is None:
        if len(configs) > 1:
            sections = ", ".join(name for name, _, _ in configs[0][1])
            raise GrowthError(f"{sections} of config.json could all count these blocks. {notes[0]}")
        config, edits = configs[0]
        return Plan(checkpoint, blocks, sources, config, edits, output, notes=tuple(notes))
    (config, edits), settings = _fitting(cls, checkpoint, configs, blocks, sources)
    if settings and output == "zero":
        raise GrowthError(
            f"plain transformers would build another model from the new depth: {'; '.join(settings[:3])}. It would not "
            "compute the same. Choose another order, or output='keep'."
        )
    notes += [f"the configuration cannot say it all: {text}" for text in settings[:3]]
    plan = Plan(checkpoint, blocks, sources, config, edits, output, notes=tuple(notes))
    return replace(plan, constants=_constants(cls, plan, full)) if output == "zero" else plan


def _fitting(
    cls: Any, checkpoint: Checkpoint, configs: list[Any], blocks: Any, sources: Sequence[int]
) -> tuple[Any, list[str]]:
    """The first configuration whose model takes the tensors, and the settings that it would change."""
    told: list[str] = []
    for candidate in configs:
        try:
            tensors, settings = model.differences(cls, checkpoint.config, candidate[0], blocks, sources)
        except GrowthError as error:
            told = told or [str(error)]
            continue
        if not tensors:
            return candidate, settings
        told = told or tensors
    raise GrowthError(
        f"plain transformers would not open the result: {'; '.join(told[:3])}. The configuration cannot express these "
        "blocks in this order; try another one."
    )


def _constants(cls: Any, plan: Plan, full: Any) -> dict[int, dict[str, float]]:
    """What becomes constant in the copies of each block; blocks of one kind are solved once."""
    solved: dict[str, dict[str, float]] = {}
    found = {}
    for source in sorted({plan.sources[position] for position in plan.new}):
        leading = [[*range(lead), source] for lead in range(min(source, LEADING) + 1)]
        ways = [next(followed_configs(plan.checkpoint.config, full, plan.blocks, way))[0] for way in leading]
        prefix = f"{plan.blocks.path}.{source}."
        tensors = plan.checkpoint.tensors.items()
        shapes = [(n.removeprefix(prefix), t.dtype, t.shape) for n, t in tensors if n.startswith(prefix)]
        kind = json.dumps([sorted(shapes), ways[0]], sort_keys=True)
        if kind not in solved:
            solved[kind] = model.writers(cls, plan.checkpoint, ways, plan.blocks, source)
        found[source] = solved[kind]
    for source, constants in found.items():
        for name, value in constants.items():
            files.number(value, plan.checkpoint.tensors[f"{plan.blocks.path}.{source}.{name}"].dtype)
    return found


def _write(plan: Plan, target: Path, show: Callable[[float, str], None]) -> None:
    old, shards = plan.checkpoint, plan.shards()
    others = sum((old.path / name).stat().st_size for name in old.others)
    total = plan.size
    written = 0

    def done(count: int) -> None:
        nonlocal written
        written += count
        show(min(written / total, 1.0) if total else 1.0, f"{written / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    metadata = next(iter(old.shards.values()))
    with whole(target, total + others + (1 << 20)) as folder:
        for name in old.others:
            files.copy(old.path / name, folder / name)
        for name, pieces in shards.items():
            files.write(folder / name, pieces, metadata, done)
        if old.index is not None:
            write_json(folder / INDEX, plan.index())
        write_json(folder / CONFIG, plan.config)
        write_json(folder / RECORD, _record(plan))


def _record(plan: Plan) -> dict[str, Any]:
    constants = {str(source): dict(values) for source, values in plan.constants.items()}
    return {
        "format": FORMAT,
        "auxin": __version__,
        "at": plan.blocks.path,
        "sources": list(plan.sources),
        "new": list(plan.new),
        "output": plan.output,
        "constants": constants,
        "widened": sorted(plan.widened),
    }
