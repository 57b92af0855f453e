"""What one growth costs: a block into a 24-layer GPT of about 98 M parameters with AdamW, against doing it otherwise.

All ways run in turn in this one process; a figure is the median of their ratios round by round.
"""

import argparse
import copy
import statistics
import time

import torch
from gpt import GPT, Block, train

import auxin as ax
from auxin.anatomy.probe import PlanContext
from auxin.engine import TakeBack, transaction


def seconds(work) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def rebuilt(model: GPT, optimizer: torch.optim.Optimizer, build) -> float:
    """Build the deeper model, load the weights, map the optimizer's state by name."""
    start = time.perf_counter()
    deeper = build(len(model.blocks) + 1)
    last = len(model.blocks)
    state = model.state_dict()
    state |= {
        name.replace(f"blocks.{last - 1}.", f"blocks.{last}."): v
        for name, v in state.items()
        if f"blocks.{last - 1}." in name
    }
    deeper.load_state_dict(state)
    with torch.no_grad():
        for tensor in (deeper.blocks[last].proj, deeper.blocks[last].down):
            tensor.weight.zero_()
            tensor.bias.zero_()
    new = torch.optim.AdamW(deeper.parameters(), lr=1e-4)
    old = dict(model.named_parameters())
    for name, p in deeper.named_parameters():
        if name in old and old[name] in optimizer.state:
            new.state[p] = {key: value.clone() for key, value in optimizer.state[old[name]].items()}
    return time.perf_counter() - start


def splice(model: GPT, optimizer: torch.optim.Optimizer, edit: ax.Edit, ids: torch.Tensor) -> float:
    """Seconds of the transaction alone: everyone checks, the network changes, everyone changes; then taken back."""
    change = edit.plan(model, PlanContext(model, ids))
    start = time.perf_counter()
    with transaction(model, change, [optimizer]):
        taken = time.perf_counter() - start
        raise TakeBack
    return taken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(args.depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(256, (1, 32))
    train(model, optimizer, ids, 1)
    optimizer.zero_grad()
    dim, heads = model.tokens.weight.shape[1], model.blocks[0].heads
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(model.blocks)} blocks")
    edit = ax.Duplicate("blocks", by=1)
    grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.every(1), probe=ids)
    with grower.trial(edit):
        pass
    rows: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        init, _ = seconds(lambda: Block(dim, heads))
        twin, _ = seconds(lambda: copy.deepcopy(model.blocks[0]))
        spliced = splice(model, optimizer, edit, ids)
        grower.probe = None
        bare, change = seconds(lambda: grower.grow(edit))
        grower.undo()
        grower.probe = ids
        probed, change = seconds(lambda: grower.grow(edit))
        grower.undo()
        forward, _ = seconds(lambda: model(ids))
        other = rebuilt(model, optimizer, lambda depth: GPT(depth))
        values = {
            "splice and companions / block init": spliced / init,
            "growth, no probe / block init": bare / init,
            "growth, no probe, less the copy / block init": (bare - twin) / init,
            "growth, probed / block init": probed / init,
            "forwards' worth of the probe": (probed - bare) / forward,
            "rebuild / growth, no probe": other / bare,
            "rebuild / growth, probed": other / probed,
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    print(change)
    last = {"block init": init, "deepcopy": twin, "growth": bare, "rebuild": other}
    print(", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in last.items()))
    for name, values in rows.items():
        print(f"{name:48s} median {statistics.median(values):8.2f}   ({min(values):.2f} .. {max(values):.2f})")


if __name__ == "__main__":
    main()
