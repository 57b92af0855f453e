"""The optimizers of other packages: every class that each of them exports, and how it is built."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).parent.parent / "zoo"))
from models import import_torchvision

PACKAGES = {  # module: package, whose version the page names
    "adabelief_pytorch": "adabelief-pytorch",
    "adam_mini": "adam-mini",
    "adan_pytorch": "adan-pytorch",
    "bitsandbytes.optim": "bitsandbytes",
    "came_pytorch": "came-pytorch",
    "dadaptation": "dadaptation",
    "heavyball": "heavyball",
    "kron_torch": "kron-torch",
    "lion_pytorch": "lion-pytorch",
    "muon": "muon-optimizer",
    "optimi": "torch-optimi",
    "prodigyopt": "prodigyopt",
    "pytorch_optimizer": "pytorch-optimizer",
    "schedulefree": "schedulefree",
    "timm.optim": "timm",
    "torch_optimizer": "torch-optimizer",
    "torchao.optim": "torchao",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adabelief_pytorch.AdaBelief": {"print_change_log": False},
    "adam_mini.Adam_mini": {"dim": 8, "n_heads": 2, "verbose": False},
    **dict.fromkeys(("bitsandbytes.optim.LARS*", "bitsandbytes.optim.SGD*"), {"momentum": 0.9, "lr": 1e-3}),
    "came_pytorch.CAME": {"lr": 1e-3},
    "pytorch_optimizer.Ranger21": {"num_iterations": 100},
    "pytorch_optimizer.AdamMini": {"num_embeds": 8, "num_heads": 2},
    "timm.optim.SGDP": {"lr": 1e-3},
    **dict.fromkeys(
        ("schedulefree.SGD*", "pytorch_optimizer.ScheduleFreeSGD", "timm.optim.Lars", "heavyball.*"), {"lr": 1e-3}
    ),
}
# Their states of 8 bits begin at 4,096 elements.
WIDE = ("*8bit", "*4bit", "*Fp8")
AROUND = ("*.Lookahead", "pytorch_optimizer.OrthoGrad", "*.PCGrad", "*.ScheduleFreeWrapper", "*.TRAC")
OVER = ("*.SAM", "*.FriendlySAM", "*.LookSAM")  # built from the class of another
ROUTED = ("*.SingleDeviceMuonWithAuxAdam", *(f"pytorch_optimizer.{n}" for n in ("AdaGO", "*Muon", "MuonClip")))
MATRICES = ("muon.SingleDeviceMuon", "pytorch_optimizer.SpectralSphere")  # of the blocks; AdamW steps the rest
CLOSURE = ("schedulefree.*Closure", "*.AliG", "heavyball.SAMWrapper", "heavyball.MSAMLaProp", *OVER)
NOT_TRIED = {  # no training on this machine, with or without a growth
    "*.*AdEMAMix32bit": "its step fails on a CPU",
    "*.PytorchLARS": "its step fails on a CPU",
    "*[Hh]ess*": "needs gradients of gradients",
    "*.SophiaH": "needs gradients of gradients",
    "*.*LOMO": "steps inside the backward pass",
    "*.DeMo": "needs a process group",
    "*.Distributed*": "needs a process group",
    "muon.Muon": "needs a process group",
    "muon.MuonWithAuxAdam": "needs a process group",
    "*.CPUOffloadOptimizer": "needs a GPU",
    "*.SafeFP16Optimizer": "needs a GPU",
    "*.GSAM": "asks for the model and a schedule of its own",
    "*.WSAM": "asks for the model",
    "*.SplitOpt": "is built from optimizers, and has no groups",
    "dadaptation.DAdaptAdan": "its step needs a graph of gradients",
    "torch_optimizer.Ranger": "its step fails in torch 2.13",
    "torch_optimizer.RangerVA": "its step fails in torch 2.13",
    "heavyball.ADOPT": "its losses are no numbers here, with or without a growth",
    "torchao.optim.*Fp8": "its losses are no numbers here, with or without a growth",
    "pytorch_optimizer.BSAM": "its step fails in torch 2.13",
    "heavyball.PSGDBase": "a base class",
    "heavyball.SOAPBase": "a base class",
    "torchao.optim._AdamW": "a base class",
    "pytorch_optimizer.BaseOptimizer*": "a base class",
}


def is_in(name: str, patterns: Any) -> bool:
    """Whether one of some patterns is that of a name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@functools.cache
def classes() -> dict[str, type]:
    """Name -> class, of every optimizer of every package that is installed."""
    import_torchvision()
    found: dict[str, type] = {}
    for module in PACKAGES:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            continue
        for name, kind in sorted(vars(importlib.import_module(module)).items()):
            if isinstance(kind, type) and issubclass(kind, Optimizer) and not kind.__module__.startswith("torch."):
                found[f"{module}.{name}"] = kind
    return found


def names() -> list[str]:
    """Those that can be tried."""
    return [name for name in classes() if not is_in(name, NOT_TRIED)]


def untried() -> Iterator[tuple[str, str]]:
    """Those that cannot, and why."""
    for name in classes():
        yield from ((name, why) for pattern, why in NOT_TRIED.items() if fnmatch.fnmatchcase(name, pattern))


def make(name: str, model: nn.Module) -> list[Any]:
    """The optimizers of a row around a network: the one under test first."""
    kind: Any = classes()[name]
    options = {key: value for pattern, own in OPTIONS.items() if is_in(name, [pattern]) for key, value in own.items()}
    known = inspect.signature(kind).parameters
    if all(p.kind is not p.VAR_KEYWORD for p in known.values()):
        options = {key: value for key, value in options.items() if key in known}
    if "lr" in known and known["lr"].default in (inspect.Parameter.empty, None):
        options.setdefault("lr", 1e-3)
    inner = [p for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not one for one in inner)]
    if is_in(name, AROUND):
        return [kind(AdamW(model.parameters(), lr=1e-3), **options)]
    if is_in(name, OVER):
        return [kind(model.parameters(), base_optimizer=AdamW, **options)]
    if is_in(name, ROUTED):
        return [kind([{"params": inner, "use_muon": True}, {"params": others, "use_muon": False}], **options)]
    if is_in(name, MATRICES):
        return [kind(inner, **options), AdamW(others, lr=1e-3)]
    if "named_parameters" in known:
        return [kind(list(model.named_parameters()), **options)]
    return [kind(model if "model" in known else model.parameters(), **options)]
