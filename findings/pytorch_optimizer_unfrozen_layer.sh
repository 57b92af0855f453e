#!/usr/bin/env bash
# pytorch-optimizer: a layer that is unfrozen later begins with steps of two and a half times the learning rate.
#
# Most optimizers of the package count their steps in the group, and correct moments that begin at zero by that count. A
# parameter that has its first gradient later (frozen layers have none) begins with moments of zero and the count of
# the others. Under AdamP its first step is (1 - 0.9) / sqrt(1 - 0.999) = 3.2 times as long, once the correction is
# gone, as that of a parameter that was trained from the start. torch.optim.AdamW counts by parameter. No warning.
#
# Why it matters: unfreezing layer by layer is how pretrained networks are tuned, and the layers that are unfrozen are
# those of which one wants to change little.
#
# Seen with pytorch-optimizer 4.1.0, torch 2.13.0+cpu, Python 3.11.7: lengths of the first step over the learning rate
#
#   pytorch-optimizer 4.1.0 torch 2.13.0+cpu
#                  from the start   unfrozen after 1000 steps
#   AdamP                   1.000                       2.515
#   AdaBelief               1.111                       2.795
#   torch AdamW             1.000                       1.000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install -qq --no-compile --no-deps pytorch-optimizer==4.1.0
"$dir/env/bin/python" -I - <<'END'
import sys, warnings
from importlib.metadata import version
import pytorch_optimizer, torch

print("pytorch-optimizer", version("pytorch-optimizer"), "torch", torch.__version__)
warnings.simplefilter("error")


def first_step(kind, frozen):
    trained, late = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    late.requires_grad_(frozen == 0)
    optimizer = kind([trained, late], lr=1e-3, weight_decay=0.0)
    for step in range(frozen + 1):
        late.requires_grad_(step >= frozen)
        optimizer.zero_grad()
        torch.manual_seed(step)
        (trained * torch.rand(4)).sum().backward()
        if step == frozen:
            late.sum().backward()
        before = late.detach().clone()
        optimizer.step()
    return float((late.detach() - before).abs().max()) / 1e-3


print(f"{'':14} from the start   unfrozen after 1000 steps")
seen = {}
kinds = {"AdamP": pytorch_optimizer.AdamP, "AdaBelief": pytorch_optimizer.AdaBelief, "torch AdamW": torch.optim.AdamW}
for name, kind in kinds.items():
    seen[name] = first_step(kind, 0), first_step(kind, 1000)
    print(f"{name:14} {seen[name][0]:14.3f} {seen[name][1]:27.3f}")
early, late = seen["AdamP"]
if not (abs(early - 1) < 0.1 and late > 2 and abs(seen["torch AdamW"][1] - 1) < 0.01):
    sys.exit("no longer so")
END
