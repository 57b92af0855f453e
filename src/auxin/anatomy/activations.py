"""What comes out of one module, how often, whether anything depends on it, and whether a layer could stand behind it
as one more entry of a container.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.placed import Witness
from auxin.anatomy.probe import PlanContext, tensors_in, untouched
from auxin.change import New, Rewire
from auxin.output_hook import NAME


@dataclass
class Activations:
    """What came out of one module on the probe.

    Attributes:
        count: how often it was called.
        samples: one output of each shape and dtype.
        odd: what came out instead of one floating tensor, in words; "" if nothing else did.
        outputs: of the network.
        siblings: how often each child of the watched container was called, by ``id``.
    """

    count: int = 0
    samples: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    odd: str = ""
    outputs: list[Tensor] = field(default_factory=list)
    siblings: Counter[int] = field(default_factory=Counter)

    def see(self, output: Any) -> None:
        """Take note of one output."""
        self.count += 1
        self.odd = self.odd or not_one_tensor(output)
        if not self.odd:
            self.samples.setdefault((output.shape, output.dtype), output.detach().clone())


def not_one_tensor(output: Any) -> str:
    """What ``output`` is, in words, if it is not one floating tensor; else ""."""
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}"
    return "" if output.is_floating_point() else f"a tensor of {str(output.dtype).removeprefix('torch.')}"


def activations_of(context: PlanContext, module: nn.Module, container: nn.Module | None = None) -> Activations:
    """Watch one module, and the children of a container, in one forward."""
    activations = Activations()
    with probing(context):
        module.register_forward_hook(lambda _, args, output: activations.see(output))
        for child in container.children() if container is not None else ():
            child.register_forward_hook(lambda child, *_: activations.siblings.update([id(child)]))
        activations.outputs = _outputs(context)
    return activations


def depended_on(context: PlanContext, module: nn.Module, activations: Activations) -> tuple[bool, bool]:
    """Whether the network's outputs change where the module's do, and whether it runs all of its children.

    One forward, in which every finite value that the module returns is moved by about a tenth of its size. What raises
    then, depends on it. A module that runs all of its children also runs one that is given to it.
    """
    generator = torch.Generator().manual_seed(5)
    witness = Witness()

    def moved(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return torch.where(output.isfinite(), output + 0.1 * noise * (output.abs() + 0.1), output)

    try:
        with probing(context):
            if NAME not in module._modules:
                module._modules[NAME] = witness
            module.register_forward_hook(moved)
            return not _same(activations.outputs, _outputs(context)), witness.called
    except Exception:
        return True, witness.called


def flows_through(context: PlanContext, module: nn.Module, rewire: Rewire, activations: Activations) -> bool:
    """Whether a new entry of a container is given what ``module`` returns, or is the last to run inside it.

    An identity stands in for it (one forward): the outputs must stay bit for bit, and every old entry run as before.

    Args:
        context: the network on the probe.
        module: what it is to stand behind.
        rewire: how the container would get it.
        activations: how things are now.
    """
    container = context.model.get_submodule(rewire.path)
    given: list[bool] = []
    latest: list[Any] = [None]
    inside = container is module
    stand_in = nn.Identity()

    def entered(_: nn.Module, args: Any, output: Any) -> None:
        given.append(inside or output is latest[0])
        latest[0] = output

    def left(_: nn.Module, args: Any, output: Any) -> None:
        given.append(not inside or output is latest[0])
        latest[0] = output

    called: Counter[int] = Counter()
    try:
        with probing(context):
            held = dict(container._modules)
            container._modules.clear()
            for name, child in rewire.children:
                container._modules[name] = stand_in if isinstance(child, New) else held[child or ""]
            stand_in.register_forward_hook(entered)
            module.register_forward_hook(left)
            for child in held.values():
                if child is not None:
                    child.register_forward_hook(lambda child, *_: called.update([id(child)]))
            outputs = _outputs(context)
    except Exception:  # the entries are called in a way of their own, or something counts them
        return False
    ran = len(given) > activations.count
    return ran and all(given) and called == activations.siblings and _same(activations.outputs, outputs)


def called_next(context: PlanContext, module: nn.Module) -> tuple[bool, str]:
    """Whether a module runs others inside, and the path of the first one that is called once it has returned, or ""."""
    inside, behind = list[str](), list[str]()
    returned: list[bool] = []
    within = set(module.modules())

    def entered(path: str, inner: bool) -> None:
        if inner or returned:
            (inside if inner else behind).append(path)

    with probing(context):
        module.register_forward_hook(lambda *_: returned.append(True))
        for path, other in context.model.named_modules():
            if other is not module and not isinstance(other, torch.jit.ScriptModule):
                other.register_forward_pre_hook(lambda *_, path=path, inner=other in within: entered(path, inner))
        context.run()
    return bool(inside), behind[0] if behind else ""


@contextlib.contextmanager
def probing(context: PlanContext) -> Iterator[None]:
    """Run the network on the probe inside."""
    with untouched(context.model), torch.no_grad():
        yield


def _outputs(context: PlanContext) -> list[Tensor]:
    return [t.detach().clone() for t in tensors_in(context.run())]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    if [(t.shape, t.dtype) for t in a] != [(t.shape, t.dtype) for t in b]:
        return False
    return all(bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in zip(a, b, strict=True))
