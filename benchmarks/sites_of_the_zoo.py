"""How many places of real models take a layer behind them? ``After`` at one site per name pattern, one by one.

    python benchmarks/sites_of_the_zoo.py [--out FILE] [--part K/N] [--coarse] [names ...]

The models are those of ``tests/zoo``, timm's where it is installed. A site is a submodule whose output is one floating
tensor of at least two dimensions; ``blocks.0.fc`` and ``blocks.1.fc`` are one pattern, with ``--coarse`` also
``layer1.conv2`` and ``layer2.conv1``. At each the default layer, ``x + P x`` with ``P`` zero, is grown, the network's
outputs are compared bit for bit with those before, and the growth is taken back. Where it is refused, everything must
be as it was.
"""

import argparse
import collections
import contextlib
import json
import re
import sys
import time
from pathlib import Path

import torch

import auxin as ax
from auxin.anatomy.probe import tensors_in
from auxin.engine import Options, begin, take_back

torch.set_num_threads(1)


def sites_of(model, args, kwargs, number):
    """Path of the first site of each name pattern."""
    found, handles = {}, []

    def note(path):
        def hook(module, args, output):
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.dim() >= 2:
                found.setdefault(path, True)
            else:
                found[path] = False

        return hook

    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_hook(note(path)))
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    patterns = {}
    for path, _ in model.named_modules():
        if found.get(path):
            patterns.setdefault(re.sub(number, "*", path), path)
    return list(patterns.values())


def state_of(model):
    """Everything that a refusal must leave: objects, values, hooks, configuration."""
    tensors = [(n, id(t), t.detach().clone()) for n, t in (*model.named_parameters(), *model.named_buffers())]
    modules = [(n, id(m), len(m._forward_hooks), m.training) for n, m in model.named_modules()]
    return tensors, modules, repr(getattr(model, "config", None))


def same_state(a, b):
    names = [(n, i) for n, i, _ in a[0]] == [(n, i) for n, i, _ in b[0]] and a[1:] == b[1:]
    return names and all(bits(x, y) for (_, _, x), (_, _, y) in zip(a[0], b[0], strict=True))


def bits(x, y):
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return bool(((x == y) | ((x != x) & (y != y))).all())


def outputs(model, args, kwargs):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return [t.clone() for t in tensors_in(model(*args, **kwargs))]


def tried(model, args, kwargs, at):
    """(result, what was said)."""
    before, state = outputs(model, args, kwargs), state_of(model)
    probe = tuple(args) if args else dict(kwargs)
    held = contextlib.ExitStack()
    try:
        change = begin(model, ax.After(at), (), Options(probe=probe, stock=False), held)
    except ax.GrowthError as error:
        if not same_state(state, state_of(model)):
            return "CHANGED BY A REFUSAL", str(error)
        return "refused", str(error)
    same = all(bits(x, y) for x, y in zip(before, outputs(model, args, kwargs), strict=True))
    way = "entry" if not change.edit.as_hook else "child"
    take_back(held)
    if not same_state(state, state_of(model)):
        return "NOT TAKEN BACK", ""
    return ("identical" if same else "DIFFERENT"), way


def reason(text):
    """The kind of a refusal, for counting."""
    for words in (
        "does not depend on",
        "no gradient reaches",
        "several",
        "runs all of its children",
        "never calls",
        "nothing in it would train",
        "gradient",
    ):
        if words in text:
            return words
    return text[:160]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--coarse", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoo"))
    import architectures
    import models

    every = [name for kind, some in architectures.NAMES.items() for name in some if kind != "timm" or models.has_timm()]
    part, parts = map(int, options.part.split("/"))
    total, reasons, rows = collections.Counter(), collections.Counter(), []
    for name in (options.names or every)[part::parts]:
        started = time.perf_counter()
        try:
            model, args, kwargs = models.build(name)
            paths = sites_of(model, args, kwargs, r"\d+" if options.coarse else r"(?<![^.])\d+(?![^.])")
        except Exception as error:  # a model of others that does not build here
            print(f"{name}: not built: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        counts = collections.Counter()
        for path in paths:
            result, text = tried(model, args, kwargs, path)
            counts[result] += 1
            rows.append({"model": name, "at": path, "result": result, "text": text})
            if result != "identical":
                reasons[f"{result}: {reason(text)}"] += 1
        total += counts
        told = ", ".join(f"{count} {result}" for result, count in counts.items())
        print(f"{name}: {len(paths)} sites: {told} ({time.perf_counter() - started:.0f} s)", flush=True)
        if options.out:
            Path(options.out).write_text("\n".join(map(json.dumps, rows)))
    print(f"all: {sum(total.values())} sites: {dict(total)}")
    for text, count in reasons.most_common():
        print(f"{count:5}  {text}")


if __name__ == "__main__":
    main()
