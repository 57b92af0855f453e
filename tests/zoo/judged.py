"""What is wrong with an outcome, in words, or nothing."""

from architectures import NOT_STOCK, REFUSED
from trials import Outcome

PEAK = 1.2  # times the largest loss of the ungrown model


def judged(name: str, outcome: Outcome, inner: bool = False) -> str:
    """What is not as it should be; of lists inside blocks only that a growth was right or refused."""
    if outcome.verdict == "wrong" or outcome.generates == "differs":
        return f"{name} {outcome.at}: {outcome.why or 'generating with a cache differs'}"
    if inner:
        return ""
    reason = REFUSED.get((name, outcome.at))
    if (outcome.verdict == "refused") != (reason is not None) or (reason or "") not in outcome.why:
        return f"{name} {outcome.at}: {outcome.verdict}, {outcome.why!r}, not {reason!r}"
    if outcome.still or not outcome.peak <= PEAK:
        return f"{name} {outcome.at}: left behind {outcome.still}, peak {outcome.peak:.2f} times the ungrown model's"
    return _stock(name, outcome) if outcome.verdict != "refused" else ""


def _stock(name: str, outcome: Outcome) -> str:
    """Only a gate, or a configuration that cannot say the depth, keeps a model from being stock."""
    if outcome.stock in ("", "same"):
        return ""
    known = NOT_STOCK.get(name, "fades in" if outcome.verdict == "gate" else None)
    fine = outcome.stock == "refused" and known is not None and known in outcome.why
    return "" if fine else f"{name} {outcome.at}: {outcome.stock}, {outcome.why}"
