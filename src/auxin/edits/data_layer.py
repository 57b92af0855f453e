"""``After(init="tiny")``: the inserted layer that lowers the loss on the evidence at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from auxin import score
from auxin.anatomy.probe import untouched
from auxin.edits.data_start import lowest, mean_loss
from auxin.errors import GrowthError
from auxin.evidence import Evidence
from auxin.init import InitSite
from auxin.modules import ResidualLinear
from auxin.statistics import Site, measured


def by_data(init: Any, where: str) -> Any:
    """What ``init`` stands for behind a module: a start that looks at data for "tiny", else itself.

    Raises:
        GrowthError: it is "gradmax", which has nothing to choose there.
    """
    if isinstance(init, str) and init.startswith("gradmax"):
        raise GrowthError(
            f"{where}: init={init!r} chooses directions for new units. A layer x + P x has the whole gradient with P = "
            "0 already: leave init out, or pass init='tiny', which takes the first step at once."
        )
    return TinyLayer(where) if isinstance(init, str) and init == "tiny" else init


class TinyLayer:
    """P = gamma (dL/dP) S^-1, up to its sign, with the gamma of lowest loss on the evidence.

    Attributes:
        remarks: what it did, in words.
    """

    def __init__(self, where: str):
        self.where, self.__name__ = where, "tiny"
        self.remarks: tuple[str, ...] = ()

    def __call__(self, module: nn.Module, site: InitSite) -> None:
        """Write the weights of an ``x + P x``."""
        model, evidence = site.context.model, site.evidence
        if not isinstance(module, ResidualLinear):
            raise GrowthError(
                f"{self.where}: init='tiny' is for the layer x + P x that After(at) builds; leave layer out. For "
                f"{type(module).__name__} init='default' would run."
            )
        if not isinstance(evidence, Evidence):
            raise GrowthError(
                f"{self.where}: init='tiny' looks at data: pass evidence=auxin.Evidence(loss, batches) to grow, or to "
                "the Grower."
            )
        tap = site.tap
        place = Site(next(path for path, m in model.named_modules() if m is tap), module.axis)
        with untouched(model):
            moments = measured(model, evidence, [place], quiet=True, guarded=False)[place]
            step = score.sensitivity(moments, whitened=True)
            direction = step.direction
            before = mean_loss(model, evidence)

            def loss(gamma: float) -> float:
                def behind(_: nn.Module, args: Any, output: Tensor) -> Tensor:
                    P = gamma * direction.to(output)
                    return output + (output.movedim(module.axis, -1) @ P.T).movedim(-1, module.axis)

                handle = tap.register_forward_hook(behind)
                try:
                    return mean_loss(model, evidence)
                finally:
                    handle.remove()

            after, gamma = lowest(loss, before, step.score)
        if not after < before:
            raise GrowthError(
                f"{self.where}: init='tiny': no step of P lowers the loss on the evidence ({before:.4g}). Leave init "
                "out: the layer then starts with P = 0."
            )
        with torch.no_grad():
            module.weight.copy_(gamma * direction)
        part = 100 * (after - before) / abs(before)
        self.remarks = (f"loss on the evidence {before:.4g} -> {after:.4g} ({part:+.0f} %), scale {gamma:.3g}",)
