"""What a new block has to give back so that the network computes as if it were not there.

Most networks hand what a block returns to the next one: then it has to return its input. Others add it to something, as
in ``x + block(x)``: then it has to return zeros. N-BEATS takes one tensor from the input and adds another to the
forecast: zeros too; a stack of such blocks returns what is left of its input, and a forecast: one of each. What holds
is tried on the network, with a block that does nothing else in the place of the new one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.activations import probing
from auxin.anatomy.gradients import gradients_of
from auxin.anatomy.holders import aliases
from auxin.anatomy.placed import PLACED, Placed, spliced
from auxin.anatomy.probe import Call, PlanContext, tensors_in
from auxin.anatomy.zero_init import (
    arriving,
    copy_of,
    fewest_zeros,
    is_identity,
    last_writers,
    scratch,
    with_input,
)
from auxin.change import Assign, Rewire
from auxin.listing import named_parameters
from auxin.randomness import random_state

PASSED, ADDED, BOTH = "passed on", "added", "first one passed on, others added"


class StandIn(nn.Module):
    """Returns what an existing block returned, with every floating tensor in it zero; or the first one as it came, and
    the others zero or as they were.
    """

    form = ADDED

    def __init__(self, call: Call):
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the shapes that are known."""
        found = arriving(Call(args, kwargs, None))
        first = found[0] if found is not None and self.form != ADDED else None
        return at_rest(self.call.output, [first], zeros=self.form != PASSED)


class ResidualRole:
    """How new blocks have to behave, tried out where it is asked.

    Args:
        context: the network on the probe.
        rewire: the list of blocks with a ``StandIn`` for each new one.
        assigns: counters that follow.

    Attributes:
        added: whether it was found that the network adds all that a block returns.
    """

    def __init__(self, context: PlanContext, rewire: Rewire, assigns: Sequence[Assign]):
        self.context, self.rewire, self.assigns = context, rewire, assigns
        self.added = False
        self._held: dict[str, bool] = {}
        self._outputs = context.outputs

    def forms(self) -> Iterator[str]:
        """What the network may do with a block's outputs, the most likely first; tried only as far as asked."""
        outputs = [new.module.call.output for _, new in self.rewire.added if isinstance(new.module, StandIn)]
        several = max(len(list(_floating(output))) for output in outputs) > 1
        if several and self._holds(BOTH):
            if self._holds(PASSED):  # nothing uses the others, which are not to be zeroed then
                yield PASSED
                return
            yield BOTH
        if several and self._adds():
            yield ADDED
        yield PASSED
        if not several and self._adds():
            yield ADDED

    def _adds(self) -> bool:
        self.added = self._holds(ADDED)
        return self.added

    def _holds(self, form: str) -> bool:
        """Whether the network computes the same with stand-ins."""
        if form not in self._held:
            if self._outputs is None:
                with probing(self.context):
                    self._outputs = self._run()
            try:
                for _, new in self.rewire.added:
                    assert isinstance(new.module, StandIn)
                    new.module.form = form
                follow = aliases(self.context.model, self.rewire)
                with probing(self.context), spliced(self.context.model, self.rewire, follow, self.assigns):
                    self._held[form] = _equal(self._outputs, self._run())
            except Exception:  # the network asks more of its blocks than that, or counts them
                self._held[form] = False
        return self._held[form]

    def _run(self) -> list[Tensor]:
        return [t.detach().clone() for t in tensors_in(self.context.run())]


def forms_of(call: Call | None, role: ResidualRole | None) -> Iterable[str]:
    """What the network may do with the outputs of a new block, the most likely first."""
    if isinstance(call, Placed):
        return (PLACED,)
    return (PASSED,) if role is None else role.forms()


def constants_of(block: nn.Module, call: Call, form: str) -> dict[str, float] | None:
    """The constants by name with which ``block`` rests, the fewest in order of use.

    None where there are none; empty where it rests already.
    """
    if form == PASSED:
        return last_writers(block, call)
    with random_state(seed=0):
        zeroed = fewest_zeros(block, call, functools.partial(rests, form=form), functools.partial(learns, form=form))
    return None if zeroed is None else dict.fromkeys(zeroed, 0.0)


def rests(block: nn.Module, call: Call, form: str) -> bool:
    """Whether a block leaves the network as it is, on a call and on one with its input rescaled at random.

    Args:
        block: in eval mode.
        call: what arrives at it.
        form: what the network does with its outputs: PASSED, ADDED, BOTH or PLACED.
    """
    if isinstance(call, Placed):
        return call.rests(block)
    if form == PASSED:
        return is_identity(block, call)
    found = arriving(call)
    if found is None:
        return False
    scale = 0.5 + torch.rand(found[0].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for value in (found[0], found[0] * scale.to(found[0])):
            out = list(_floating(with_input(call, value).run(block)))
            same = form == ADDED or (bool(out) and out[0].shape == value.shape and torch.equal(out.pop(0), value))
            if not same or any(bool(t.any()) for t in out):
                return False
    return is_identity(block, call) if form == BOTH else True


def learns(block: nn.Module, call: Call, names: Iterable[str], form: str) -> bool:
    """Whether each named tensor that trains gets a gradient from what the network uses of the block's outputs."""
    reached = _reached(block, call, names, form)
    return bool(reached) and all(reached.values())


def cut_off(original: nn.Module, twin: nn.Module, call: Call, constants: Iterable[str], form: str) -> list[str]:
    """Tensors that train in a block and never would in its copy: behind them stands a zero that does not train.

    So it is with adapters in front of a frozen projection, which the copy has at zero.
    """
    parameters = named_parameters(twin)
    if all(parameters[name].requires_grad for name in constants):
        return []
    moved = copy_of(twin)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in moved.parameters():
            if p.requires_grad and p.is_floating_point():  # as after some steps
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    before, after = (_reached(block, call, parameters, form) for block in (scratch(original), moved))
    return [name for name, reached in before.items() if reached and not after[name]]


def _reached(block: nn.Module, call: Call, names: Iterable[str], form: str) -> dict[str, bool]:
    """Which of the named tensors that train get a gradient from what the network uses of the outputs."""
    parameters = named_parameters(block)
    wanted = {name: parameters[name] for name in names if parameters[name].requires_grad}
    with torch.enable_grad(), random_state(seed=0):
        out = [t for t in _floating(call.run(block)) if t.requires_grad]
        out = out[:1] if form == PASSED else out
        if not wanted or not out:
            return dict.fromkeys(wanted, False)
        generator = torch.Generator().manual_seed(2)
        total = torch.stack([(t * torch.randn(t.shape, generator=generator).to(t)).sum().float() for t in out]).sum()
        grads = gradients_of(total, block)
    return {n: (g := grads[n]) is not None and bool(g.to_dense().any()) for n in wanted}


def _floating(value: Any) -> Iterator[Tensor]:
    return (t for t in tensors_in(value) if t.is_floating_point())


def at_rest(value: Any, first: list[Tensor | None], zeros: bool = True) -> Any:
    """The same nest with zeros; ``first`` holds what stands for the first floating tensor, and is emptied."""
    if isinstance(value, Tensor):
        given = first.pop() if first and value.is_floating_point() else None
        rest = torch.zeros_like(value) if zeros and value.is_floating_point() else value
        return rest if given is None else given
    if isinstance(value, (tuple, list)):
        items = [at_rest(item, first, zeros) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):  # also the outputs of Hugging Face models, which are dataclasses and mappings
        value = copy.copy(value)
        for key, item in value.items():
            value[key] = at_rest(item, first, zeros)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(value, field.name, at_rest(getattr(value, field.name), first, zeros))
    return value


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of outputs are the same bit for bit (NaN where NaN was)."""
    if [(t.shape, t.dtype) for t in a] != [(t.shape, t.dtype) for t in b]:
        return False
    return all(bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in zip(a, b, strict=True))
