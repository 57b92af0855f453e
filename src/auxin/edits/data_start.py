"""``Widen(init="tiny")`` and ``"gradmax"``: new units from second moments of the evidence."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from auxin import score
from auxin.anatomy.probe import PlanContext, untouched
from auxin.anatomy.tree import join
from auxin.anatomy.widths.groups import Width, closure
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
        moments = measured(model, evidence, list(pairs), quiet=True, guarded=False, limit=LIMIT)
        if init == "tiny":
            return grow.tiny({pair: (moments[pair], by) for pair, by in pairs.items()})
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

    def tiny(self, asked: dict[Pair, tuple[PairMoments, int]]) -> Begun:
        """Both factors times the root of the gamma of lowest loss."""
        before = mean_loss(self.model, self.evidence)
        units = []
        for pair, (moments, by) in asked.items():
            new = score.tiny(moments, by, joint=False)
            units.append(_Units(pair, new.A, new.O, moments.biased[0]))
        units = self._signed(units, {pair: moments.M for pair, (moments, _) in asked.items()})
        loss, gamma = lowest(lambda gamma: self._loss(units, gamma))
        if not loss < before:
            raise GrowthError(
                f"{self.where}: init='tiny': no amplitude of the new units lowers the loss on the evidence "
                f"({before:.4g}), so there is nothing that they could add there. init='zero' starts them at random."
            )
        units = [one.scaled(math.sqrt(gamma), math.sqrt(gamma)) for one in units]
        self._name_idle(units)
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
            larger = other[1].square().sum(1) > one[1].square().sum(1)
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

    def _signed(self, units: list[_Units], linear: dict[Pair, Tensor | None]) -> list[_Units]:
        """Each unit with the sign that brings more, through what really stands between the layers.

        s(z) - s(-z) is z for ReLU, GELU and SiLU, so one pass says both; of odd functions both signs are the same.
        """
        signed = []
        for one, (_, M_new) in zip(units, self._silent(units), strict=True):
            M = linear[one.pair]
            assert M is not None
            both = one.rows.T @ M
            plus = score.gain(M_new, one.columns)
            minus = score.gain(both - M_new, one.columns)
            sign = torch.where(minus > plus, -1.0, 1.0).to(one.rows)
            signed.append(one.scaled(sign, sign))
        return signed

    def _silent(self, units: list[_Units]) -> list[tuple[Tensor, Tensor]]:
        """Of each pair, what all its units say (their second moments) and M_new, with outgoing weights of zero."""
        muted = [one.scaled(1.0, 0.0) for one in units]
        places = [Pair(None, one.pair.consumer) for one in units]
        with standing(self.model, self._swaps(muted), self.assigns):
            found = measured(self.model, self.evidence, places, quiet=True, guarded=False, limit=LIMIT)
        told = []
        for one, place in zip(units, places, strict=True):
            S_H, M_H = found[place].hidden("Widen")
            weight = module_at(self.model, one.pair.consumer).get_parameter("weight")
            new = self.born[join(one.pair.consumer, "weight")].to(M_H.device)
            K = weight[0, 0].numel()
            rows = (new.unsqueeze(1) * K + torch.arange(K, device=new.device)).flatten()
            told.append((S_H, M_H[rows].view(len(new), -1)))  # (unit, place of the kernel and output)
        return told

    def _slopes(self, units: list[_Units]) -> list[bool]:
        """Whether a gradient comes back to incoming weights of zero."""
        muted = self._swaps(units)
        places = [Pair(None, one.pair.producer or "") for one in units]
        with standing(self.model, muted, self.assigns):
            found = measured(self.model, self.evidence, places, quiet=True, guarded=False, limit=LIMIT)
        return [
            bool(found[place].hidden("Widen")[1][:, self.born[join(one.pair.producer or "", "weight")]].any())
            for one, place in zip(units, places, strict=True)
        ]

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

    def _name_idle(self, units: list[_Units]) -> None:
        """Warn of new units that say nothing on the evidence, or what another unit says."""
        for one, (S_H, _) in zip(units, self._silent(units), strict=True):
            new = self.born[join(one.pair.consumer, "weight")].tolist()
            K = module_at(self.model, one.pair.consumer).get_parameter("weight")[0, 0].numel()
            size = S_H.diagonal()[: len(S_H) - len(S_H) % K].view(-1, K).sum(1) if K > 1 else S_H.diagonal()
            dead = [unit for unit in new if not size[unit] > DEAD * size.max()]
            norm = S_H.diagonal().clamp(min=torch.finfo(S_H.dtype).tiny).sqrt()
            cosine = (S_H / norm / norm.unsqueeze(1)).abs().fill_diagonal_(0)
            alike = [unit for unit in new if unit not in dead and K == 1 and cosine[unit].max() > ALIKE]
            for units_of, what in ((dead, "say nothing"), (alike, "say what another unit, or the bias, says")):
                if units_of:
                    names = in_words([f"{one.pair.producer}[{unit}]" for unit in units_of])
                    warnings.warn(f"{self.where}: on the evidence {names} {what}.", stacklevel=2)


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
        losses = [float(evidence.loss(model, batch)) for batch in batches]
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf


def lowest(loss: Callable[[float], float]) -> tuple[float, float]:
    """The lowest loss and its gamma, on a geometric grid that extends while the best is at an end.

    Steps of 4 from 2^-6 to 2^4, then of 2 and of the root of 2 around the best.
    """
    known: dict[float, float] = {}

    def at(exponent: float) -> float:
        if exponent not in known:
            known[exponent] = loss(2.0**exponent)
        return known[exponent]

    for exponent in range(-6, 5, 2):
        at(exponent)
    for _ in range(20):  # from 2^-46 to 2^44
        best = min(known, key=at)
        if best not in (min(known), max(known)):
            break
        at(best + math.copysign(2, best - sum((min(known), max(known))) / 2))
    for step in (1.0, 0.5):
        best = min(known, key=at)
        at(best - step)
        at(best + step)
    best = min(known, key=at)
    return known[best], 2.0**best
