"""What each operation of torch does to the axes of its tensors: those that have no rule of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from auxin.anatomy.widths import layers, shapes
from auxin.anatomy.widths.registry import RULES, axis_of
from auxin.anatomy.widths.sizes import Size
from auxin.anatomy.widths.terms import Term, ends, find
from auxin.anatomy.widths.tracer import Axes, Tracer

__all__ = ["apply", "layers", "shapes"]  # the two register their rules
SAME = ("alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "view_of", "_conj", "resolve_conj", "to")
MADE = ("zeros", "ones", "full", "empty", "rand", "randn", "arange", "new_zeros", "new_ones", "new_full", "new_empty")
GAINS, BIASES = ("mul", "mul_", "div", "div_"), ("add", "add_", "sub", "sub_", "rsub")
ROLES = {**dict.fromkeys(GAINS, "gain"), **dict.fromkeys(BIASES, "bias")}  # of a vector that is combined with another
NORMALISED = ("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
REDUCED = ("sum", "mean", "amax", "amin", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "argmax")
REDUCED = (*REDUCED, "argmin", "any", "all", "max", "min", "var_mean", "std_mean", "median", "nansum", "count_nonzero")
SORTED = ("sort", "topk", "argsort", "cumsum", "cumprod", "kthvalue", "logcumsumexp", "multinomial")


def apply(tracer: Tracer, func: Any, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    """Give the results of an operation their axes."""
    name = func._schema.name.rpartition("::")[2]
    known = RULES.get(name)
    if func._schema.name.startswith("quantized"):  # by weights that are no tensors of the network
        for term in [term for axes in given for term in axes.terms]:
            tracer.event("unknown", term, func._schema.name)
    elif known is not None:
        known(tracer, args, kwargs, made, given)
    elif name in SAME and made and given:
        tracer.give(made[0], given[0].terms, given[0].source)
    elif made and name.startswith(MADE):
        _made(tracer, name, made, given)
    elif "pool" in name or name.startswith("upsample") or name.startswith("grid_sampler"):
        _spatial(tracer, made, given)
    elif name.startswith("_fft"):
        _transformed(tracer, args, made, given)
    elif name in NORMALISED:
        tracer.event("softmax", given[0].terms[args[1]], name)
        tracer.give(made[0], given[0].terms)
    elif name in SORTED:
        _ordered(tracer, name, args, kwargs, made, given)
    elif name in REDUCED and given:
        _reduced(tracer, name, args, kwargs, made, given)
    elif name != "histc":
        _elementwise(tracer, name, args, made, given)
    _link(tracer, made)


def _link(tracer: Tracer, made: list[Tensor]) -> None:
    """Note where a number that remembers its origin is the length of an axis of the result."""
    for axis, size in tracer.sliced.items():
        for tensor in made:
            if axis < tensor.dim() and tensor.shape[axis] == size:
                tracer.trace.links.append((size, tracer.axes(tensor).terms[axis]))
    sizes = tracer.sizes
    if not sizes:
        return
    for number, tensor in enumerate(made):
        shape = list(tensor.shape)
        terms = tracer.axes(tensor).terms
        tail = sizes[-len(shape) :] if shape else []
        if len(tail) == len(shape) and all(int(a) in (b, -1) for a, b in zip(tail, shape, strict=True)):
            pairs = [(s, t) for s, t in zip(tail, terms, strict=True) if isinstance(s, Size)]
        elif len(made) > 1 and len(made) == len([s for s in sizes if int(s) in {m.shape[-1] for m in made}]):
            fitting = [s for s in sizes if int(s) in {m.shape[-1] for m in made}]
            pairs = [(fitting[number], terms[-1])] if isinstance(fitting[number], Size) else []
        else:
            known = [s for s in sizes if isinstance(s, Size)]
            fitting = [(s, [t for t, length in zip(terms, shape, strict=True) if length == s]) for s in known]
            pairs = [(s, found[0]) for s, found in fitting if len(found) == 1]
        tracer.trace.links += pairs


def _made(tracer: Tracer, name: str, made: list[Tensor], given: list[Axes]) -> None:
    for tensor in made:
        alike = name.endswith("_like") and given and len(given[0].terms) == tensor.dim()
        tracer.give(tensor, given[0].terms if alike else [Term(size) for size in tensor.shape])


def _elementwise(tracer: Tracer, name: str, args: Any, made: list[Tensor], given: list[Axes]) -> None:
    """The default: what broadcasts to the result's shape goes through entry by entry, anything else is unknown."""
    main = _scaled(tracer, name, given)
    roles = {id(axes): ROLES.get(name) for axes in given}
    if name in ("addcmul", "addcmul_") and len(given) == 3:
        roles = dict(zip(map(id, given), ("bias", "gain", "gain"), strict=True))
    for tensor in made:
        shape = list(tensor.shape)
        fitting = [axes for axes in given if _broadcasts([find(t).size for t in axes.terms], shape)]
        if given and len(fitting) != len(given):
            same = next((a for a in given if len(a.terms) == len(shape)), None)
            terms = [Term(size) for size in shape]
            if same is not None:  # pooling, interpolation, padding: an axis of the same length is the same
                terms = [t if find(t).size == size else Term(size) for t, size in zip(same.terms, shape, strict=True)]
            keeps = [t for t in terms]
            for axes in given:
                for term in axes.terms:
                    if not any(find(term) is find(kept) for kept in keeps):
                        tracer.event("unknown", term, name)
            tracer.give(tensor, terms)
            continue
        terms = [Term(size) for size in shape]
        for axes in fitting:
            offset = len(shape) - len(axes.terms)
            for number, term in enumerate(axes.terms):
                if find(term).size == shape[offset + number] != 1:
                    if (
                        find(terms[offset + number]).kind == "atom"
                        and find(terms[offset + number]) is terms[offset + number]
                    ):
                        terms[offset + number].link = find(term) if find(term) is not terms[offset + number] else None
                    else:
                        tracer.meet(term, terms[offset + number], name)
            role = roles[id(axes)]
            if axes.source not in (None, main) and role is not None and len(given) > 1:
                for number in range(len(tracer.trace.tensors[axes.source])):
                    tracer.trace.roles.setdefault((axes.source, number), role)
        tracer.give(tensor, terms, main)


def _scaled(tracer: Tracer, name: str, given: list[Axes]) -> str | None:
    """The parameter of which the result is a multiple: of one that is masked or scaled by others, the largest."""
    if len(given) == 1 and name in (*GAINS, "_to_copy", "abs", "neg"):
        return given[0].source
    if name not in GAINS or any(axes.source is None for axes in given):
        return None
    return max(given, key=lambda axes: (len(axes.terms), axes.source in tracer.parameters)).source


def _broadcasts(small: Sequence[int], shape: Sequence[int]) -> bool:
    return len(small) <= len(shape) and all(a in (1, b) for a, b in ends(small, shape))


def _spatial(tracer: Tracer, made: list[Tensor], given: list[Axes]) -> None:
    """Pooling and interpolation: batch and channels stay."""
    for tensor in made:
        kept = tensor.dim() - 2 if tensor.dim() < 4 else 2
        kept = 2 if tensor.dim() == 3 and len(given[0].terms) == 3 else kept
        terms = given[0].terms[:kept]
        tracer.give(tensor, [*terms, *(Term(s) for s in tensor.shape[len(terms) :])])


def _transformed(tracer: Tracer, args: Any, made: list[Tensor], given: list[Axes]) -> None:
    """Fourier transforms: the axes that they run along are mixed."""
    terms = list(given[0].terms)
    for axis in args[1]:
        tracer.event("mixed", terms[axis], "a Fourier transform")
        terms[axis] = Term(made[0].shape[axis])
    tracer.give(made[0], terms)


# ---- what looks at a whole axis


def _axes_of(args: Any, kwargs: Any, count: int, name: str) -> list[int]:
    given = kwargs.get("dim", args[2] if name in ("norm", "linalg_vector_norm") and len(args) > 2 else None)
    if given is None and name not in ("norm", "linalg_vector_norm") and len(args) > 1:
        given = args[1]
    if isinstance(given, bool) or given is None or (isinstance(given, (list, tuple)) and not given):
        return list(range(count))
    if isinstance(given, int):
        given = [given]
    return [axis_of(a, count) for a in given if isinstance(a, int)] if isinstance(given, (list, tuple)) else []


def _reduced(tracer: Tracer, name: str, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    if name in ("max", "min") and len(given) == 2:
        _elementwise(tracer, name, args, made, given)
        return
    terms = given[0].terms
    axes = _axes_of(args, kwargs, len(terms), name)
    for axis in axes:
        tracer.event("reduce", terms[axis], name)
    for tensor in made:
        if tensor.dim() == len(terms):
            tracer.give(tensor, [Term(1) if i in axes else t for i, t in enumerate(terms)])
        else:
            kept = [t for i, t in enumerate(terms) if i not in axes]
            fits = [find(t).size for t in kept] == list(tensor.shape)
            tracer.give(tensor, kept if fits else [Term(size) for size in tensor.shape])


def _ordered(tracer: Tracer, name: str, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    terms = given[0].terms
    number = 2 if name in ("topk", "kthvalue") else 1
    axis = kwargs.get("dim", args[number] if len(args) > number else -1)
    axis = axis_of(axis if isinstance(axis, int) and not isinstance(axis, bool) else -1, len(terms))
    tracer.event("sort", terms[axis], name)
    for tensor in made:
        same = list(tensor.shape) == [find(t).size for t in terms]
        ok = tensor.dim() == len(terms)
        tracer.give(
            tensor,
            terms if same else [Term(s) if i == axis or not ok else terms[i] for i, s in enumerate(tensor.shape)],
        )
