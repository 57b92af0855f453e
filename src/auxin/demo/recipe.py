"""Every setting of the demo; docs/demo.md says which others were tried, and how they scored on validation months."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, at any depth, grown or not.

    Attributes:
        dim: width of the network.
        budget: training FLOPs of one run; the same for every depth, so that deeper networks take fewer steps.
        batch: windows per step.
        learning_rate: of AdamW, after the warm-up.
        warmup: steps of linear warm-up.
        flat: share of the budget after which the learning rate falls, in a line, to 0.
        hold: share of the budget during which the last months of every series are held out for validation, and
            in which alone a network may grow; afterwards these months are trained on too.
        readings: validations over a whole budget; those of the first ``hold`` take place.
        patience: readings without an improvement after which a network grows.
        cooldown: readings after a growth that do not count.
        tries: plateaus without a new best between them, in a row, that end growing.
        growths: at most, whatever else is true.
        stride: every how many-th series is validated, where there are many.
        extra_members: grown networks in the ensemble beyond one per seed.
        smoke: whether this is a smoke test, whose numbers mean nothing.
    """

    dim: int = 128
    budget: float = 200e9
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    flat: float = 0.65
    hold: float = 0.3
    readings: int = 100
    patience: int = 2
    cooldown: int = 1
    tries: int = 2
    growths: int = 7
    stride: int = 3
    extra_members: int = 2
    smoke: bool = False

    def quick(self) -> "Recipe":
        """A smoke test: a fiftieth of the budget; the numbers mean nothing then."""
        return replace(self, budget=self.budget / 50, warmup=5, readings=60, extra_members=0, smoke=True)

    def for_windows(self, count: int) -> "Recipe":
        """The budget for ``count`` training windows: that of the M3 series per window, but never under a tenth."""
        share = min(1.0, max(0.1, count / 75_000))
        return replace(self, budget=self.budget * share, warmup=round(self.warmup * share))
