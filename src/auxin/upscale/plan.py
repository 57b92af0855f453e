"""What depth up-scaling does to a checkpoint, as data: which block stands where, what the configuration says then."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from auxin.anatomy.hugging_face.blueprint import ABOUT_DEPTH
from auxin.anatomy.hugging_face.fields import BlockList, fields_followed
from auxin.edits.duplicate import Duplicate
from auxin.errors import GrowthError
from auxin.upscale.directory import SINGLE, Checkpoint
from auxin.upscale.files import Piece, Widened

ORDERS = ("interleave", "stack", "middle", "solar")
MOST = 10_000  # blocks of a deeper model; more are a slip of the hand


@dataclass(frozen=True)
class Plan:
    """What becomes of a checkpoint. Prints itself.

    Attributes:
        checkpoint: the one that is read.
        blocks: the list of blocks in it.
        sources: for every position of the new depth, the old block that stands there.
        config: the new configuration.
        edits: (field, old value, new value) of what changed in it.
        output: "zero" or "keep".
        constants: old block -> name inside the block -> the number that all values become in its copies.
        notes: what was not checked, or is left out.
        widened: name of an old tensor -> how it becomes larger.
    """

    checkpoint: Checkpoint
    blocks: BlockList
    sources: tuple[int, ...]
    config: dict[str, Any]
    edits: tuple[tuple[str, Any, Any], ...]
    output: str
    constants: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    widened: Mapping[str, Widened] = field(default_factory=dict)

    @property
    def new(self) -> tuple[int, ...]:
        """Positions of the new blocks: every one whose source stands further up already."""
        return tuple(p for p, source in enumerate(self.sources) if source in self.sources[:p])

    @property
    def size(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(piece.size for piece in self.pieces())

    def pieces(self) -> Iterator[Piece]:
        """Every tensor of the result, in the order in which the old files are read."""
        places: dict[int, list[int]] = {}
        for position, source in enumerate(self.sources):
            places.setdefault(source, []).append(position)
        prefix = f"{self.blocks.path}."
        for name, stored in self.checkpoint.tensors.items():
            source, rest = _number(name, self.blocks.path), name.removeprefix(prefix).partition(".")[2]
            if source is None:
                yield Piece(name, stored, widened=self.widened.get(name))
                continue
            first, *copies = places[source]
            yield Piece(f"{prefix}{first}.{rest}", stored, widened=self.widened.get(name))
            constant = self.constants.get(source, {}).get(rest)
            yield from (Piece(f"{prefix}{position}.{rest}", stored, constant) for position in copies)

    def shards(self) -> dict[str, list[Piece]]:
        """File name -> its tensors: one file for one, else shards no larger than the largest there was."""
        if self.checkpoint.index is None:
            return {SINGLE: list(self.pieces())}
        sizes: dict[Any, int] = {}
        for stored in self.checkpoint.tensors.values():
            sizes[stored.file] = sizes.get(stored.file, 0) + stored.size
        limit, files, filled = max(sizes.values()), [[]], 0
        for piece in self.pieces():
            if files[-1] and filled + piece.size > limit:
                files.append([])
                filled = 0
            files[-1].append(piece)
            filled += piece.size
        return {f"model-{i:05}-of-{len(files):05}.safetensors": file for i, file in enumerate(files, 1)}

    def index(self) -> dict[str, Any]:
        """The index of the shards."""
        shards = self.shards()
        old = (self.checkpoint.index or {}).get("metadata")
        metadata = dict(old) if isinstance(old, dict) else {}
        metadata["total_size"] = self.size
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(_numbers(piece) for piece in self.pieces())
        places = {piece.name: name for name, pieces in shards.items() for piece in pieces}
        return {"metadata": metadata, "weight_map": dict(sorted(places.items()))}

    def __str__(self) -> str:
        old, length, path = self.checkpoint, self.blocks.length, self.blocks.path
        before = sum(stored.size for stored in old.tensors.values())
        marked = [f"{s}*" if p in self.new else str(s) for p, s in enumerate(self.sources)]
        deeper = [
            f"{_kind(old.config)}: {path} of {length} blocks becomes {len(self.sources)}",
            f"  blocks   {' '.join(marked)}   (* a copy)",
        ]
        lines = [
            *(deeper if self.new else [f"{_kind(old.config)}: {path} of {length} blocks becomes wider"]),
            f"  size     {before / 1e6:,.1f} MB in {len(old.shards)} files -> {self.size / 1e6:,.1f} MB in "
            f"{len(self.shards())}",
        ]
        zeroed = {tuple(sorted(constants.items())) for constants in self.constants.values() if constants}
        for constants in sorted(zeroed):
            words = ", ".join(name if not value else f"{name} ({value:g})" for name, value in _folded(dict(constants)))
            lines.append(f"  zeroed   {words}")
        lines += [f"  wider    {words}" for words in _widths(self)]
        lines += [f"  config   {name}: {_short(was)} -> {_short(now)}" for name, was, now in self.edits]
        lines += [f"  copied   {', '.join(old.others)}"] if old.others else []
        lines += [f"  left out {', '.join(old.left_out)} (weights for other programs)"] if old.left_out else []
        return "\n".join([*lines, *(f"  note     {note}" for note in self.notes)])


def block_lists(names: Sequence[str]) -> dict[str, set[int]]:
    """Prefix -> the numbers that follow it, for the outermost number in each name.

    Examples:
        >>> block_lists(["model.layers.0.mlp.experts.3.w", "model.layers.1.norm", "lm_head.weight"])
        {'model.layers': {0, 1}}
    """
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if _counts(part) and 0 < i < len(parts) - 1:
                found.setdefault(".".join(parts[:i]), set()).add(int(part))
                break
    return found


def find_blocks(checkpoint: Checkpoint, config: Mapping[str, Any], at: str | None) -> BlockList:
    """The list of blocks: the one that the configuration counts, or the one at ``at``.

    Args:
        checkpoint: its names are looked at.
        config: the configuration, with what it leaves out filled in as far as that is known.
        at: the prefix of the names, "model.layers".

    Raises:
        GrowthError: there is none, or several, or blocks are missing.
    """
    lists = block_lists(list(checkpoint.tensors))
    if at is not None:
        numbers = {n for name in checkpoint.tensors if (n := _number(name, at)) is not None}
        if not numbers:
            known = ", ".join(lists) or "none"
            raise GrowthError(f"at={at!r}: no tensor is called {at}.0 and so on; lists in this checkpoint: {known}.")
        return _whole(checkpoint, config, at, numbers)
    whole = {path: len(numbers) for path, numbers in lists.items() if numbers == set(range(len(numbers)))}
    counted = [path for path, length in whole.items() if _counters(config, length)]
    if len(counted) == 1:
        return _whole(checkpoint, config, counted[0], lists[counted[0]])
    words = ", ".join(f"{path} ({len(numbers)} blocks)" for path, numbers in lists.items()) or "none"
    if counted:
        raise GrowthError(f"several lists of blocks could grow ({words}): name one, at={counted[0]!r}.")
    counts = ", ".join(f"{name} = {value}" for name, value in _depths(config)) or "none"
    raise GrowthError(
        f"'{checkpoint.path}': no list of blocks that the configuration counts. Lists in the files: {words}; depths in "
        f"config.json: {counts}. Blocks that are shared, or missing, cannot be copied."
    )


def sources_of(order: str | Sequence[int], new: int | None, length: int) -> tuple[int, ...]:
    """The old block of every position of the new depth.

    Args:
        order: "interleave" (AABB), "stack" (ABAB), "middle", "solar", or the old block of every position.
        new: how many blocks more; None: as many again, for "solar" half as many.
        length: how many there are.

    Raises:
        GrowthError: there is no such order, or it does not give that number.

    Examples:
        >>> sources_of("solar", None, 8)
        (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7)
    """
    if not isinstance(order, (str, Sequence)):
        raise GrowthError(f"order={order!r}: it is one of {', '.join(ORDERS)}, or a list such as [0, 1, 1, 2, 2, 3].")
    if not isinstance(order, str):
        return _listed(tuple(order), new, length)
    if order not in ORDERS:
        raise GrowthError(f"order={order!r}: it is one of {', '.join(ORDERS)}, or a list such as 0,1,1,2,2,3.")
    if order == "solar":
        new = length - 2 * (length // 4) if new is None else new
        if (length - new) % 2 or new >= length:
            raise GrowthError(
                f"order='solar' joins all but the last m and all but the first m of {length} blocks, so it adds "
                f"{length} - 2m: an {'even' if length % 2 == 0 else 'odd'} number below {length}, not {new}."
            )
    new = length if new is None else new
    if type(new) is not int or new < 1:
        raise GrowthError(f"blocks={new!r}: the number of new blocks is a whole number from 1.")
    if length + new > MOST:
        raise GrowthError(f"blocks={new}: that would make {length + new:,} blocks, and {MOST:,} is the most.")
    if order in ("middle", "solar") and new > length:
        raise GrowthError(f"blocks={new}: order={order!r} copies each of {length} blocks at most once.")
    return tuple(Duplicate("", by=new, order="middle" if order == "solar" else order).sources(length))


def followed_configs(
    raw: Mapping[str, Any], full: Mapping[str, Any], blocks: BlockList, sources: Sequence[int]
) -> Iterator[tuple[dict[str, Any], tuple[tuple[str, Any, Any], ...]]]:
    """Configurations that follow the new depth, with their edits, the most likely first.

    Where several sections count as many blocks (a text and a vision model in one), all of them together come first,
    then each alone.

    Args:
        raw: config.json as it is.
        full: the same with what it leaves out filled in, or the same again.
        blocks: the list.
        sources: the old block of every position.
    """
    edits: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, section in _sections(full):
        stored = _section(raw, path)
        found = fields_followed({**section, **stored}, blocks, sources)
        if found:
            edits[path] = found
    for chosen in [list(edits), *([path] for path in edits if len(edits) > 1)]:
        config, told = copy.deepcopy(dict(raw)), []
        for path in chosen:
            target = config
            for name in path:
                target = target.setdefault(name, {})
            for name, value in edits[path].items():
                was = _section(full, path).get(name, target.get(name))
                told.append((".".join((*path, name)), was, value))
                target[name] = value
        yield config, tuple(told)


def _sections(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """The configuration and those inside it, each with its path."""
    yield path, dict(config)
    for name, value in config.items():
        if isinstance(value, dict) and "config" in name.lower() and "quant" not in name.lower():
            yield from _sections(value, (*path, name))


def _section(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for name in path:
        config = config.get(name) or {}
    return config


def _depths(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [
        (".".join((*path, name)), value)
        for path, section in _sections(config)
        for name, value in section.items()
        if type(value) is int and ABOUT_DEPTH.search(name.lower()) and not name.startswith("_")
    ]


def _counters(config: Mapping[str, Any], length: int) -> list[str]:
    return [name for name, value in _depths(config) if value == length]


def _number(name: str, prefix: str) -> int | None:
    first, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return int(first) if name.startswith(f"{prefix}.") and _counts(first) and rest else None


def _counts(part: str) -> bool:
    """Whether a part of a name is a number as an index is written: not 01, which would become 1."""
    return part.isascii() and part.isdecimal() and (part == "0" or part[0] != "0") and len(part) < 10


def _whole(checkpoint: Checkpoint, config: Mapping[str, Any], path: str, numbers: set[int]) -> BlockList:
    """The list at ``path``, if no block is missing and the configuration speaks of it."""
    missing = sorted(set(range(max(numbers) + 1)) - numbers)
    if missing:
        raise GrowthError(f"{path}: blocks {missing} are missing; they would have to be {path}.{missing[0]} and so on.")
    parts, stages = path.split("."), 0
    numeric = [i for i, part in enumerate(parts) if part.isdecimal() and i]
    if numeric:
        around = ".".join(parts[: numeric[-1]])
        stages = len({n for name in checkpoint.tensors if (n := _number(name, around)) is not None})
    blocks = BlockList(path, len(numbers), stages)
    if not any(fields_followed(section, blocks, [0] * (len(numbers) + 1)) for _, section in _sections(config)):
        raise GrowthError(
            f"{path} has {len(numbers)} blocks, and no field of config.json counts them, so it cannot say a new depth. "
            f"Its depths: {', '.join(f'{name} = {value}' for name, value in _depths(config)) or 'none'}."
        )
    return blocks


def _listed(sources: tuple[int, ...], new: int | None, length: int) -> tuple[int, ...]:
    good = all(type(s) is int and 0 <= s < length for s in sources)
    if not good or list(dict.fromkeys(sources)) != list(range(length)) or len(sources) == length:
        raise GrowthError(
            f"order={','.join(map(str, sources))}: a list names the old block of every position of the new depth: "
            f"each of 0 to {length - 1}, in order of first use, and at least one of them again, e.g. "
            f"{','.join(str(i // 2) for i in range(2 * min(length, 3)))}{',...' if length > 3 else ''}."
        )
    if new is not None and new != len(sources) - length:
        raise GrowthError(f"the list adds {len(sources) - length} blocks, blocks={new} says otherwise; leave it out.")
    return sources


def _kind(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names else str(config.get("model_type", "model"))


def _numbers(piece: Piece) -> int:
    count = 1
    for side in piece.shape:
        count *= side
    return count


def _folded(constants: dict[str, float]) -> list[tuple[str, float]]:
    """Names that differ in one number only, as one: experts.*.w2.weight."""
    found: dict[tuple[str, float], None] = {}
    for name, value in constants.items():
        parts = ["*" if part.isdecimal() else part for part in name.split(".")]
        found[".".join(parts), value] = None
    return list(found)


def _widths(plan: Plan) -> list[str]:
    """Tensors that get larger, those of all blocks as one, with their shapes and how new entries start."""
    found: dict[str, None] = {}
    for name, widened in plan.widened.items():
        inside = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        old = plan.checkpoint.tensors[name].shape
        start = "zeros" if widened.zero else "at random"
        found[f"{inside} {tuple(old)} -> {tuple(widened.shape)}, new entries {start}"] = None
    return list(found)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
