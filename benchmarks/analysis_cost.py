"""What looking costs before anything grows: forwards of the network, and forwards of blocks for each block list.

    python benchmarks/analysis_cost.py [--zoo [names ...]]

Counted for ``sites(model, probe)``, for the plan of ``After`` at each kind of site, and for the plan of ``Duplicate``
by one on each block list, which has a line of its own; a pair of block forwards is one question "does the block return
its input?", asked on two inputs. Seconds are ratios to one forward of the network measured beside them. The proof of a
growth, two more forwards and a backward, is not part of it. ``--zoo``: the models of ``tests/zoo``, all or those named,
timm's where it is installed.
"""

import argparse
import contextlib
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import auxin as ax
from auxin.anatomy.probe import PlanContext

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width=256, heads=4):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(*[self.norm(x)] * 3, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth=6):
        super().__init__()
        self.stem, self.blocks = nn.Linear(32, 256), nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Counted(contextlib.AbstractContextManager):
    """Counts forwards of a network, and of modules of one class outside of them (copies of a block)."""

    def __init__(self, model, kind=None):
        self.model, self.kind, self.whole, self.blocks, self.inside, self.depth = model, kind, 0, 0, False, 0

    def __enter__(self):
        before, after = self.before, self.after
        self.handles = [
            nn.modules.module.register_module_forward_pre_hook(before),
            nn.modules.module.register_module_forward_hook(after, always_call=True),
        ]
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.started
        for handle in self.handles:
            handle.remove()

    def before(self, module, args):
        if module is self.model:
            self.whole += 1
            self.inside = True
        elif self.kind is not None and type(module) is self.kind:
            self.blocks += not self.inside and self.depth == 0
            self.depth += 1

    def after(self, module, args, output):
        if module is self.model:
            self.inside = False
        elif self.kind is not None and type(module) is self.kind:
            self.depth -= 1


def measured(name, model, args, kwargs):
    """One row: (name, [forwards of sites], ...) and what is over the limits."""
    probe = tuple(args) if args else dict(kwargs)
    model.eval()
    times = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            model(*args, **kwargs)
            times.append(time.perf_counter() - started)
    once = min(times)
    ax.sites(model, probe)  # the first one imports what it needs
    with Counted(model) as looking:
        found = ax.sites(model, probe)
    fitting = {re.sub(r"\d+", "*", site.at): site.at for site in reversed(found) if not site.why_not}
    behind = []
    for at in fitting.values():
        with Counted(model) as counted, contextlib.suppress(ax.GrowthError):
            ax.After(at).plan(model, PlanContext(model, probe))
        behind.append((counted.whole, counted.seconds))
    copied = []
    for site in found:
        if not any(text.startswith("Duplicate") for text in site.fits):
            continue
        blocks = model.get_submodule(site.at)
        with Counted(model, type(blocks[-1])) as counted, contextlib.suppress(ax.GrowthError):
            ax.Duplicate(site.at, by=1).plan(model, PlanContext(model, probe))
        copied.append((site.at, counted.whole, counted.blocks / 2, counted.seconds))
    forwards = [looking.whole, max((w for w, _ in behind), default=0), max((w for _, w, _, _ in copied), default=0)]
    row = f"{name:36}{len(found):6}{forwards[0]:7}{looking.seconds / once:8.1f}x"
    row += f"{forwards[1]:8}{statistics.median([s / once for _, s in behind] or [0]):8.1f}x"
    print(row, flush=True)
    for at, whole, pairs, seconds in copied:
        print(f"    {at:72}{whole:6}{pairs:9.1f}{seconds / once:8.0f}x", flush=True)
    return forwards, [pairs for _, _, pairs, _ in copied]


def zoo(names):
    """(name, model, args, kwargs) of the models of ``tests/zoo``."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoo"))
    import architectures
    import models

    every = [name for kind, some in architectures.NAMES.items() for name in some if kind != "timm" or models.has_timm()]
    for name in names or every:
        yield name, *models.build(name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--zoo", nargs="*", metavar="NAME")
    options = parser.parse_args()
    print(f"{'':42}  --- sites ---   --- After ---   ------ Duplicate ------")
    print(f"{'model, and its block lists':36}{'places':>6}{'runs':>7}{'time':>9}{'runs':>8}{'time':>9}", end="")
    print(f"{'runs':>7}{'pairs':>9}{'time':>9}")
    torch.manual_seed(0)
    own = [("pre-norm encoder, 6 blocks", Net(), (torch.randn(8, 64, 32),), {})]
    results = [measured(*one) for one in (own if options.zoo is None else zoo(options.zoo))]
    most = [max(forwards[i] for forwards, _ in results) for i in range(3)]
    pairs = [p for _, each in results for p in each]
    print(f"\n{len(results)} models; most forwards of a network: sites {most[0]}, After {most[1]}, Duplicate {most[2]}")
    if pairs:
        many = sum(p > 30 for p in pairs)
        print(
            f"{len(pairs)} block lists; pairs of block forwards: median {statistics.median(pairs):.1f}, most "
            f"{max(pairs):.1f}, more than 30 in {many}"
        )


if __name__ == "__main__":
    main()
