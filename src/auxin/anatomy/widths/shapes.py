"""What operations that only move entries do to axes: views, slices, permutations, concatenations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from auxin.anatomy.widths.registry import axis_of, rule
from auxin.anatomy.widths.sizes import Size
from auxin.anatomy.widths.terms import Mixed, Term, concatenation, cut, ends, find, product, split
from auxin.anatomy.widths.tracer import Axes, Tracer


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "reshape_copy", "view_copy")
def _view(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    """Axes are merged and split; numbers run on in order, so runs of axes with the same product are the same."""
    old, shape = [find(t) for t in given[0].terms], list(made[0].shape)
    terms: list[Term] = []
    i = j = 0
    while i < len(old) or j < len(shape):
        group, sizes = [], []
        have, want = 1, 1
        while True:
            if have == want and group and sizes:
                break
            if have <= want and i < len(old):
                have *= old[i].size
                group.append(old[i])
                i += 1
            elif j < len(shape):
                want *= shape[j]
                sizes.append(shape[j])
                j += 1
            else:
                break
        try:
            terms += _regrouped(group, sizes)
        except Mixed as error:
            terms += _lost(tracer, group, sizes, f"view ({error})")
    tracer.give(made[0], terms, given[0].source)


def _lost(tracer: Tracer, old: Sequence[Term], sizes: Sequence[int], why: str) -> list[Term]:
    """New atoms for axes whose parts cannot be told."""
    for term in old:
        tracer.event("mixed", term, why)
    return [Term(size) for size in sizes]


def _regrouped(group: list[Term], sizes: list[int]) -> list[Term]:
    """Axes with the same product as ``sizes``, as axes of these sizes."""
    if math.prod(sizes) == 0 or not sizes:
        return [Term(size) for size in sizes]
    whole = product(group)
    result = []
    for size in reversed(sizes[1:]):
        if size == 1:
            result.append(Term(1))
            continue
        whole, inner = split(whole, size)
        result.append(inner)
    return [whole, *reversed(result)] if find(whole).size == sizes[0] else [Term(s) for s in sizes]


@rule("permute")
def _permute(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    tracer.give(made[0], [given[0].terms[i] for i in args[1]], given[0].source)


@rule("t", "transpose", "transpose_", "numpy_T", "mT")
def _transpose(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms = list(given[0].terms)
    a, b = (args[1], args[2]) if len(args) > 2 else (-1, -2)
    if len(terms) > 1:
        terms[a], terms[b] = terms[b], terms[a]
    tracer.give(made[0], terms, given[0].source)


@rule("unsqueeze", "unsqueeze_")
def _unsqueeze(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms = list(given[0].terms)
    terms.insert(axis_of(args[1], len(terms) + 1), Term(1))
    tracer.give(made[0], terms, given[0].source)


@rule("squeeze", "squeeze_")
def _squeeze(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms, axes = given[0].terms, args[1] if len(args) > 1 else range(len(given[0].terms))
    axes = [axis_of(a, len(terms)) for a in ([axes] if isinstance(axes, int) else axes)]
    kept = [t for i, t in enumerate(terms) if i not in axes or find(t).size != 1]
    tracer.give(made[0], kept, given[0].source)


@rule("expand", "expand_copy")
def _expand(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    shape, old = list(made[0].shape), given[0].terms
    offset = len(shape) - len(old)
    terms = [
        old[i - offset] if i >= offset and find(old[i - offset]).size == size else Term(size)
        for i, size in enumerate(shape)
    ]
    tracer.give(made[0], terms, given[0].source)


@rule("select")
def _select(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    axis = axis_of(args[1], len(given[0].terms))
    _one_of_many(tracer, given[0], axis)
    tracer.give(made[0], [t for i, t in enumerate(given[0].terms) if i != axis], given[0].source)


def _one_of_many(tracer: Tracer, axes: Axes, axis: int) -> None:
    """Note that a parameter holds several weights, as those of experts, of which one at a time is used."""
    own = tracer.trace.tensors.get(axes.source or "", [])
    if len(own) > 2 and axis == 0 and find(own[0]) is find(axes.terms[0]):
        tracer.trace.roles[axes.source or "", 0] = "batch"


@rule("unbind")
def _unbind(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    axis = axis_of(args[1] if len(args) > 1 else 0, len(given[0].terms))
    _one_of_many(tracer, given[0], axis)
    for tensor in made:
        tracer.give(tensor, [t for i, t in enumerate(given[0].terms) if i != axis], given[0].source)


@rule("slice", "slice_copy")
def _slice(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms = list(given[0].terms)
    axis = axis_of(args[1] if len(args) > 1 else 0, len(terms))
    size = find(terms[axis]).size
    start, end, step = (args[i] if len(args) > i and args[i] is not None else d for i, d in ((2, 0), (3, size), (4, 1)))
    start, end = (max(0, min(size, v + size if v < 0 else v)) for v in (start, end))
    try:
        terms[axis] = _sliced(terms[axis], start, end, step, made[0].shape[axis])
    except Mixed as error:
        terms[axis : axis + 1] = _lost(tracer, [terms[axis]], [made[0].shape[axis]], f"a slice ({error})")
    tracer.give(made[0], terms, given[0].source if find(terms[axis]).size == size else None)


def _sliced(term: Term, start: int, end: int, step: int, length: int) -> Term:
    size = find(term).size
    if step > 1:
        if size % step == 0 and start < step and end >= size - step + 1:
            return split(term, step)[0] if length * step == size else Term(length)
        return Term(length)
    if start == 0 and end == size:
        return term
    if start >= end:
        return Term(length)
    if end < size:
        term, _ = cut(term, end)
    if start > 0:
        _, term = cut(term, start)
    return term


@rule("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "chunk", "split_copy")
def _split(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms = list(given[0].terms)
    axis = axis_of(args[2] if len(args) > 2 else kwargs.get("dim", 0), len(terms))
    rest = terms[axis]
    for tensor in made:
        here, size = rest, tensor.shape[axis]
        if size == 0:
            here = Term(0)
        elif size < find(rest).size:
            try:
                here, rest = cut(rest, size)
            except Mixed as error:
                here, rest = _lost(tracer, [rest], [size, find(rest).size - size], f"a split ({error})")
        tracer.give(tensor, [here if i == axis else t for i, t in enumerate(terms)])


@rule("cat", "concatenate", "concat")
def _cat(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    joined = [a for a in given if len(a.terms) == made[0].dim()]
    axis = axis_of(axis, made[0].dim())
    for other in joined[1:]:
        for i, term in enumerate(other.terms):
            if i != axis:
                tracer.meet(joined[0].terms[i], term, "cat")
    whole = concatenation([a.terms[axis] for a in joined])
    tracer.give(made[0], [whole if i == axis else t for i, t in enumerate(joined[0].terms)])


@rule("stack")
def _stack(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    axis = axis_of(args[1] if len(args) > 1 else kwargs.get("dim", 0), made[0].dim())
    for other in given[1:]:
        for a, b in zip(given[0].terms, other.terms, strict=True):
            tracer.meet(a, b, "stack")
    terms = list(given[0].terms)
    terms.insert(axis, Term(len(given)))
    tracer.give(made[0], terms)


@rule("repeat")
def _repeat(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms = given[0].terms
    front = len(args[1]) - len(terms)
    result = []
    for i, times in enumerate(args[1]):
        term = terms[i - front] if i >= front else Term(1)
        result.append(term if times == 1 else product([Term(times), term]))
    tracer.give(made[0], result)


@rule("flip", "roll", "tril", "triu", "contiguous")
def _moved(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    for axis in args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) and len(args) == 2 else ():
        tracer.event("mixed", given[0].terms[axis], "flip")
    tracer.give(made[0], given[0].terms)


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "pad")
def _pad(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms, pad = list(given[0].terms), list(args[1])
    # The numbers are how much is added, not how long an axis is: they are the lengths of what stands around it.
    said, tracer.sizes = tracer.sizes[: len(pad)], []
    said = said if [int(size) for size in said] == pad else pad
    for number in range(len(pad) // 2):
        axis = len(terms) - 1 - number
        before, after = pad[2 * number], pad[2 * number + 1]
        if before >= 0 and after >= 0 and before + after:
            around = [Term(before), Term(after)]
            pairs = zip(said[2 * number : 2 * number + 2], around, strict=True)
            tracer.trace.links += [(size, term) for size, term in pairs if isinstance(size, Size) and size]
            terms[axis] = concatenation([around[0], terms[axis], around[1]])
        elif before or after:
            terms[axis] = Term(made[0].shape[axis])
    tracer.give(made[0], terms)


@rule("pixel_shuffle")
def _pixel_shuffle(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms = given[0].terms
    channels, _ = split(terms[-3], args[1] ** 2)
    tracer.give(made[0], [*terms[:-3], channels, *(Term(s) for s in made[0].shape[-2:])])


@rule("pixel_unshuffle")
def _pixel_unshuffle(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms = given[0].terms
    channels = product([terms[-3], Term(args[1] ** 2)])
    tracer.give(made[0], [*terms[:-3], channels, *(Term(s) for s in made[0].shape[-2:])])


@rule("index_select", "gather", "take_along_dim")
def _index_select(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    axis = axis_of(args[1], len(given[0].terms))
    terms = [Term(made[0].shape[i]) if i == axis else t for i, t in enumerate(given[0].terms)]
    terms = [t if find(t).size == made[0].shape[i] else Term(made[0].shape[i]) for i, t in enumerate(terms)]
    tracer.give(made[0], terms)


@rule("embedding")
def _embedding(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    if given[0].source is not None:
        tracer.trace.roles[given[0].source, 1] = "embedding"
    tracer.give(made[0], [*given[1].terms, given[0].terms[1]])


@rule("index")
def _index(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    """Axes that are indexed are replaced by those of the indices, at the first of them if they stand side by side."""
    terms, indices = given[0].terms, list(args[1])
    indexed = [i for i, index in enumerate(indices) if index is not None]
    if indexed == [0]:
        _one_of_many(tracer, given[0], 0)
    kept = [t for i, t in enumerate(terms) if i not in indexed]
    front = len(made[0].shape) - len(kept)
    beside = indexed == list(range(indexed[0], indexed[-1] + 1)) if indexed else True
    at = indexed[0] if indexed and beside else 0
    shape = list(made[0].shape)
    new = [Term(size) for size in shape[at : at + front]]
    result = [*kept[:at], *new, *kept[at:]]
    ok = len(result) == len(shape) and all(find(t).size == s for t, s in zip(result, shape, strict=True))
    tracer.give(made[0], result if ok else [Term(s) for s in shape], given[0].source if ok else None)


@rule("index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_", "scatter", "scatter_", "scatter_add_")
def _written(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    """What is written into a tensor goes on along the axes behind those that are indexed."""
    target, source = given[0], given[-1]
    for a, b in ends(target.terms, source.terms):
        if find(a).size != find(b).size:
            break
        tracer.meet(a, b, "a write by index")
    tracer.give(made[0], target.terms)


@rule("masked_scatter", "masked_scatter_")
def _masked_scatter(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    """Whole rows are written: what of images or sounds takes the places that a text leaves for it."""
    target, mask, source = given
    for a, b in ends(target.terms, mask.terms):
        if find(a).size == find(b).size:
            tracer.meet(a, b, "masked_scatter")
    if source.terms and find(target.terms[-1]).size == find(source.terms[-1]).size:
        tracer.meet(target.terms[-1], source.terms[-1], "masked_scatter")
    tracer.give(made[0], target.terms)


@rule("copy_", "copy")
def _copy(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    for a, b in ends(given[0].terms, given[1].terms):
        if find(a).size == find(b).size:
            tracer.meet(a, b, "copy")
    tracer.give(made[0], given[0].terms)


@rule("glu")
def _glu(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms = list(given[0].terms)
    axis = axis_of(args[1] if len(args) > 1 else -1, len(terms))
    first, second = cut(terms[axis], made[0].shape[axis])
    tracer.meet(first, second, "glu")
    terms[axis] = first
    tracer.give(made[0], terms)


@rule("im2col")
def _im2col(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    channels = product([given[0].terms[1], Term(math.prod(args[1]))])
    tracer.give(made[0], [given[0].terms[0], channels, Term(made[0].shape[-1])])


@rule("col2im")
def _col2im(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    channels, _ = split(given[0].terms[1], math.prod(args[2]))
    tracer.give(made[0], [given[0].terms[0], channels, *(Term(s) for s in made[0].shape[2:])])


@rule("unfold")
def _unfold(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms, axis = list(given[0].terms), axis_of(args[1], len(given[0].terms))
    terms[axis] = Term(made[0].shape[axis])
    tracer.give(made[0], [*terms, Term(made[0].shape[-1])])


@rule("view_as_complex")
def _as_complex(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    tracer.give(made[0], given[0].terms[:-1])


@rule("view_as_real")
def _as_real(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    tracer.give(made[0], [*given[0].terms, Term(2)])
