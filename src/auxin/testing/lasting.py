"""The checks on what outlives the process: journal, replay, checkpoint."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from auxin.anatomy.wrappers import networks_of
from auxin.checkpoint import load, save
from auxin.gate import close_gate, gated
from auxin.grower import Grower
from auxin.journal import Journal, references, replay
from auxin.randomness import random_state
from auxin.refs import Allowed
from auxin.testing.before import counts_of, state_of
from auxin.testing.checks import Grown, eval_outputs, fail, gap
from auxin.testing.exact import digest
from auxin.testing.run import Run

EXTRA = {"epoch": 3}


def journal(grown: Grown) -> Journal:
    """Through JSON and back, equal."""
    written = Journal()
    written.record(grown.run.model, grown.change)
    data = written.to_json()
    text = json.dumps(data, allow_nan=False)
    read = Journal.from_json(json.loads(text), Allowed.of(grown.recipe.model, references(grown.change.edit)))
    if json.dumps(read.to_json(), allow_nan=False) != text:
        fail("journal", "what was read from JSON is written differently")
    if repr(read.entries[0].edit) != repr(written.entries[0].edit):
        fail("journal", f"the edit came back as {read.entries[0].edit!r}, it was {written.entries[0].edit!r}")
    return read


def replays(grown: Grown, read: Journal) -> None:
    """On the meta device and on a fresh network: the same names, shapes, dtypes; with the weights the same outputs."""
    if opaque(grown):
        return
    live = copy.deepcopy(grown.run.model)
    for _, block in list(gated(live)):  # a journal holds what stays
        close_gate(block)
    wanted = _layout(live)
    bare = grown.recipe.run().model
    for where, fresh in (("the meta device", copy.deepcopy(bare).to("meta")), ("a fresh network", bare)):
        replay(fresh, read)
        found = _layout(fresh)
        if found != wanted:
            wrong = next((a for a in wanted if a not in found), "the order, or something more")
            fail("replay", f"on {where} the structure is another one: {wrong}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in live.parameters():  # moved, since zeroed writers would hide what stands before them
            if p.is_floating_point():
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    bare.load_state_dict(live.state_dict())
    outputs = [eval_outputs(model, grown.recipe.probe) for model in (live, bare)]
    if (difference := gap(*outputs)) > 0:
        fail("replay", f"with the same weights the outputs of a replayed network differ by {difference:.3g}")


def opaque(grown: Grown) -> bool:
    """Whether a surgery could not be written down as data; noted."""
    needs = getattr(grown.change.edit, "needs", None)
    if needs is not None:
        grown.notes.append(f"not replayed or loaded: {needs}")
    return needs is not None


class Saved:
    """A checkpoint of a run as it is, and how to go on from it in fresh objects."""

    def __init__(self, grown: Grown):
        self.grown, self._directory = grown, tempfile.TemporaryDirectory()
        grower = _grower(grown.run, grown)
        grower.record(grown.change)
        save(grower, self._directory.name, extra=EXTRA)

    def goes_on(self, steps: int, seed: int) -> None:
        """Load and train: to the bit what the run that went on has."""
        fresh = self.grown.recipe.run()
        with self._directory as path, random_state(seed=0):
            extra = load(path, _grower(fresh, self.grown), allow=references(self.grown.change.edit))
        if extra != EXTRA:
            fail("checkpoint", f"extra={EXTRA} came back as {extra!r}")
        fresh.train(steps, seed)
        for (what, ours), (_, theirs) in zip(_contents(self.grown.run), _contents(fresh), strict=True):
            for key in [*ours, *(k for k in theirs if k not in ours)]:
                if ours.get(key) != theirs.get(key):
                    fail("checkpoint", f"{steps} steps after loading {what} {key} is not as in the run that went on")


def _grower(run: Run, grown: Grown) -> Grower:
    return Grower(run.model, *run.optimizers, *run.companions, group=grown.group)  # it grows nothing itself


def _contents(run: Run) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Everything that a run consists of, by name, to the bit."""
    copies = [(f"{type(a).__name__}'s", copy) for a in run.averages for copy in networks_of(a)]
    for what, network in [("the network's", run.model), *copies]:
        yield what, {n: digest(t) for n, t in (*network.named_parameters(), *network.named_buffers())}
    for average in run.averages:
        yield f"{type(average).__name__}'s", counts_of(average)
    names = {id(p): n for n, p in run.model.named_parameters()}
    for optimizer in run.optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        facts = {names.get(id(p), "a foreign tensor"): state_of(optimizer, p) for p in held}
        kind = f"{type(optimizer).__name__}'s"
        yield kind, {f"{k} of {n}": bits for n, own in facts.items() for k, (_, bits) in own.items()}
        yield kind, {"order": [names.get(id(p)) for p in held]}
    yield "options of group", {str(i): repr(options) for i, options in enumerate(run.options())}
    for companion in run.others:
        own = companion.state_dict() if hasattr(companion, "state_dict") else {}
        yield f"{type(companion).__name__}'s", {k: repr(v) for k, v in own.items() if not k.startswith("_schedulers")}


def _layout(model: nn.Module) -> list[Any]:
    parameters = [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]
    buffers = [(n, b.shape, b.dtype) for n, b in model.named_buffers(remove_duplicate=False)]
    return [*parameters, *buffers, *((n, type(m)) for n, m in model.named_modules())]
