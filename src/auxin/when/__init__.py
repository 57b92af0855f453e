"""Triggers: when to grow. Any callable `when(reading) -> bool` is one; these are the common ones.

A trigger is called once for every `grower.step(...)`, and looks at nothing but its `Reading`. One that
remembers something has `state_dict()` and `load_state_dict()`; the values are numbers, so that they can be
stored as JSON. The arguments are not part of the state: a resumed run may use another patience. One that knows that
it will not fire any more says so by a true `done`; so does its Grower then.
"""

from auxin.when.auto import autogrow
from auxin.when.combined import all_of, any_of, cooldown
from auxin.when.counts import at, every
from auxin.when.decaying import not_while_decaying
from auxin.when.levels import plateau, threshold
from auxin.when.outside import file, signal
from auxin.when.reading import Mode, Reading, Trigger, Unit
from auxin.when.shift import drift
from auxin.when.spending import growth_pays
from auxin.when.trend import diverging, slope

__all__ = [
    "Mode",
    "Reading",
    "Trigger",
    "Unit",
    "all_of",
    "any_of",
    "at",
    "autogrow",
    "cooldown",
    "diverging",
    "drift",
    "every",
    "file",
    "growth_pays",
    "not_while_decaying",
    "plateau",
    "signal",
    "slope",
    "threshold",
]
