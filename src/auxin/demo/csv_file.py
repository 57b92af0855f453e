"""The user's own series, from a CSV file."""

import csv
import math
import os

import torch

from auxin.demo.series import DemoError, Task


def read_csv(
    path: str | os.PathLike[str], target: str, horizon: int, season: int = 1, identity: str | None = None
) -> Task:
    """One or several series from a CSV file with a header, rows in the order of time.

    Args:
        path: of the file.
        target: column of the values.
        horizon: how many values ahead to forecast; the last ``horizon`` of each series are kept for the test.
        season: values after which the pattern repeats, 12 for months; 1 where nothing does.
        identity: column that tells series apart; None: the file is one series.

    Raises:
        DemoError: what is wrong with the file, and in which row.
    """
    if horizon < 1 or season < 1:
        raise DemoError(f"horizon and season are whole numbers from 1, not {horizon} and {season}.")
    series = _columns(path, target, identity)
    needed = 3 * horizon + (season if season > 1 else 12)
    for label, values in series.items():
        if len(values) < needed:
            raise DemoError(
                f"{path}: series {label!r} has {len(values)} values; a horizon of {horizon} needs at least {needed} "
                f"(the last {horizon} to test, the {horizon} before to validate, the rest to train). "
                f"Choose a smaller --horizon, or leave this series out."
            )
    whole = [torch.tensor(values, dtype=torch.float64).float() for values in series.values()]
    return Task(
        name=f"{os.path.basename(path)}, {target}",
        histories=[values[:-horizon] for values in whole],
        futures=torch.stack([values[-horizon:] for values in whole]),
        labels=list(series),
        season=season,
    )


def _columns(path: str | os.PathLike[str], target: str, identity: str | None) -> dict[str, list[float]]:
    """Label -> values."""
    series: dict[str, list[float]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            for option, column in (("--target", target), ("--id", identity)):
                if column is not None and column not in columns:
                    known = ", ".join(columns) or "none, the file is empty"
                    raise DemoError(f"{path} has no column {column!r} ({option}); its columns: {known}.")
            for row in reader:
                value = _number(row[target], f"{path}, row {reader.line_num}, column {target!r}")
                label = target if identity is None else str(row[identity])
                series.setdefault(label, []).append(value)
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DemoError(f"{path} is not a CSV file in UTF-8: {error}.") from error
    if not series:
        raise DemoError(f"{path} has a header and no rows.")
    return series


def _number(text: str | None, where: str) -> float:
    try:
        value = float((text or "").strip())
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DemoError(
            f"{where}: {text!r} is not a number. Write numbers as 1234.5, and fill or drop rows without a value."
        )
    return value
