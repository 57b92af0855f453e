"""Where statistics are taken, and what is refused there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from auxin.anatomy.tree import is_scripted
from auxin.dynamo import CALL, is_wrapper
from auxin.errors import GrowthError
from auxin.listing import module_at
from auxin.statistics.rows import CONVOLUTIONS, Geometry

LAYERS = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True)
class Pair:
    """Two layers with hidden units between them: the producer makes them, the consumer reads them.

    Args:
        producer: path of a Linear or a convolution; None: only what the consumer reads is looked at.
        consumer: path of a Linear or a convolution.
        direct: only X and D, for units that leave old weights as they are: S_X and M are all that is taken, and M_H
            alone where there is no producer.

    Examples:
        >>> Pair("blocks.0.up", "blocks.0.down")
        Pair('blocks.0.up', 'blocks.0.down')
    """

    producer: str | None
    consumer: str
    direct: bool = False

    def __repr__(self) -> str:
        return f"Pair({self.producer!r}, {self.consumer!r}{', direct=True' * self.direct})"


@dataclass(frozen=True)
class Site:
    """The output of a module, behind which a layer could be inserted.

    Args:
        at: path of a module that returns one floating tensor.
        axis: of the channels; None: 1 behind convolutions and wherever there are four axes or more, else the last one.
    """

    at: str
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class Proposal:
    """New units between the layers of a pair, whose exact first-order gain is wanted.

    Args:
        A: incoming weights, (i, k): as many rows as X has columns, the one for a bias included.
        activation: what the network does with a unit between the layers, e.g. ``torch.relu``, on a tensor whose last
            axis is the k units.
    """

    A: Tensor
    activation: Callable[[Tensor], Tensor]


def layer_at(model: nn.Module, path: str, where: str, eager: bool) -> nn.Module:
    """The layer at ``path``; ``eager`` says that nothing runs compiled.

    Raises:
        GrowthError: statistics cannot be taken of it.
    """
    layer = seen_at(model, path, where, eager)
    if not isinstance(layer, LAYERS) or type(layer).forward not in [kind.forward for kind in LAYERS]:
        raise GrowthError(
            f"{where}: {path} is a {type(layer).__name__}; pairs are made of nn.Linear and nn.Conv1d to nn.Conv3d with "
            "their own forward. Name the layers inside it, or take Site(path)."
        )
    if isinstance(layer, CONVOLUTIONS) and layer.groups != 1:
        raise GrowthError(f"{where}: {path} has groups={layer.groups}; pairs are made of convolutions with groups=1.")
    return layer


def seen_at(model: nn.Module, path: str, where: str, eager: bool) -> nn.Module:
    """The module at ``path``, if a hook on it would be called.

    Raises:
        GrowthError: it would not: something there is compiled or scripted.
    """
    module = module_at(model, path, where)
    parts = path.split(".") if path else []
    above = [module_at(model, ".".join(parts[:i]), where) for i in range(len(parts) + 1)]
    for outer in above:
        if not eager and (is_wrapper(outer) or outer.__dict__.get(CALL) is not None):
            refuse_compiled(outer, path, where)
        if is_scripted(outer):
            raise GrowthError(f"{where}: {path} stands in a scripted {type(outer).__name__}, which calls no hooks.")
    return module


def refuse_compiled(outer: nn.Module, path: str, where: str) -> None:
    """Say that no hook is called there."""
    raise GrowthError(
        f"{where}: {path or 'the network'} stands in a compiled {type(outer).__name__}, where hooks that come later "
        "are not called. Take statistics by a pass, auxin.statistics.measured(model, evidence, ...), which runs it as "
        "written, or watch before compiling."
    )


def matching(pair: Pair, producer: Geometry, consumer: Geometry, where: str) -> None:
    """Refuse a pair whose rows cannot be matched."""
    if len(producer.kernel) != len(consumer.kernel):
        raise GrowthError(
            f"{where}: {pair.producer} and {pair.consumer} do not walk over the same axes (one is a Linear, or has "
            f"another number of spatial axes), so that rows of one are not rows of the other. Pair(None, "
            f"{pair.consumer!r}) looks at the second alone."
        )
    if producer.outputs != consumer.channels:
        raise GrowthError(
            f"{where}: {pair.producer} makes {producer.outputs} channels and {pair.consumer} reads "
            f"{consumer.channels}. A pair is two layers with nothing between them but norms, activations and products "
            f"of units. Pair(None, {pair.consumer!r}) looks at the second alone."
        )
    if consumer.mode != "zeros":
        raise GrowthError(f"{where}: {pair.consumer} has padding_mode={consumer.mode!r}; a consumer pads with zeros.")
