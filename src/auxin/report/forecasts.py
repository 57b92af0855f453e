"""A few forecasts beside what happened, as small multiples."""

import math
from collections.abc import Iterable, Mapping, Sequence

from auxin.report.figure import Table, behind, number
from auxin.report.figures import finite, significant
from auxin.report.markup import Markup, shorten, tag
from auxin.report.plot import chart, curve, layered, percent, short, value_axis
from auxin.report.scale import Point, spread, thin, value_scale

MOST = 6
_HEIGHT, _COLUMNS = 150.0, 60
_ROWS = 24  # of the table behind
_HORIZONS = 3  # of history that are drawn, so that the forecast has room
_KEYS = {"history": "history", "actual": "what happened", "forecast": "forecast"}


def forecast_section(forecasts: Iterable[Mapping]) -> Markup | None:
    """One small chart each: history, then what happened and what was forecast; None without forecasts.

    Args:
        forecasts: {"title": str, "history": numbers, "actual": numbers, "forecast": numbers}; the last two
            begin where the history ends.
    """
    panels = [_panel(position, forecast) for position, forecast in enumerate(list(forecasts)[:MOST], start=1)]
    if not panels:
        return None
    key = [tag("span", tag("span", class_=f"swatch {name}", aria_hidden="true"), text) for name, text in _KEYS.items()]
    return tag(
        "section",
        tag("h2", "Forecasts", id="forecasts"),
        tag("p", *key, class_="key"),
        tag("div", *panels, class_="panels"),
        aria_labelledby="forecasts",
    )


def _panel(position: int, forecast: Mapping) -> Markup:
    values = {key: _numbers(forecast.get(key)) for key in _KEYS}
    ahead = max(len(values["actual"]), len(values["forecast"]), 1)
    history = _points(values["history"][-_HORIZONS * ahead :], 0)
    actual, predicted = (_points(values[key], len(history)) for key in ("actual", "forecast"))
    last = max(len(history) + ahead - 1, 1)
    y = value_scale([value for points in (history, actual, predicted) for _, value in points], log=False, pieces=3)
    joint = history[-1:]
    lines = {"history": history, "actual": joint + actual, "forecast": joint + predicted}
    title = shorten(forecast.get("title") or f"Forecast {position}", 80)
    error = _error(actual, predicted)
    now = percent((len(history) - 1) / last) if history else "0%"
    picture = chart(
        f"forecast-{position}",
        title,
        f"The last {len(history)} values of history, then {len(predicted)} forecast. {error}",
        _HEIGHT + 16,
        value_axis(y, 8, _HEIGHT, 3),
        tag("line", class_="mark", x1=now, x2=now, y1="8", y2=short(_HEIGHT + 8)),
        layered(8, _HEIGHT, *(curve(_placed(line, last), y, _HEIGHT, key) for key, line in lines.items())),
    )
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), tag("span", error, class_="note") if error else None),
        tag("div", picture, class_="plot small"),
        behind(_table(values), title),
    )


def _table(values: Mapping[str, Sequence[float]]) -> Table:
    """What happened and what was forecast, value by value."""
    actual, predicted = (list(values[key]) for key in ("actual", "forecast"))
    ahead = max(len(actual), len(predicted))
    lines = [line + [math.nan] * (ahead - len(line)) for line in (actual, predicted)]
    rows = [[str(at + 1), *(number(line[at]) for line in lines)] for at in spread(ahead, _ROWS)]
    caption = f"{'All' if len(rows) == ahead else f'{len(rows)} of'} {ahead:,} values ahead."
    return Table(caption, ["Ahead", "What happened", "Forecast"], rows, frozenset({0, 1, 2}))


def _numbers(values: object) -> list[float]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        return []
    numbers = (finite(value) for value in values)
    return [math.nan if number is None else number for number in numbers]


def _placed(line: Sequence[Point], last: int) -> list[Point]:
    """At most some points per pixel, along the plot."""
    kept = thin([value for _, value in line], _COLUMNS)
    return [(line[at][0] / last, line[at][1]) for at in kept]


def _points(values: Sequence[float], start: int) -> list[Point]:
    return [(float(start + index), value) for index, value in enumerate(values)]


def _error(actual: list[Point], predicted: list[Point]) -> str:
    """The mean absolute error over the steps that have both."""
    both = min(len(actual), len(predicted))
    gaps = [abs(a[1] - b[1]) for a, b in zip(actual[:both], predicted[:both], strict=True)]
    gaps = [gap for gap in gaps if not math.isnan(gap)]
    return f"Mean absolute error {significant(sum(gaps) / len(gaps), 3)}" if gaps else ""
