"""The one error that auxin raises for what a user can mend."""


class GrowthError(RuntimeError):
    """A growth, a check or a checkpoint was refused; the message says what, where, and the call that works.

    Whatever raised it left the model, its companions and the files as they were.
    """


class BadMoment(GrowthError):
    """The network must not be changed right now; a Grower keeps its decision for the next call."""


def reason(error: BaseException) -> str:
    """What an exception says, for a sentence; its type where it says nothing, or a key or a number alone."""
    text, kind = str(error).strip().removesuffix("."), type(error).__name__
    return kind if not text else f"{kind}: {text}" if isinstance(error, (KeyError, SystemExit)) else text


def about_arguments(error: BaseException) -> bool:
    """Whether a call failed because its arguments are not those that the function takes."""
    return isinstance(error, TypeError) and "argument" in str(error)
