"""``Widen(init="tiny")`` and ``"gradmax"``: new units from second moments of the evidence."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auxin import score
from auxin.anatomy.probe import PlanContext, untouched
from auxin.anatomy.tree import join
from auxin.anatomy.widths.groups import Width, closure
from auxin.anatomy.widths.running import alike_in_train_mode
from auxin.anatomy.widths.starts import Begun
from auxin.anatomy.widths.tried import standing
from auxin.change import Assign, Swap
from auxin.errors import GrowthError
from auxin.evidence import Evidence
from auxin.listing import in_words, module_at
from auxin.statistics import Pair, PairMoments, measured
from auxin.statistics.places import LAYERS

DATA = ("tiny", "gradmax", "gradmax-in")
LIMIT = 2**33  # bytes of second moments; a growth is refused beyond them
DEAD = 1e-12  # of the second moment of the unit that is the most active
ALIKE = 0.9999  # |cos| between what two units say


@dataclasses.dataclass(frozen=True, eq=False)
class _Units:
    """New units between two layers.

    Attributes:
        pair: the layers.
        rows: incoming weights, (i, k), with the row for the bias.
        columns: outgoing weights, (K o, k).
        biased: whether ``rows`` ends with one for the bias.
    """

    pair: Pair
    rows: Tensor
    columns: Tensor
    biased: bool

    def scaled(self, rows: float | Tensor, columns: float | Tensor) -> _Units:
        return dataclasses.replace(self, rows=self.rows * rows, columns=self.columns * columns)


def data_start(
    model: nn.Module,
    width: Width,
    begun: Begun,
    assigns: Sequence[Assign],
    init: str,
    context: PlanContext,
    where: str,
) -> Begun:
    """Give the new units of a width weights that the evidence asks for.

    ``tiny``: the units that do most while old weights stay, each with the better sign, both factors times the root of
    the gamma of lowest loss. (Taking away first what a change of the old weights could do, as the paper does, brought
    less on the digits: the old weights do not move in this growth.)
    ``gradmax``: outgoing zero, incoming in the directions of the largest gradient (out0). ``gradmax-in``: incoming
    zero, outgoing in those directions (in0).

    Args:
        model: the network; nothing is written to it.
        width: what grows.
        begun: the start with zeros.
        assigns: attributes that change.
        init: a name in ``DATA``.
        context: holds the evidence.
        where: for messages.

    Raises:
        GrowthError: there is no evidence, the width is not one between two layers, the data ask for fewer units, or no
            amplitude lowers the loss.
    """
    evidence = context.evidence
    if not isinstance(evidence, Evidence):
        raise GrowthError(
            f"{where}: init={init!r} looks at data: pass evidence=auxin.Evidence(loss, batches) to grow, or to the "
            "Grower."
        )
    pairs = {_pair(model, width, atom, where, init): by for atom, by in width.growth.values()}
    with untouched(model):
        grow = _Grown(model, width, begun, assigns, evidence, where)
        seen: list[Tensor] = []

        def noted(network: nn.Module, batch: Any) -> Tensor:
            value = evidence.loss(network, batch)
            seen.extend([value.detach()] if isinstance(value, Tensor) else [])
            return value

        noting = dataclasses.replace(evidence, loss=noted)
        moments = measured(model, noting, list(pairs), quiet=True, guarded=False, limit=LIMIT)
        if init == "tiny":
            before = mean_loss(model, evidence) if evidence.validation is not None else mean_of(seen)
            tiny = grow.tiny({pair: (moments[pair], by) for pair, by in pairs.items()}, before)
            return alike_in_train_mode(model, tiny, assigns, context)
        found = []
        for pair, by in pairs.items():
            A, O, _ = score.gradmax(moments[pair], by)  # noqa: E741
            found.append(_Units(pair, A, O, moments[pair].biased[0]))
        return grow.silent_in(found) if init == "gradmax-in" else grow.silent_out(found)


class _Grown:
    """The wider network, as it would be with some units."""

    def __init__(
        self,
        model: nn.Module,
        width: Width,
        begun: Begun,
        assigns: Sequence[Assign],
        evidence: Evidence,
        where: str,
    ):
        self.model, self.begun, self.assigns = model, begun, assigns
        self.evidence, self.where = evidence, where
        self.born = {m.name: (torch.tensor(m.index) < 0).nonzero().flatten() for m in width.members}

    def tiny(self, asked: dict[Pair, tuple[PairMoments, int]], before: float) -> Begun:
        """Both factors times the root of the gamma of lowest loss; ``before`` is the loss as it is."""
        units = []
        for pair, (moments, by) in asked.items():
            new = score.tiny(moments, by, joint=False)
            units.append(_Units(pair, new.A, new.O, moments.biased[0]))
        units, gain = self._signed(units, {pair: moments.M for pair, (moments, _) in asked.items()})
        heard: list[tuple[Any, Any]] = []

        def loss_at(gamma: float) -> float:
            if heard or self.evidence.validation is not None:
                return self._loss(units, gamma)
            with self._hearing(units, heard):  # the first one tells what the units say too
                return self._loss(units, gamma)

        loss, gamma = lowest(loss_at, before, gain)
        if not loss < before:
            raise GrowthError(
                f"{self.where}: init='tiny': no amplitude of the new units lowers the loss on the evidence "
                f"({before:.4g}), so there is nothing that they could add there. init='zero' starts them at random."
            )
        units = [one.scaled(math.sqrt(gamma), math.sqrt(gamma)) for one in units]
        self._name_idle(units, heard)
        part = 100 * (loss - before) / abs(before) if before else 0.0
        remark = f"loss on the evidence {before:.4g} -> {loss:.4g} ({part:+.0f} %), scale {gamma:.3g}"
        return self._with(units, "units that the evidence asks for", False, remark)

    def silent_out(self, units: list[_Units]) -> Begun:
        """Outgoing zero; incoming as long as old rows, with the sign of the larger gradient."""
        scaled = [one.scaled(self._length(one), 0.0) for one in units]
        seen = self._silent(scaled)
        flipped = [one.scaled(-1.0, 1.0) for one in scaled]
        signs = []
        for one, other in zip(seen, self._silent(flipped), strict=True):
            larger = other.square().sum(1) > one.square().sum(1)
            signs.append(torch.where(larger, -1.0, 1.0).double())
        scaled = [one.scaled(sign.to(one.rows), 1.0) for one, sign in zip(scaled, signs, strict=True)]
        self._name_idle(scaled)
        return self._with(scaled, "incoming weights of the largest gradient, read with zero weights", True)

    def silent_in(self, units: list[_Units]) -> Begun:
        """Incoming zero; refused where no gradient would come to them."""
        scaled = []
        for one in units:
            old = module_at(self.model, one.pair.consumer).get_parameter("weight").detach()
            lengths = old.double().transpose(0, 1).flatten(1).norm(dim=1)
            scaled.append(one.scaled(0.0, 0.5 * float(lengths.mean())))
        for one, slope in zip(scaled, self._slopes(scaled), strict=True):
            if not slope:
                raise GrowthError(
                    f"{self.where}: init='gradmax-in': with incoming weights of 0 no gradient comes back through what "
                    f"stands behind {one.pair.producer}, as through torch's ReLU, whose derivative at 0 is 0: the new "
                    "units would never learn. init='gradmax' puts the zeros on the other side."
                )
        return self._with(scaled, "outgoing weights of the largest gradient, made by zero weights", True)

    def _signed(self, units: list[_Units], linear: dict[Pair, Tensor | None]) -> tuple[list[_Units], float]:
        """Each unit with the sign that brings more, through what really stands between the layers; and what all bring.

        s(z) - s(-z) is z for ReLU, GELU and SiLU, so one pass says both; of odd functions both signs are the same.
        """
        signed, brought = [], 0.0
        for one, M_new in zip(units, self._silent(units), strict=True):
            M = linear[one.pair]
            assert M is not None
            both = one.rows.T @ M
            plus = score.gain(M_new, one.columns)
            minus = score.gain(both - M_new, one.columns)
            sign = torch.where(minus > plus, -1.0, 1.0).to(one.rows)
            signed.append(one.scaled(sign, sign))
            brought += float(torch.maximum(plus, minus).sum())
        return signed, brought

    def _silent(self, units: list[_Units]) -> list[Tensor]:
        """Of each pair, M_new, (unit, place of the kernel and output), with outgoing weights of zero."""
        muted = [one.scaled(1.0, 0.0) for one in units]
        told = []
        for one, M_H in zip(units, self._asked(muted, [one.pair.consumer for one in units]), strict=True):
            weight = module_at(self.model, one.pair.consumer).get_parameter("weight")
            new = self.born[join(one.pair.consumer, "weight")].to(M_H.device)
            K = weight[0, 0].numel()
            rows = (new.unsqueeze(1) * K + torch.arange(K, device=new.device)).flatten()
            told.append(M_H[rows].view(len(new), -1))
        return told

    def _slopes(self, units: list[_Units]) -> list[bool]:
        """Whether a gradient comes back to incoming weights of zero."""
        made = [one.pair.producer or "" for one in units]
        asked = zip(made, self._asked(units, made), strict=True)
        return [bool(M_H[:, self.born[join(path, "weight")]].any()) for path, M_H in asked]

    def _asked(self, units: list[_Units], paths: list[str]) -> list[Tensor]:
        """M_H of each of these layers of the wider network."""
        places = [Pair(None, path, direct=True) for path in paths]
        with standing(self.model, self._swaps(units), self.assigns):
            found = measured(self.model, self.evidence, places, quiet=True, guarded=False, limit=LIMIT)
        return [found[place].M_H for place in places]

    def _loss(self, units: list[_Units], gamma: float) -> float:
        root = math.sqrt(gamma)
        swaps = self._swaps([one.scaled(root, root) for one in units])
        with standing(self.model, swaps, self.assigns):
            return mean_loss(self.model, self.evidence)

    def _length(self, one: _Units) -> float:
        old = module_at(self.model, one.pair.producer or "").get_parameter("weight").detach()
        return float(old.double().flatten(1).norm(dim=1).mean())

    def _swaps(self, units: list[_Units]) -> list[Swap]:
        """The tensors of the wider network with these units."""
        values: dict[str, Callable[[Tensor], None]] = {}
        for one in units:
            values |= self._writers(one)
        swaps = []
        for swap in self.begun.swaps:
            write = values.get(join(swap.path, swap.name))
            if write is not None and swap.value is not None:
                value = swap.value.clone()
                write(value)
                swap = dataclasses.replace(swap, value=value)
            swaps.append(swap)
        return swaps

    def _writers(self, one: _Units) -> dict[str, Callable[[Tensor], None]]:
        made, read = join(one.pair.producer or "", "weight"), join(one.pair.consumer, "weight")
        bias = join(one.pair.producer or "", "bias")
        rows = one.rows[:-1] if one.biased else one.rows

        def make(value: Tensor) -> None:
            new = self.born[made]
            value[new] = rows.T.reshape(len(new), *value.shape[1:]).to(value)

        def shift(value: Tensor) -> None:
            value[self.born[bias]] = one.rows[-1].to(value)

        def reads(value: Tensor) -> None:
            new, outputs, kernel = self.born[read], value.shape[0], value.shape[2:]
            columns = one.columns.view(-1, outputs, len(new)).permute(1, 2, 0)
            value[:, new] = columns.reshape(outputs, len(new), *kernel).to(value)

        return {made: make, read: reads, **({bias: shift} if one.biased else {})}

    def _with(self, units: list[_Units], how: str, preserves: bool, *remarks: str) -> Begun:
        swaps = self._swaps(units)
        return dataclasses.replace(self.begun, swaps=swaps, how=how, preserves=preserves, remarks=remarks)

    def _name_idle(self, units: list[_Units], heard: Sequence[tuple[Any, Any]] = ()) -> None:
        """Warn of new units that say nothing on the evidence, or what another unit says.

        Args:
            units: the new ones.
            heard: what a forward has told of them already; it does not matter at which amplitude.
        """
        for one, (size, cosine) in zip(units, self._said(units, heard), strict=True):
            new = self.born[join(one.pair.consumer, "weight")].tolist()
            dead = [unit for unit in new if not size[unit] > DEAD * size.max()]
            alike = [unit for unit, most in zip(new, cosine, strict=True) if unit not in dead and most > ALIKE]
            for units_of, what in ((dead, "say nothing"), (alike, "say what another unit, or the bias, says")):
                if units_of:
                    names = in_words([f"{one.pair.producer}[{unit}]" for unit in units_of])
                    warnings.warn(f"{self.where}: on the evidence {names} {what}.", stacklevel=2)

    def _said(self, units: list[_Units], heard: Sequence[tuple[Any, Any]]) -> list[tuple[Tensor, Tensor]]:
        """By pair: the sum of squares of each unit that the consumer reads, and each new one's |cos| to its nearest.

        Where nothing was heard, one forward of the wider network over the evidence.
        """
        found = list(heard)
        if not found:
            with self._hearing(units, found), standing(self.model, self._swaps(units), self.assigns), torch.no_grad():
                for batch in self.evidence.batches:
                    self.evidence.loss(self.model, batch)
        told = []
        for (size, products), one in zip(found, units, strict=True):
            mine = self.born[join(one.pair.consumer, "weight")]
            norm = size.clamp(min=torch.finfo(size.dtype).tiny).sqrt()
            cosine = (products / norm / norm[mine].unsqueeze(1)).abs()
            cosine[torch.arange(len(mine)), mine] = 0.0
            told.append((size, cosine.amax(1)))
        return told

    @contextlib.contextmanager
    def _hearing(self, units: list[_Units], found: list[tuple[Any, Any]]) -> Iterator[None]:
        """Let ``found`` take sums over what the consumers read inside, by pair: squares, and products with new units.

        Where a consumer has a bias, it counts as a unit.
        """
        found[:] = [(0.0, 0.0) for _ in units]
        new = [self.born[join(one.pair.consumer, "weight")] for one in units]

        def listen(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def read(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
                rows = (args[0] if isinstance(layer, nn.Linear) else args[0].movedim(1, -1)).flatten(0, -2)
                rows = F.pad(rows, (0, 1), value=1.0) if layer.bias is not None else rows
                size, products = found[number]
                products = products + (rows[:, new[number].to(rows.device)].T @ rows).double()
                found[number] = size + rows.square().sum(0, dtype=torch.float64), products

            return read

        handles = []
        try:
            for number, one in enumerate(units):
                layer = module_at(self.model, one.pair.consumer)
                handles.append(layer.register_forward_pre_hook(listen(number)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pair(model: nn.Module, width: Width, atom: object, where: str, init: str) -> Pair:
    """The two layers on either side of the units that one atom counts.

    Raises:
        GrowthError: there are others.
    """
    one = closure(width.trace, [width.growth[id(atom)]])
    holders: dict[str, set[str]] = {"out": set(), "in": set()}
    for member in one.members:
        path, _, name = member.name.rpartition(".")
        if member.role in holders and name == "weight":
            holders[member.role].add(path)
    made, read = sorted(holders["out"]), sorted(holders["in"])
    fits = len(made) == len(read) == 1 and made != read
    if not fits or not all(isinstance(module_at(model, path), LAYERS) for path in (*made, *read)):
        raise GrowthError(
            f"{where}: init={init!r} is for units between two layers, Linear or convolution; here {in_words(made)} "
            f"make{'s' * (len(made) == 1)} them and {in_words(read) or 'nothing'} read{'s' * (len(read) == 1)} them. "
            "init='zero' or 'split' would do."
        )
    return Pair(made[0], read[0], direct=True)


def mean_loss(model: nn.Module, evidence: Evidence) -> float:
    """The mean loss that judges an amplitude, on validation batches where there are any; infinite if not finite."""
    batches = evidence.batches if evidence.validation is None else evidence.validation
    with torch.no_grad():
        return mean_of([evidence.loss(model, batch) for batch in batches])


def mean_of(losses: Sequence[Tensor]) -> float:
    """Their mean; infinite if not finite."""
    mean = sum(map(float, losses)) / len(losses)
    return mean if math.isfinite(mean) else math.inf


def lowest(loss: Callable[[float], float], before: float, gain: float) -> tuple[float, float]:
    """The lowest loss and its gamma.

    It begins at the gamma at which the parabola through the loss at 0, its slope there and the loss at 1 is lowest,
    looks at half and twice of it, goes on by factors of 4 while the best is at an end, and tries the lowest point of a
    parabola in log gamma through the best and both sides of it.

    Args:
        loss: of a gamma.
        before: its value at 0.
        gain: minus its slope at 0.
    """
    known: dict[float, float] = {}

    def at(exponent: float) -> float:
        if exponent not in known:
            known[exponent] = loss(2.0**exponent)
        return known[exponent]

    def best() -> float:
        return min(known, key=at)

    bend = at(0.0) - before + gain
    if gain > 0 and 0 < bend < math.inf:
        at(round(4 * min(max(math.log2(gain / (2 * bend)), -12.0), 12.0)) / 4)
    for _ in range(4):
        middle = best()
        low, high = at(middle - 1), at(middle + 1)
        if best() == middle:
            if 0 < low - 2 * known[middle] + high < math.inf:
                at(middle + (low - high) / (2 * (low - 2 * known[middle] + high)))
            break
        onwards = math.copysign(2.0, best() - middle)
        for _ in range(22):  # as far as 2^-44 and 2^44
            end = best()
            at(end + onwards)
            if best() == end:
                break
    return known[best()], 2.0 ** best()
