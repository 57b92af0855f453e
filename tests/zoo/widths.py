"""What of the zoo's architectures gets wider: feed-forward widths and heads of language models, channels of CNNs.

Each is planned and run in float64 on the network, and counts as exact if its outputs are the same to 1e-6.

    python tests/zoo/widths.py [--only NAME ...]
"""

from __future__ import annotations

import argparse
import collections
import inspect
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from architectures import NAMES
from models import build
from torch import Tensor, nn

import auxin as ax
from auxin.anatomy.probe import PlanContext, moved, tensors_in, untouched
from auxin.anatomy.widths.groups import by_steps, closure, output_axis, trace_of
from auxin.anatomy.widths.terms import Term, find
from auxin.anatomy.widths.tried import standing

FEED_FORWARD = re.compile(
    r"(gate_proj|up_proj|fc1|c_fc|dense_h_to_4h|fc_in|gate_up_proj|\bWi|input_linear|in_proj|experts|experts\.mlp|proj_up_gate)$"
)
HEADS = re.compile(
    r"(q_proj|c_attn|query_key_value|qkv_proj|Wqkv|q_b_proj|mlstm_layer\.q|self_attention\.kv_proj|mixer\.in_proj)$"
)
# Convolutional networks of the list; of the others (attention, mixers) nothing is promised.
CNN = """resnet18 resnet50 seresnet18 densenet121 dla34 dpn48b efficientnet_b0 mobilenetv2_050 mnasnet_050 regnetx_002
    convnext_atto convnextv2_atto nfnet_l0 selecsls42b legacy_seresnet18 rexnet_100 cspresnet50 lcnet_050 tinynet_e
    fasternet_t0 repghostnet_050 repvit_m0_9 inception_v4 xception41 convmixer_768_32""".split()


def context_of(name: str) -> PlanContext:
    """The network in float64 on its input; in float32 where an operation of torch's takes nothing else."""
    model, args, kwargs = build(name)
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if "grouped" in str(getattr(getattr(model, "config", None), "_experts_implementation_internal", "")):
        return PlanContext(model, given)
    wide = (torch.float32, torch.float64)
    probe: Any = (
        moved(given, torch.device("cpu"), wide) if kwargs else tuple(moved(list(args), torch.device("cpu"), wide))
    )
    return PlanContext(model.double(), probe)


def outcome(context: PlanContext, edit: ax.Widen) -> str:
    """ "exact", "wrong: ...", or "refused: ..."."""
    try:
        change = edit.plan(context.model, context)
    except ax.GrowthError as error:
        return f"refused: {error}"
    before = context.outputs or []
    with untouched(context.model), standing(context.model, change.swaps, change.assigns), torch.no_grad():
        after = list(tensors_in(context.run()))
    off = max(map(_off, before, after))
    first = next(t for t in before if t.is_floating_point())
    limit = 1e-6 if first.dtype == torch.float64 else 1e-5  # norms of many models compute in float32 inside
    return "exact" if off < limit else f"wrong: {off:.1e}"


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp(min=1e-30)) if a.is_floating_point() else 0.0 if a.equal(b) else 1.0


def patterns(model: nn.Module, wanted: re.Pattern[str]) -> list[str]:
    """Paths of layers that fit, all blocks as one pattern; then each of the first block."""
    paths = [path for path, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    found = [path for path in paths if wanted.search(path)]
    return [*dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path, count=1) for path in found), *found[:2]]


def of_language_model(name: str) -> tuple[str, str]:
    """What becomes of the feed-forward width, and of one more group of heads."""
    context, found = context_of(name), []
    for wanted, options in ((FEED_FORWARD, {"by": 16}), (HEADS, {"by": 1, "unit": "groups"})):
        results = {at: "" for at in patterns(context.model, wanted)}
        for at in results:
            results[at] = outcome(context, ax.Widen(at, **options))
            if results[at] == "exact":
                break
        exact = next((at for at, result in results.items() if result == "exact"), None)
        found.append(f"exact {exact}" if exact else next(iter(results.values()), "none of that name"))
    return found[0], found[1]


def widths(context: PlanContext) -> Iterator[tuple[str, int]]:
    """Every width that a convolution makes, once: (path, smallest step)."""
    trace, seen = trace_of(context), set[int]()
    for path, module in context.model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            term: Term = output_axis(trace, context.model, path)
            fresh = [(atom, step) for atom, step in by_steps(term) if id(find(atom)) not in seen]
            for atom, step in fresh:
                width = closure(trace, [(atom, 1)])
                seen |= {id(atom) for atom, _ in width.growth.values()}
                if not width.reaches_output:
                    yield path, step


def of_cnn(name: str) -> collections.Counter[str]:
    """How many widths are exact, refused, wrong; and the reasons."""
    context, found = context_of(name), collections.Counter[str]()
    for path, step in widths(context):
        result = outcome(context, ax.Widen(path, by=step))
        found[result.partition(":")[0]] += 1
        if result != "exact":
            print(f"    {path} by {step}: {result[:220]}", flush=True)
    return found


def main() -> None:
    """Print a line for each architecture, and the sums."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    only = parser.parse_args().only
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sums = collections.Counter[str]()
    for name in NAMES["causal"]:
        if not only or name in only:
            results = of_language_model(name)
            for kind, result in zip(("feed-forward", "heads"), results, strict=True):
                sums[f"{kind} {result.partition(' ')[0].rstrip(':')}"] += 1
            print(f"{name}: {' | '.join(r[:160] for r in results)}", flush=True)
    for name in CNN:
        if not only or name in only:
            start = time.perf_counter()
            found = of_cnn(name)
            sums.update({f"CNN {kind}": count for kind, count in found.items()})
            print(f"{name}: {dict(found)} {time.perf_counter() - start:.0f} s", flush=True)
    print(dict(sums))


if __name__ == "__main__":
    main()
