"""When the demo's network grows: a trigger of its own, as any user may write one."""

import math
from typing import Any

from auxin import when
from auxin.when import Reading


class WhileItPays:
    """Grow on every plateau of the validation error, until growing has stopped paying.

    That is when ``tries`` plateaus in a row have come without a new best between them.

    Args:
        patience: readings without an improvement that make a plateau.
        cooldown: readings after a growth that do not count.
        tries: plateaus without a new best before them that end it.
    """

    def __init__(self, patience: int, cooldown: int, tries: int):
        self.plateau = when.plateau(patience=patience, cooldown=cooldown)
        self.tries = tries
        self.best = math.inf
        self.best_before = math.inf
        self.in_vain = 0

    def __call__(self, reading: Reading) -> bool:
        """Whether to grow now."""
        self.best = min(self.best, math.inf if reading.metric is None else reading.metric)
        if self.in_vain >= self.tries or not self.plateau(reading):
            return False
        self.in_vain = 0 if self.best < self.best_before else self.in_vain + 1
        self.best_before = self.best
        return self.in_vain < self.tries

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        own = {"best": self.best, "best_before": self.best_before, "in_vain": self.in_vain}
        return own | {"plateau": self.plateau.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.best, self.best_before, self.in_vain = state["best"], state["best_before"], state["in_vain"]
        self.plateau.load_state_dict(state["plateau"])
