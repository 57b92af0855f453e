"""Tries every optimizer, average and schedule of other packages and writes what came of it: `make companions`."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import logging
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import hanging_trial
import optimizer_trial
from optimizer_trial import COLUMNS, Cell, cell
from their_averages import AVERAGES
from their_optimizers import PACKAGES, is_in, names, untried
from their_schedules import SCHEDULES

HEAD = """# Companions of other packages: what was tried, and what came of it

Written by `make companions`, which measures every cell; here with {versions}. Each companion trains a small residual
MLP for {warm} steps, and then

- **grow**: one block is copied in (`Duplicate`). While its own gradients are zero, the old parameters have to step as
  in a run that never grew (1e-6 relative); its own first eight steps have to be those that a fresh optimizer makes
  (2 %). An average keeps its old tensors to the bit; a schedule keeps its rates.
- **state**: `state="copy"`: the copied tensors step as their source does, and the state of old ones is untouched.
- **wider**: a layer gets 8 units more (`Widen`). Old entries have to step as without them; where a step is reckoned
  over the whole tensor (Muon, trust ratios), it has to keep its direction (cosine above 0.95) and its length within a
  factor of 2: *as a whole*.
- **rates**: under a schedule, a group of its own at half the rate stays at half, and steps half as far.
- **save, load**: another process loads the checkpoint and goes on to the bit.
- **undo**: all is as before the growth, to the bit, and goes on so.
- **surgery**: a block is put in by hand inside `auxin.surgery`; old parameters as under **grow**.

Every optimizer is registered in one line, `auxin.follow(Kind, like=torch.optim.AdamW)`; averages are followed without
one; schedules that are no `LRScheduler` with `like=LRScheduler`.

**yes** is right; **refused** is refused by name, before anything is touched, for the reason of that number below;
**wrong** is neither, and none may be. Nothing here was run on a GPU, and nothing compiled.

{summary}
"""
TITLES = {"average": "Averages", "schedule": "Schedules"}
Row = dict[str, Cell]


def kind_of(name: str) -> str:
    return "average" if name in AVERAGES else "schedule" if name in SCHEDULES else "optimizer"


def _hush() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)


def _directory(root: str, name: str) -> Path:
    found = Path(root) / name.replace(" ", "_").replace(",", "")
    found.mkdir(exist_ok=True)
    return found


def trial(job: tuple[str, str]) -> tuple[str, Row]:
    """All columns of one companion, in this process."""
    _hush()
    of = optimizer_trial if kind_of(job[0]) == "optimizer" else hanging_trial
    return job[0], of.trial(job[0], _directory(job[1], job[0]))


def load(job: tuple[str, str]) -> tuple[str, Cell]:
    """The other half of ``save, load``, in a process that has seen nothing of the first."""
    _hush()
    of = optimizer_trial if kind_of(job[0]) == "optimizer" else hanging_trial
    return job[0], cell(of.loaded, job[0], _directory(job[1], job[0]))


def summary(rows: dict[str, Row]) -> Iterator[str]:
    yield "| | tried | right in all that was not refused | refused as a whole | wrong |"
    yield "|---|---|---|---|---|"
    for kind in ("optimizer", "average", "schedule"):
        found = [row for name, row in rows.items() if kind_of(name) == kind]
        verdicts = [{one.verdict for one in row.values()} for row in found]
        counts = [
            sum("right" in v and "wrong" not in v for v in verdicts),
            sum(v == {"refused"} for v in verdicts),
            sum("wrong" in v for v in verdicts),
        ]
        yield f"| {kind}s | {len(found)} | {' | '.join(map(str, counts))} |"


def table(rows: dict[str, Row], reasons: dict[str, int]) -> Iterator[str]:
    """One line for each companion."""
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in rows.items():
        shown = [_shown(name, row[column], reasons) if column in row else "" for column in columns]
        whole = {one.verdict for one in row.values()} == {"refused"} and len(set(shown)) == 1
        yield f"| {name} | " + " | ".join(shown) + " |" if not whole else f"| {name} | {shown[0]}{' |' * len(columns)}"


def _shown(name: str, one: Cell, reasons: dict[str, int]) -> str:
    if one.verdict == "right":
        return "as a whole" if one.why.startswith("as a whole") else "no rate" if "no " in one.why else "yes"
    why = _first(re.sub(rf"\b{name.split()[-1]}\b", "*it*", one.why))
    return f"**{one.verdict}** {reasons.setdefault(why, len(reasons) + 1)}"


def _first(text: str, limit: int = 230) -> str:
    """The beginning of a reason, without what differs from name to name."""
    text = " ".join(text.split()).replace("|", "/").replace("][", r"]\[")  # no table's border, no link
    text = re.sub(r"\(\d+(, \d+)*,?\)", "(...)", text)
    text = re.sub(r"(inf|[\d.]+) times that on a toy", "another length on a toy", text)
    return text if len(text) <= limit else text[: text.rfind(" ", 0, limit)] + " ..."


def page(rows: dict[str, Row]) -> Iterator[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _installed())
    yield HEAD.format(versions=versions, warm=optimizer_trial.WARM, summary="\n".join(summary(rows)))
    reasons: dict[str, int] = {}
    for kind, title in TITLES.items():
        yield f"## {title}\n"
        yield from (*table({n: row for n, row in rows.items() if kind_of(n) == kind}, reasons), "")
    for module, package in PACKAGES.items():
        found = {n: row for n, row in rows.items() if kind_of(n) == "optimizer" and n.startswith(f"{module}.")}
        if found:
            short = {name.removeprefix(f"{module}."): row for name, row in found.items()}
            yield from (f"## Optimizers of {package}\n", *table(short, reasons), "")
    yield "## Why\n"
    yield from (f"{number}. {why}" for why, number in reasons.items())
    left = [name for name in names() if name not in rows]
    if left:
        listed = ", ".join(f"`{name}`" for name in left)
        yield f"\n## Left out of this page\n\n`make companions` runs these too: {listed}."
    yield "\n## Not tried\n"
    groups = collections.defaultdict(list)
    for name, why in untried():
        groups[why].append(f"`{name}`")
    yield from (f"- {why}: {', '.join(found)}" for why, found in groups.items())


def _installed() -> list[str]:
    wanted = ("torch", *PACKAGES.values(), "ema-pytorch", "torch-ema", "diffusers", "transformers", "pytorch-warmup")
    known = {found.metadata["Name"] for found in importlib.metadata.distributions()}
    return [name for name in wanted if name in known]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of names")
    parser.add_argument("--rows", type=Path, help="file of rows that are known already; new ones are added")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    lines = asked.rows.read_text().splitlines() if asked.rows is not None and asked.rows.exists() else []
    known = {name: {c: Cell(**v) for c, v in row.items()} for name, row in map(json.loads, lines)}
    order = [*AVERAGES, *SCHEDULES, *names()]
    wanted = [name for name in order if is_in(name, asked.only) and name not in known]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        with context.Pool(asked.jobs) as first, context.Pool(asked.jobs) as second:
            for name, row in first.imap_unordered(trial, [(name, root) for name in wanted]):
                if row["save, load"].verdict == "right":
                    row["save, load"] = second.apply(load, ((name, root),))[1]
                known[name] = row
                print(name, *(f"{c}: {v.verdict} {v.why}" for c, v in row.items() if v.verdict == "wrong"), flush=True)
                if asked.rows is not None:
                    with asked.rows.open("a") as file:
                        file.write(json.dumps([name, {c: dataclasses.asdict(v) for c, v in row.items()}]) + "\n")
    rows = {name: known[name] for name in order if name in known}
    asked.out.write_text("\n".join(page(rows)).rstrip() + "\n")
    wrong = [name for name, row in rows.items() if any(one.verdict == "wrong" for one in row.values())]
    print(*summary(rows), *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
