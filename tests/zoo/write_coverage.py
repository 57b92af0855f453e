"""Runs Duplicate on every list of the zoo and writes what came of it as a page: `make zoo`."""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from architectures import NAMES
from block_lists import BlockList, block_lists
from judged import judged
from minilm import FADE, NEEDS, STEPS, figures, packaged
from models import build, has_timm
from trials import Outcome, duplicate

HEAD = """# Coverage: Duplicate on real architectures

Written by `make zoo`; every figure is measured by it. Architectures of Hugging Face transformers and timm, small, of
random weights with noise on all parameters; eager attention, float32, one CPU thread. `Duplicate` copies the last block
of each list once. A list is a ModuleList or Sequential with a block that is called once and keeps the shape of what it
is given.

- **zeroed**: the last writers of the copy are zero. **gate**: the copy fades in (`stock=False`, until the gate is
  folded). **refused**: with the reason below, everything left as it was.
- **max d**: of the outputs before and after.
- **stock**: saved with `save_pretrained` and opened by transformers alone, the outputs are the same (to 1e-6).
  *no*: the configuration cannot say the new depth; it grows with `stock=False`.
- **generates**: greedy tokens with a cache are those without.
- **peak**: the largest loss in 20 steps of AdamW (learning rate 1e-3, no decay) after the growth, over that of the
  ungrown model trained alike. Every new tensor moved whose source did.
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
    for blocks in block_lists(*make(), inner=inner):
        outcome = duplicate(make, blocks, train=not inner)
        rows.append((kind, name, blocks, outcome, judged(name, outcome, inner), inner))
    return rows


def summary(rows: list[Row]) -> Iterator[str]:
    yield "| kind | models | lists | zeroed | gate | refused | wrong | exact |"
    yield "|---|---|---|---|---|---|---|---|"
    for kind, title in KINDS.items():
        found = [row for row in rows if row[0] == kind]
        count = {v: sum(row[3].verdict == v for row in found) for v in ("zeroed", "gate", "refused", "wrong")}
        share = 100 * (count["zeroed"] + count["gate"]) / len(found) if found else 0
        cells = [title, len({row[1] for row in found}), len(found), *count.values(), f"{share:.0f} %"]
        if found:
            yield "| " + " | ".join(map(str, cells)) + " |"


def table(rows: list[Row]) -> Iterator[str]:
    yield "| architecture | list | blocks | how | max d | stock | generates | peak |"
    yield "|---|---|---|---|---|---|---|---|"
    for _, name, blocks, outcome, _, _ in rows:
        grown = outcome.verdict != "refused"
        stock = {"refused": "when folded" if outcome.verdict == "gate" else "no", "same": "yes"}
        cells = [name, f"`{blocks.at}`", blocks.length, outcome.verdict, f"{outcome.difference:.2g}" if grown else ""]
        cells += [stock.get(outcome.stock, outcome.stock) if grown else "", outcome.generates]
        yield "| " + " | ".join(map(str, [*cells, f"{outcome.peak:.2f}" if grown else ""])) + " |"


def reasons(rows: list[Row]) -> Iterator[str]:
    for _, name, blocks, outcome, _, _ in rows:
        if outcome.why and outcome.verdict != "gate":
            yield f"- {name}, `{blocks.at}` ({outcome.verdict}): {outcome.why[:400]}"


def page(rows: list[Row], encoder: str) -> Iterator[str]:
    outer, inner = [row for row in rows if not row[5]], [row for row in rows if row[5]]
    yield HEAD
    yield from summary(outer)
    yield "\nLists inside blocks of other lists (the stages of staged models, and much that only looks like blocks):\n"
    yield from summary(inner)
    yield f"\n## A pretrained encoder\n\n{encoder}"
    for kind, title in KINDS.items():
        found = [row for row in outer if row[0] == kind]
        if found:
            yield f"\n## {title}\n"
            yield from table(found)
            yield ""
            yield from reasons(found)


def pretrained() -> str:
    if packaged() is None:
        return f"Not run: {NEEDS}."
    with tempfile.TemporaryDirectory() as directory:
        found = figures(Path(directory))
    return (
        f"all-MiniLM-L6-v2 (post-norm), 6 layers to {found.layers} through the gate: normalised embeddings changed by "
        f"{found.difference:.1g}. Trained for {STEPS} steps (fade-in over {FADE}) the contrastive loss went from "
        f"{found.loss_before:.3f} to {found.loss_after:.3f}; {'every' if found.moved else 'NOT every'} new tensor "
        f"moved; {found.gates_left} gates were left. Saved, and opened by transformers alone, the embeddings differ by "
        f"{found.stock:.1g}."
    )


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
    print("\n".join(bad) or f"{len(rows)} lists: as expected", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
