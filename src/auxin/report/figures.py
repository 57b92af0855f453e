"""Numbers as a reader wants them."""

import math
from collections.abc import Callable

_LARGEST = 1e100  # beyond, a number is as good as infinite, and differences would overflow
_SMALLEST = 1e-100


def finite(value: object) -> float | None:
    """`value` as a float, or None where it is no finite number (a bool is none)."""
    if type(value) is float and _SMALLEST <= value <= _LARGEST:
        return value  # nearly always: a log has millions of them
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError, RuntimeError):
        return None
    if not abs(number) <= _LARGEST:
        return None
    return number if abs(number) >= _SMALLEST else 0.0


def significant(value: object, digits: int = 4) -> str:
    """`digits` significant digits, scientific outside 1e-4 .. 1e6; what is no number as text.

    Examples:
        >>> significant(0.123456), significant(3.2e-8), significant(None)
        ('0.1235', '3.2e-8', '–')
    """
    number = finite(value)
    if number is None:
        return "–" if value is None else str(value)
    if number == 0:
        return "0"
    if not 1e-4 <= abs(number) < 1e6:
        mantissa, exponent = f"{number:.{min(2, digits - 1)}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(number))))
    return f"{number:,.{decimals}f}"


def whole(value: object) -> str:
    """A count with thousands separators: 33,408."""
    number = finite(value)
    return "–" if number is None else f"{round(number):,}"


def scaled(value: object, units: str = "kMBT", space: str = "") -> str:
    """Three significant digits and a letter for the thousands: 33.4k.

    Args:
        value: a count.
        units: one letter per factor of 1,000 (`"kMGTPE"` for operations).
        space: between the number and the letter.
    """
    number = finite(value)
    if number is None:
        return "–"
    power = 0
    while abs(number) >= 999.5 and power < len(units):
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if abs(number) < 999.5 else f"{number:.2e}"
    return digits + space + (units[power - 1] if power else "")


def duration(value: object) -> str:
    """Seconds for people: 8.2 s, 12 min 5 s, 3 h 20 min."""
    seconds = finite(value)
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def span(start: object, end: object, show: Callable[[object], str] = whole) -> str:
    """`1 → 4`, or one number where nothing changed or one end is unknown."""
    first, last = show(start), show(end)
    return last if first in (last, "–") else first if last == "–" else f"{first} → {last}"
