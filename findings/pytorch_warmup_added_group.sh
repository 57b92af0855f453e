#!/usr/bin/env bash
# pytorch-warmup: a group that is added while the warm-up runs is trained at its full rate from its first step.
#
# The warm-up keeps a list with one entry per group from when it was built, and pairs it with the optimizer's groups by
# zip, which ends with the shorter of the two. A group that is added later is neither dampened nor missed: no error, no
# warning. Building the warm-up anew after adding would cure it, and begin the warm-up of the others again.
#
# Why it matters: a layer that joins early is the one that needs a warm-up most, and it is the only one without.
#
# Seen with pytorch-warmup 0.2.0, torch 2.13.0+cpu, Python 3.11.7:
#
#   pytorch-warmup 0.2.0 torch 2.13.0+cpu
#   step  there from the start  added after step 1
#      1                0.0100                   -
#      2                0.0200              1.0000
#      3                0.0300              1.0000
#      4                0.0400              1.0000
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install -qq --no-compile --no-deps pytorch-warmup==0.2.0
"$dir/env/bin/python" -I - <<'END'
import sys, warnings
from importlib.metadata import version
import pytorch_warmup, torch

print("pytorch-warmup", version("pytorch-warmup"), "torch", torch.__version__)
warnings.simplefilter("error")
first, new = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
optimizer = torch.optim.SGD([first], lr=1.0)
warmup = pytorch_warmup.LinearWarmup(optimizer, warmup_period=100)
print("step  there from the start  added after step 1")
seen = []
for step in range(1, 5):
    rates = [group["lr"] for group in optimizer.param_groups]
    print(f"{step:4}  {rates[0]:20.4f}", f"{rates[1]:19.4f}" if len(rates) > 1 else f"{'-':>19}")
    seen.append(rates)
    for p in (first, new):
        p.grad = torch.ones(1)
    optimizer.step()
    with warmup.dampening():
        pass
    if step == 1:
        optimizer.add_param_group({"params": [new], "lr": 1.0})
if [round(rates[0], 6) for rates in seen] != [0.01, 0.02, 0.03, 0.04] or any(rates[1] != 1.0 for rates in seen[1:]):
    sys.exit("no longer so")
END
