"""The columns of the table: optimizers and their groups, schedules, averages, scalers."""

import inspect

import torch
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adagrad": {"lr": 0.05},
    "Adadelta": {"lr": 1.0},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.01},
    "ASGD": {"lr": 0.05, "t0": 1},
    "Adafactor": {"lr": 0.05},
}
MODES = {"loop": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def optimizers() -> dict:
    """Name -> (class, options) in every mode that it has."""
    found = {}
    for name, options in OPTIMIZERS.items():
        kind = getattr(torch.optim, name)
        known = inspect.signature(kind).parameters
        for mode, flags in MODES.items():
            if all(flag in known for flag in flags):
                off = {"foreach": False} if mode == "loop" else {}
                found[f"{name}-{mode}"] = (kind, {**options, **off, **flags})
    found["SGD-plain"] = (torch.optim.SGD, {"lr": 0.05})
    found["AdamW-amsgrad"] = (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True})
    found["AdamW-tensor-lr"] = (torch.optim.AdamW, {"lr": torch.tensor(0.01), "foreach": False})
    return found


SIMPLE = optimizers()
SPECIAL = ("LBFGS", "Muon+AdamW", "SparseAdam+AdamW")
ALL_OPTIMIZERS = (*SIMPLE, *SPECIAL)


def one_group(model: nn.Module) -> list:
    return [{"params": list(model.parameters())}]


def decay(model: nn.Module) -> list:
    heavy = [p for p in model.parameters() if p.dim() >= 2]
    light = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": heavy, "weight_decay": 0.1}, {"params": light, "weight_decay": 0.0}]


def layered(model: nn.Module) -> list:
    """A learning rate for each stage, head first; each block is a stage."""
    stages: dict[str, list] = {}
    for name, p in model.named_parameters():
        parts = name.split(".")
        stages.setdefault(".".join(parts[:2]) if parts[0] == "blocks" else parts[0], []).append(p)
    stages_back = list(stages.values())[::-1]
    return [{"params": ps, "lr": 0.01 * 0.8**i} for i, ps in enumerate(stages_back)]


def reversed_order(model: nn.Module) -> list:
    return [{"params": list(model.parameters())[::-1]}]


def named(model: nn.Module) -> list:
    return [{"params": list(model.named_parameters())}]


def named_decay(model: nn.Module) -> list:
    heavy = [(n, p) for n, p in model.named_parameters() if p.dim() >= 2]
    light = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
    return [{"params": light, "name": "light", "weight_decay": 0.0}, {"params": heavy, "name": "heavy"}]


def foreign(model: nn.Module) -> list:
    """A parameter of something else, e.g. a learned temperature of the loss, in the middle."""
    ps = list(model.parameters())
    return [{"params": [*ps[:2], nn.Parameter(torch.ones(3)), *ps[2:]]}]


GROUPS = {
    "one": one_group,
    "decay": decay,
    "layered": layered,
    "reversed": reversed_order,
    "named": named,
    "named-decay": named_decay,
    "foreign": foreign,
    "own": named_decay,  # and each growth asks for groups of its own
}
OWN = {"lr": 0.003}


def make_optimizers(model: nn.Module, name: str, groups: str) -> list:
    """The optimizers of a cell."""
    if name in SIMPLE:
        kind, options = SIMPLE[name]
        lr = options["lr"].clone() if isinstance(options["lr"], torch.Tensor) else options["lr"]
        return [kind(GROUPS[groups](model), **{**options, "lr": lr})]
    if name == "LBFGS":
        return [torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)]
    if name == "Muon+AdamW":
        first = {n for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2}
        kind, options = torch.optim.Muon, {"lr": 0.01}
    else:
        first = {"places.weight"}
        kind, options = torch.optim.SparseAdam, {"lr": 0.01}
    mine = [p for n, p in model.named_parameters() if n in first]
    rest = [p for n, p in model.named_parameters() if n not in first]
    return [kind(mine, **options), torch.optim.AdamW(rest, lr=0.01)]


def warm(step: int) -> float:
    return min(1.0, 0.3 + 0.1 * step)


def falling(step: int) -> float:
    return 0.95


def cycles(o) -> bool:
    return "momentum" in o.defaults or "betas" in o.defaults


def nested(o):
    inner = lrs.SequentialLR(o, [lrs.StepLR(o, 2, 0.5), lrs.MultiStepLR(o, [1, 3], 0.7)], [3])
    return lrs.ChainedScheduler([inner, lrs.ConstantLR(o, 0.9, 5)])


SCHEDULES = {
    "none": None,
    "LambdaLR": lambda o: lrs.LambdaLR(o, [warm] * len(o.param_groups)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, falling),
    "StepLR": lambda o: lrs.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 4, 7], 0.5),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 5),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.2, total_iters=6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.001, 0.02, 2, cycle_momentum=cycles(o)),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.02, total_steps=30, cycle_momentum=cycles(o)),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 20, 2.0),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.2, total_iters=4), lrs.CosineAnnealingLR(o, 6)], [4]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 4), lrs.ExponentialLR(o, 0.9)]),
    "Plateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "Plateau-list": lambda o: lrs.ReduceLROnPlateau(o, patience=2, min_lr=[1e-4] * len(o.param_groups)),
    "SWALR": lambda o: SWALR(o, 0.002, anneal_epochs=6),
    "Sequential-MultiStep": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, 0.5, 3), lrs.MultiStepLR(o, [2, 2, 4])], [3]
    ),
    "nested": nested,
}
AVERAGES = {
    "none": lambda model: [],
    "ema": lambda model: [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))],
    "ema-buffers": lambda model: [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)],
    "swa+ema-fn": lambda model: [AveragedModel(model), AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))],
}
SCALERS = {
    "none": lambda: [],
    "scaler": lambda: [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)],
}


def make_companions(model: nn.Module, optimizers: list, schedule: str, average: str, scaler: str) -> list:
    """Everything else of a cell."""
    schedules = [SCHEDULES[schedule](o) for o in optimizers] if SCHEDULES[schedule] is not None else []
    return [*schedules, *AVERAGES[average](model), *SCALERS[scaler]()]
