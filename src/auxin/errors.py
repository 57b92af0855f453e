"""The one error that auxin raises for what a user can mend."""


class GrowthError(RuntimeError):
    """A growth, a check or a checkpoint was refused; the message says what, where, and the call that works.

    Whatever raised it left the model, its companions and the files as they were.
    """


class BadMoment(GrowthError):
    """The network must not be changed right now; a Grower keeps its decision for the next call."""
