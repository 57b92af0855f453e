"""Runs Duplicate on every list of the zoo and writes what came of it as a page: `make zoo`."""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.metadata
import importlib.util
import logging
import multiprocessing
import re
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from architectures import NAMES
from block_lists import BlockList, block_lists
from judged import judged
from minilm import NEEDS, figures, packaged
from models import build, has_timm
from trials import RATES, Outcome, duplicate, ungrown

HEAD = """# Coverage: Duplicate on real architectures

Written by `make zoo`, which measures every figure; here with {versions}.
The models are small, of random weights with noise on all parameters (those of timm in full size, on small images);
eager attention, float32, one CPU thread. `Duplicate` copies the last block of each list once. A list is a ModuleList or
Sequential with a block that is called once and keeps the shape of what it is given; lists inside the blocks of another
list are counted apart, at the end. Models without a list (albert's layers are one) are left out.

{summary}

- **zeroed**: the last writers of the copy are zero. **gate**: the copy fades in (`stock=False`, until the gate is
  folded). **refused**: for the reason below the table, everything left as it was. **wrong**: none may be.
- **exact**: share of the lists that grew, the outputs before and after being equal. **max d**: by how much they differ.
- **stock**: saved with `save_pretrained` and opened by transformers alone, the outputs are the same (to 1e-6).
  *when folded*: once the gate has opened. *no*: the configuration cannot say the new depth, or says more by it; such a
  model grows with `stock=False`.
- **generates**: greedy tokens with a cache are those without.
- **trained**: the largest loss in 20 steps of AdamW (learning rate 1e-3, no decay) after the growth, over that of the
  ungrown model trained alike. Where the ungrown model does not bear that rate (its loss more than doubles), both are
  trained at a tenth of it, a hundredth, a thousandth; the rate is then in parentheses. A fade-in takes 100 steps at
  1e-3, ten times as many at 1e-4, and so on. *none bearable*: the ungrown model's loss leaps at 1e-6 too. Every new
  tensor moved whose source did.
"""
KINDS = {
    "causal": "Causal language models",
    "encoder": "Encoders",
    "seq2seq": "Encoder-decoders",
    "vision": "Vision",
    "audio": "Audio",
    "series": "Time series",
    "timm": "timm",
}
Row = tuple[str, str, BlockList, Outcome, str, bool]


def trial(job: tuple[str, str, bool]) -> list[Row]:
    """All lists of one architecture; ``inner`` for those inside blocks of other lists, which are not trained."""
    kind, name, inner = job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    make, rows = functools.partial(build, name), []
    lists = block_lists(*make(), inner=inner)
    beside = ungrown(make) if lists and not inner else None
    for blocks in lists:
        outcome = duplicate(make, blocks, beside)
        rows.append((kind, name, blocks, outcome, judged(name, outcome, inner), inner))
    return rows


def summary(rows: list[Row]) -> Iterator[str]:
    yield "| | models | lists | zeroed | gate | refused | wrong | exact |"
    yield "|---|---|---|---|---|---|---|---|"
    for title, kinds in (*((title, {kind}) for kind, title in KINDS.items()), ("**All**", set(KINDS))):
        found = [row for row in rows if row[0] in kinds]
        count = {v: sum(row[3].verdict == v for row in found) for v in ("zeroed", "gate", "refused", "wrong")}
        share = 100 * (count["zeroed"] + count["gate"]) / len(found) if found else 0
        cells = [title, len({row[1] for row in found}), len(found), *count.values(), f"{share:.1f} %"]
        if found:
            yield "| " + " | ".join(map(str, cells)) + " |"


def table(rows: list[Row]) -> Iterator[str]:
    """One line for each model."""
    text = any(row[3].generates for row in rows)
    head = ["model", "lists", "blocks", "how", "max d", *(["stock"] if any(row[3].stock for row in rows) else [])]
    head += ["generates", "trained"] if text else ["trained"]
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for name in dict.fromkeys(row[1] for row in rows):
        found = [row for row in rows if row[1] == name]
        cells = dict.fromkeys(head, "") | line([row[2] for row in found], [row[3] for row in found])
        yield "| " + " | ".join([name, *(cells[column] for column in head[1:])]) + " |"


def line(lists: list[BlockList], outcomes: list[Outcome]) -> dict[str, str]:
    """The cells of one model, by column."""
    patterns = collections.Counter(re.sub(r"\d+", "*", one.at) if len(lists) > 1 else one.at for one in lists)
    depths = sorted({one.length for one in lists})
    verdicts = collections.Counter(one.verdict for one in outcomes)
    cells = {
        "lists": ", ".join(f"`{pattern}`" + (f" ({n})" if n > 1 else "") for pattern, n in patterns.items()),
        "blocks": str(depths[0]) if len(depths) == 1 else f"{depths[0]} to {depths[-1]}",
        "how": ", ".join(f"{n} {verdict}" if len(outcomes) > 1 else verdict for verdict, n in verdicts.items()),
    }
    grown = [one for one in outcomes if one.verdict != "refused"]
    if grown:
        stock = {"same": "yes", "": ""}
        said = (stock.get(o.stock, {"gate": "when folded"}.get(o.verdict, "no")) for o in grown)
        rate = min(one.rate for one in grown)
        cells["max d"] = f"{max(one.difference for one in grown):.2g}"
        cells["stock"] = ", ".join(dict.fromkeys(said))
        cells["generates"] = ", ".join(dict.fromkeys(one.generates for one in grown))
        peak = max(one.peak for one in grown)
        cells["trained"] = f"{peak:.2f}" + (f" ({rate:.0e})" if rate != RATES[0] else "") if peak else "none bearable"
    return cells


def reasons(rows: list[Row]) -> Iterator[str]:
    for _, name, blocks, outcome, _, _ in rows:
        if outcome.why and outcome.verdict != "gate":
            what = "not stock" if outcome.verdict == "zeroed" else outcome.verdict
            yield f"- {name}, `{blocks.at}`, {what}: {_cut(outcome.why)}"


def _cut(text: str, limit: int = 320) -> str:
    """Whole sentences, as far as they fit."""
    if len(text) <= limit:
        return text
    end = text.rfind(". ", 0, limit)
    return text[: end + 1] if end > 60 else text[: text.rfind(" ", 0, limit)] + " ..."


def page(rows: list[Row], encoder: str) -> Iterator[str]:
    outer, inner = [row for row in rows if not row[5]], [row for row in rows if row[5]]
    names = [name for name in ("torch", "transformers", "timm") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    yield HEAD.format(versions=versions, summary="\n".join(summary(outer)))
    yield f"## A pretrained encoder\n\n{encoder}"
    for kind, title in KINDS.items():
        found = [row for row in outer if row[0] == kind]
        if found:
            yield f"\n## {title}\n"
            yield from table(found)
            yield from ("", *reasons(found))
    yield "\n## Lists inside blocks of other lists\n"
    yield "The stages of staged models, and much that only looks like blocks. They are not trained.\n"
    yield from summary(inner)


def pretrained() -> str:
    if packaged() is None:
        return f"Not run: {NEEDS}."
    with tempfile.TemporaryDirectory() as directory:
        return "\n".join(textwrap.wrap(str(figures(Path(directory))), 120))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    kinds = [kind for kind in asked.kinds if kind != "timm" or has_timm()]
    jobs = [(kind, name, inner) for kind in kinds for name in NAMES[kind] for inner in (False, True)]
    rows: list[Row] = []
    encoder = pretrained()
    with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        for done in pool.imap(trial, jobs):
            rows += done
            for _, name, blocks, outcome, _, _ in done:
                print(f"{name} {blocks.at}: {outcome.verdict}", flush=True)
    asked.out.write_text("\n".join(page(rows, encoder)).rstrip() + "\n")
    bad = [row[4] for row in rows if row[4]]
    print(encoder, *summary([row for row in rows if not row[5]]), sep="\n")
    print("\n".join(bad) or f"{len(rows)} lists: as expected", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
