"""Every layer of a run, from its birth to the end, followed through the renames of later growths."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from auxin.report.figures import finite
from auxin.report.run import Growth, edits_of, mapping, plain_items

_MOST_SIBLINGS = 2000  # a stray index must not make a million rows
_DEEPEST = 30  # pieces of a path
_GATES = re.compile(r"(?:weight|bias)_[ih]h(|_l\d+(?:_reverse)?)")  # of RNN, LSTM, GRU, and of their cells


@dataclass(frozen=True)
class Layer:
    """One layer of the run.

    Attributes:
        path: its last path: in the final network, or when it was removed.
        source: the last path of the layer that it was copied from.
        birth: the growth that brought it; None: there from the start.
        death: the growth that removed it; None: there at the end, or undone with its birth.
        born_as: its path right after its birth.
        units: its width: the rows of its largest weight; None where that is not known.
        widened: the growths that changed that, with the width before each, in their order.
    """

    path: str
    source: str | None = None
    birth: Growth | None = None
    death: Growth | None = None
    born_as: str = ""
    units: int | None = None
    widened: tuple[tuple[Growth, int], ...] = ()

    @property
    def living(self) -> bool:
        """Whether it is in the final network."""
        return self.death is None and (self.birth is None or self.birth.undone is None)


def read_layers(growths: Sequence[Growth], shapes: Mapping[str, Sequence[int]] = MappingProxyType({})) -> list[Layer]:
    """All layers, in the order of the final network.

    The journal does not list what was there before; that follows from it. A layer that is renamed or copied
    existed, and so did, in a container with indices, everything below the index of a new one that is not new.

    A source is a path before the growth; one that was not there then is read as a path after it.

    Args:
        growths: in the order in which they happened, undone ones too.
        shapes: of the final network's tensors by name; what has not grown is shown too then, as few layers as it takes.
    """
    family = _Family()
    for growth in growths:
        family.grow(growth)
        if growth.undone is not None:
            family.undo()
    found = [_layer(track, shapes) for track in family.tracks]
    found += [Layer(path, units=_units(path, shapes)) for path in _others(found, shapes)]
    history = [(growth, _resized(growth)) for growth in growths if growth.undone is None]
    if any(resized for _, resized in history):
        found = [replace(layer, widened=_widened(layer, history, shapes)) for layer in found]
    places = {name: at for at, name in reversed(list(enumerate(_prefixes(shapes))))}
    parent = {layer.path: layer.path.rpartition(".")[0] for layer in found}
    grown = {parent[layer.path] for layer in found if layer.birth}

    def rank(layer: Layer) -> tuple:
        around = parent[layer.path] if parent[layer.path] in grown else layer.path
        return places.get(around, len(places)), natural(layer.path), not layer.living

    return sorted(found, key=rank)


def _prefixes(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The paths of all modules around the tensors, in their order."""
    found = [""] if shapes else []
    for name in shapes:
        pieces = name.split(".")[:_DEEPEST]
        found += [".".join(pieces[:count]) for count in range(1, len(pieces))]
    return found


def _others(layers: Sequence[Layer], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The modules without a grown layer inside, as near to the root as they can be."""
    inside, known = {""}, {layer.path for layer in layers}
    for path in known:
        while path:
            path = path.rpartition(".")[0]
            inside.add(path)
    found = dict.fromkeys(
        path for path in _prefixes(shapes) if path not in inside | known and path.rpartition(".")[0] in inside
    )
    return list(found)


def _units(path: str, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The rows of the largest weight below a path; of its vectors where there is no matrix.

    Recurrent layers hold the rows of all their gates in one weight: they are as wide as their hidden state.
    """
    below = {name: shape for name, shape in shapes.items() if name.startswith(path + ".")}
    inside = [_without_gates(name, shape, below) for name, shape in below.items()]
    matrices = [shape for shape in inside if len(shape) > 1] or [shape for shape in inside if shape]
    return max((int(shape[0]) for shape in matrices), default=None)


def _without_gates(name: str, shape: Sequence[int], below: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """The shape of a tensor with the rows of one gate, where it is one of a recurrent layer of torch."""
    around, _, leaf = name.rpartition(".")
    found = _GATES.fullmatch(leaf)
    if found is None:
        return shape
    hidden = below.get(f"{around}.weight_hr{found[1]}") or below.get(f"{around}.weight_hh{found[1]}")
    width = hidden[1] if hidden is not None and len(hidden) == 2 else 0
    return (width, *shape[1:]) if shape and width and shape[0] in (width, 3 * width, 4 * width) else shape


def _resized(growth: Growth) -> dict[str, dict[int, int]]:
    """By name of each tensor that a growth has widened, the sizes before along its axes; of ``Widen`` only."""
    found: dict[str, dict[int, int]] = {}
    for _, edit in edits_of(growth.entry):
        for tensor in plain_items(edit.get("axes")):
            path, name, axes = (*plain_items(tensor), None, None, None)[:3]
            known = found.setdefault(".".join(filter(None, (str(path or ""), str(name)))), {})
            for number, axis in enumerate(plain_items(axes)):
                size = finite(mapping(axis).get("size"))
                if size is not None:
                    known.setdefault(number, int(size))  # of several widenings the first one knows
    return found


def _widened(
    layer: Layer, history: Sequence[tuple[Growth, Mapping[str, Mapping[int, int]]]], shapes: Mapping[str, Sequence[int]]
) -> tuple[tuple[Growth, int], ...]:
    """The widths of a layer before each growth that widened it, followed back from the end."""
    if not layer.living or layer.units is None:
        return ()
    path, prefix = layer.path, f"{layer.path}."
    inside = {name.removeprefix(prefix): list(shape) for name, shape in shapes.items() if name.startswith(prefix)}
    found: list[tuple[Growth, int]] = []
    units = layer.units
    for growth, resized in reversed(history):
        if growth is layer.birth:
            break
        moves = dict(_core(old, new) for old, new in growth.renamed.items()) | dict(growth.renamed)
        earlier = _moved(path, {new: old for old, new in moves.items()})
        named = earlier if "axes" in edits_of(growth.entry)[0][1] else path  # as it was when the tensors grew
        for name, sizes in resized.items():
            shape = inside.get(name.removeprefix(f"{named}."), []) if name.startswith(f"{named}.") else []
            for axis, size in sizes.items():
                if axis < len(shape):
                    shape[axis] = size
        before = _units("", {f".{name}": shape for name, shape in inside.items()})
        if before is not None and before != units:
            found.append((growth, before))
            units = before
        path = earlier
    return tuple(reversed(found))


def natural(path: str) -> list[tuple[int, str]]:
    """A sorting key: blocks.2 before blocks.10."""
    pieces = re.split(r"(\d{1,9})", path)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces if piece]


@dataclass(eq=False)
class _Track:
    """A layer while the journal is read; its path changes."""

    path: str
    source: "_Track | None" = None
    birth: Growth | None = None
    death: Growth | None = None
    born_as: str = ""


class _Family:
    """All layers met so far, and those that are alive, by their present path."""

    def __init__(self) -> None:
        self.tracks: list[_Track] = []
        self.living: dict[str, _Track] = {}
        self.before: dict[str, _Track] = {}

    def grow(self, growth: Growth) -> None:
        """One journal entry: removals, then renames, then births."""
        for path in _renamed_blocks(growth):
            self.find(path)
        removed = list(dict.fromkeys(growth.removed))
        for path in removed:
            self.find(path)
        before = self.before = dict(self.living)
        for path in removed:
            self.living.pop(path).death = growth
        self.rename(growth)
        for path in _older_siblings(growth):
            self.find(path)
        born = {layer.path: _Track(layer.path, None, growth, born_as=layer.path) for layer in growth.added}
        for layer in growth.added:
            if layer.source is not None:
                source = before.get(layer.source) or born.get(layer.source)
                born[layer.path].source = source or self.find(layer.source)
        self.tracks.extend(born.values())
        self.living.update(born)

    def undo(self) -> None:
        """Back to before the last growth; what it brought keeps its row, what it found keeps its life."""
        added = [track for track in self.living.values() if track not in self.before.values()]
        for path, track in self.before.items():
            track.path = path
            track.death = None
        found = {track.path: track for track in added if track.birth is None}
        self.living = {**found, **self.before}

    def find(self, path: str) -> _Track:
        """The living layer at `path`; one not met before was there from the start."""
        if path not in self.living:
            self.living[path] = _Track(path)
            self.tracks.append(self.living[path])
        return self.living[path]

    def rename(self, growth: Growth) -> None:
        """Moves every living layer to its new path, all at once."""
        moves = dict(_core(old, new) for old, new in growth.renamed.items()) | dict(growth.renamed)
        moved = {_moved(path, moves): track for path, track in self.living.items()}
        for path, track in moved.items():
            track.path = path
        self.living = moved


def _layer(track: _Track, shapes: Mapping[str, Sequence[int]]) -> Layer:
    source = track.source.path if track.source else None
    alive = track.death is None and (track.birth is None or track.birth.undone is None)
    units = _units(track.path, shapes) if alive else None
    return Layer(track.path, source, track.birth, track.death, track.born_as, units)


def _renamed_blocks(growth: Growth) -> list[str]:
    """The siblings of the new layers that were renamed (by module or by tensor), under their old paths."""
    containers = sorted({layer.path.rpartition(".")[0] for layer in growth.added}, key=len, reverse=True)
    found = []
    for old in growth.renamed:
        for container in containers:
            prefix = container + "." if container else ""
            if old.startswith(prefix):
                found.append(prefix + old[len(prefix) :].partition(".")[0])
                break
    return found


def _core(old: str, new: str) -> tuple[str, str]:
    """Two paths without the end that they share: a.1.weight -> a.2.weight says a.1 -> a.2."""
    first, second = old.split("."), new.split(".")
    while len(first) > 1 and len(second) > 1 and first[-1] == second[-1]:
        first.pop()
        second.pop()
    return ".".join(first), ".".join(second)


def _moved(path: str, moves: Mapping[str, str]) -> str:
    """`path` after the renames, which may name it or a module around it."""
    head, rest = path, ""
    while head:
        if head in moves:
            return moves[head] + rest
        head, dot, last = head.rpartition(".")
        rest = dot + last + rest
    return path


def _older_siblings(growth: Growth) -> list[str]:
    """Every smaller index beside a new layer that is not new itself."""
    new = {layer.path for layer in growth.added}
    found = []
    for layer in growth.added:
        container, dot, last = layer.path.rpartition(".")
        if last.isdecimal() and int(last) <= _MOST_SIBLINGS:
            found.extend(f"{container}{dot}{index}" for index in range(int(last)))
    return [path for path in dict.fromkeys(found) if path not in new]
