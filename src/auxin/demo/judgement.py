"""Which of the plans to follow, judged by pilots of each on validation data."""

import math
from collections import deque
from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode

from auxin.demo.more_compute import PLANS, Bench, planned

FLATTENING = 1 / 2

Pilot = tuple[float, float]  # share of the steps that the plan would take, and the error on the validation part


@dataclass(frozen=True)
class Judgement:
    """What the pilots have said.

    Attributes:
        pilots: of each plan, the shorter one first; of going on there is only the longer one.
        flops: that all of it has cost, validations and checks of growths included.
    """

    pilots: dict[str, list[Pilot]]
    flops: float

    @property
    def errors(self) -> dict[str, float]:
        """What each plan is expected to end at."""
        return {plan: expected(pilots) for plan, pilots in self.pilots.items()}

    @property
    def plan(self) -> str:
        """The plan to follow."""
        return min(self.errors, key=lambda plan: self.errors[plan])

    def __str__(self) -> str:
        lines = []
        for plan, pilots in self.pilots.items():
            told = ", ".join(f"{error:.4f} after {100 * share:.0f} % of the steps" for share, error in pilots)
            lines.append(f"  {plan:<10}  {told}; expected at the end: {self.errors[plan]:.4f}")
        return "\n".join([*lines, f"auxin judges: {self.plan}, for {self.flops / 1e9:.3g} GFLOP"])


def expected(pilots: list[Pilot]) -> float:
    """Where the error is at all of the steps, if it goes on falling as a power of them.

    Learning curves flatten, so of the exponent between the two pilots a half is taken. An error that has risen from
    one pilot to the next is expected to stay, and so is that of a network that goes on: its curve is flat already.
    """
    long, error = pilots[-1]
    if len(pilots) == 1:
        return error
    short, before = pilots[0]
    slope = min(0.0, math.log(error / before) / math.log(long / short))
    return error * long ** (-FLATTENING * slope)


def judge(old: Bench, flops: float) -> Judgement:
    """Try every plan for a part of its steps, on small batches and with a decay of its own; then all is as before.

    Args:
        old: the network that is there.
        flops: to be spent by the plan that is followed.
    """
    validation, spent = old.data.validation, 0.0
    pilots: dict[str, list[Pilot]] = {plan: [] for plan in PLANS}
    for plan in PLANS:
        for share in old.setting.pilots[-1:] if plan == "go on" else old.setting.pilots:
            with old.branch():
                before = old.spent
                bench, losses = planned(plan, old, flops, share)
                deque(losses, maxlen=0)
                with FlopCounterMode(display=False) as counter:
                    error = validation.error(validation.forecast(bench.network))
                pilots[plan].append((share, error))
                spent += bench.spent - before + counter.get_total_flops()
    return Judgement(pilots, spent)
