"""What operations that sum over axes, attend and normalise do to them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from auxin.anatomy.widths.registry import rule
from auxin.anatomy.widths.terms import Term, contains, ends, find, product, split
from auxin.anatomy.widths.tracer import Axes, Tracer


def _contracted(tracer: Tracer, a: Axes, b: Axes, x: Term, y: Term, what: str) -> None:
    """Axis ``x`` of ``a`` and ``y`` of ``b`` are multiplied and summed up."""
    sourced = [axes for axes in (a, b) if axes.source is not None]
    for axes, term, other in ((a, x, b), (b, y, a)):
        if axes.source is not None:
            own = tracer.trace.tensors[axes.source]
            here = [n for n, t in enumerate(own) if t is term] or [
                n for n, t in enumerate(own) if find(t) is find(term)
            ]
            here = here or [n for n, t in enumerate(own) if contains(t, term)]
            here = here or [n for n, t in enumerate(own) if contains(term, t)]  # heads and their entries, flattened
            for number in here:  # a square matrix may have one width along both axes: the axis itself tells
                if tracer.trace.roles.get((axes.source, number)) != "embedding":
                    tracer.trace.roles[axes.source, number] = "in"
                if not other.centred:
                    tracer.trace.direct.add((axes.source, number))
                tracer.trace.reads.setdefault((axes.source, number), set()).update(other.writers)
    tracer.meet(x, y, what)
    if not sourced:
        tracer.event("product", x, what, a, b)
        tracer.trace.attended |= a.writers | b.writers


@rule("mm", "bmm", "matmul")
def _mm(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    a, b = given
    _contracted(tracer, a, b, a.terms[-1], b.terms[-2], "matmul")
    if len(a.terms) == 3:
        tracer.meet(a.terms[0], b.terms[0], "bmm")
        for axes in given:
            own = tracer.trace.tensors.get(axes.source or "", [])
            if own and find(own[0]) is find(axes.terms[0]):  # einsum puts an axis of 1 in front
                tracer.trace.roles[axes.source or "", 0] = "batch"
    tracer.note_work(2, (*a.terms, b.terms[-1]), *given)
    tracer.give(made[0], [*a.terms[:-1], b.terms[-1]])


@rule("_grouped_mm")
def _grouped_mm(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    """Rows of the first, in runs, each times a matrix of the second."""
    a, b = given[:2]
    _contracted(tracer, a, b, a.terms[-1], b.terms[-2], "grouped matmul")
    if b.source is not None:
        tracer.trace.roles[b.source, 0] = "batch"
        tracer.event("sort", b.terms[0], "a choice of experts")
    tracer.note_work(2, (*a.terms[: made[0].dim()], b.terms[-1]), *given)
    tracer.give(made[0], [*a.terms[: made[0].dim() - 1], b.terms[-1]])


@rule("addmm", "baddbmm", "addmm_", "_addmm_activation")
def _addmm(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    bias, *rest = given
    _mm(tracer, args[1:], kwargs, made, rest)
    result = tracer.axes(made[0]).terms
    for term, own in ends(result, bias.terms):
        if find(term).size == find(own).size:
            tracer.meet(term, own, "bias")
    if bias.source is not None:
        tracer.trace.roles.setdefault((bias.source, 0), "bias")


@rule("linear")
def _linear(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    x, weight = given[:2]
    _contracted(tracer, x, weight, x.terms[-1], weight.terms[-1], "linear")
    if len(given) > 2:
        tracer.meet(weight.terms[0], given[2].terms[0], "bias")
    tracer.note_work(2, (*x.terms, weight.terms[0]), weight)
    tracer.give(made[0], [*x.terms[:-1], *weight.terms[:-1]])


@rule("mv", "dot", "addmv")
def _mv(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    a, b = given[-2:]
    _contracted(tracer, a, b, a.terms[-1], b.terms[0], "mv")
    tracer.give(made[0], a.terms[:-1])


@rule("_trilinear")
def _bilinear(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    """``nn.Bilinear``: what else the operation can do is left unknown."""
    if [list(axes) for axes in args[3:7]] != [[1, 3], [0], [1, 2], [2, 3]]:
        for axes in given:
            for term in axes.terms:
                tracer.event("unknown", term, "_trilinear")
        tracer.give(made[0], [Term(size) for size in made[0].shape])
        return
    a, weight, b = given
    _contracted(tracer, a, weight, a.terms[-1], weight.terms[1], "bilinear")
    _contracted(tracer, weight, b, weight.terms[2], b.terms[-1], "bilinear")
    tracer.meet(a.terms[0], b.terms[0], "bilinear")
    tracer.note_work(2, (*a.terms, b.terms[-1], weight.terms[0]), weight)
    tracer.give(made[0], [a.terms[0], weight.terms[0]])


@rule("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "mkldnn_convolution")
def _convolution(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    x, weight = given[:2]
    transposed, groups = args[6], args[8]
    first, second = weight.terms[:2]
    place = tracer.place()[1]
    if transposed:
        _contracted(tracer, x, weight, x.terms[1], first, "convolution")
        if groups == 1:
            out = second
        else:
            outer, _ = split(first, find(first).size // groups)
            out = product([outer, second])
            tracer.trace.groups.append((place, outer))
    elif groups == 1:
        _contracted(tracer, x, weight, x.terms[1], second, "convolution")
        out = first
    else:
        outer, inner = split(x.terms[1], find(second).size)
        if find(second).size > 1:
            _contracted(tracer, x, weight, inner, second, "grouped convolution")
        again, _ = split(first, find(first).size // groups)
        tracer.meet(outer, again, "grouped convolution")
        tracer.trace.groups.append((place, outer))
        out = first
    if len(given) > 2:
        tracer.meet(out, given[2].terms[0], "bias")
        if given[2].source is not None:
            tracer.trace.roles.setdefault((given[2].source, 0), "bias")
    shape = made[0].shape[2:]
    places = math.prod(x.terms[n].size for n in range(2, len(x.terms))) if transposed else math.prod(shape)
    tracer.note_work(2 * places, (x.terms[0], *weight.terms), weight)
    tracer.give(made[0], [x.terms[0], out, *(Term(size) for size in shape)])


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    direction, gain = given
    for number, (a, b) in enumerate(zip(direction.terms, gain.terms, strict=True)):
        if find(a).size == find(b).size:
            tracer.meet(a, b, "weight norm")
        elif direction.source is not None:
            tracer.trace.scaled.add((direction.source, number))
    tracer.give(made[0], direction.terms, direction.source)
    for tensor in made[1:]:
        tracer.give(tensor, gain.terms)


# ---- attention


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
    "scaled_dot_product_attention",
)
def _attention(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    q, k, v = (axes.terms for axes in given[:3])
    for axis in range(len(q) - 2):
        a, b = find(q[axis]).size, find(k[axis]).size
        if a == b:
            tracer.meet(q[axis], k[axis], "attention")
        elif b > 1 and a % b == 0:
            outer, _ = split(q[axis], a // b)
            tracer.meet(outer, k[axis], "attention")
        tracer.meet(k[axis], v[axis], "attention")
    tracer.meet(k[-2], v[-2], "attention")
    tracer.meet(q[-1], k[-1], "attention")
    for mask in given[3:4]:  # or a bias of each head
        for term, own in ends([*q[:-1], k[-2]], mask.terms):
            if find(term).size == find(own).size:
                tracer.meet(term, own, "attention")
    tracer.event("product", q[-1], "attention", *given[:2])
    tracer.trace.attended = tracer.trace.attended.union(*(axes.writers for axes in given[:3]))
    tracer.note_work(2, (*q, k[-2]))
    tracer.note_work(2, (*q[:-1], k[-2], v[-1]))
    tracer.give(made[0], [*q[:-1], v[-1]])
    for tensor in made[1:]:
        tracer.give(tensor, [Term(size) for size in tensor.shape])


# ---- norms


@rule("native_layer_norm", "layer_norm")
def _layer_norm(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    _normed(tracer, args, made, given, "norm")


@rule("_fused_rms_norm", "rms_norm")
def _rms_norm(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    _normed(tracer, args, made, given, "rms norm")


def _normed(tracer: Tracer, args: Any, made: list[Tensor], given: list[Axes], what: str) -> None:
    x, count = given[0], len(args[1])
    for role, own in zip(("gain", "bias")[: len(given) - 1], given[1:], strict=True):
        for number, (a, b) in enumerate(zip(x.terms[-count:], own.terms, strict=True)):
            tracer.meet(a, b, what)
            if own.source is not None:
                tracer.trace.roles[own.source, number] = role
    for term in x.terms[-count:]:
        tracer.event("norm", term, what)
    tracer.give(made[0], x.terms)
    for tensor in made[1:]:
        tracer.give(tensor, [Term(size) for size in tensor.shape])


@rule("native_group_norm", "group_norm")
def _group_norm(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    x, groups = given[0], args[6] if len(args) > 6 else args[1]
    for role, own in zip(("gain", "bias")[: len(given) - 1], given[1:], strict=True):
        tracer.meet(x.terms[1], own.terms[0], "group norm")
        if own.source is not None:
            tracer.trace.roles[own.source, 0] = role
    outer, inner = split(x.terms[1], find(x.terms[1]).size // groups)
    tracer.event("norm", inner, "group norm")
    tracer.trace.groups.append((tracer.place()[1], outer))
    tracer.give(made[0], x.terms)
    for tensor in made[1:]:
        tracer.give(tensor, [Term(size) for size in tensor.shape])


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm",
)
def _batch_norm(tracer: Tracer, args: Any, kwargs: Any, made: list[Tensor], given: list[Axes]) -> None:
    x = given[0]
    present = [
        name
        for name, value in zip(("gain", "bias", "mean", "var"), args[1:5], strict=True)
        if isinstance(value, Tensor)
    ]
    for role, own in zip(present, given[1 : 1 + len(present)], strict=True):
        tracer.meet(x.terms[1], own.terms[0], "batch norm")
        if own.source is not None:
            tracer.trace.roles[own.source, 0] = role
    tracer.give(made[0], x.terms)
    for tensor in made[1:]:
        own = [x.terms[1]] if tensor.dim() == 1 and tensor.shape[0] == find(x.terms[1]).size else None
        tracer.give(tensor, own or [Term(size) for size in tensor.shape])
