#!/usr/bin/env bash
# torch: a linear layer whose weight was left on the meta device runs on a CPU batch, and returns what stood in memory.
#
# A tensor on the meta device has a shape and no values, and most operators refuse it beside a tensor that has some. A
# matrix product does not: the result is a CPU tensor that nothing has written to, forward as well as under no_grad,
# without an error or a warning. So does a linear layer without a bias; with a bias it is refused, and so is the
# backward.
#
# Why it matters: large networks are built on the meta device and filled afterwards, in part where a checkpoint lacks
# layers, as it does after a network has grown. A forward that runs does not show that every weight is there: a head
# that was left out (heads often have no bias) gives numbers, other ones each time.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7 (2.14.1 does the same):
#
#   torch 2.13.0+cpu
#   linear without bias: a tensor on cpu
#   matrix product: a tensor on cpu
#   linear with bias: RuntimeError
#   addition: RuntimeError
#   backward through a linear without bias: RuntimeError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/python" -I - <<'END'
import sys
import torch
from torch import nn

print("torch", torch.__version__)
batch = torch.ones(2, 3)
without, with_bias = (nn.Linear(3, 4, bias=bias, device="meta") for bias in (False, True))
TRIED = {
    "linear without bias": lambda: without(batch),
    "matrix product": lambda: batch @ torch.empty(3, 4, device="meta"),
    "linear with bias": lambda: with_bias(batch),
    "addition": lambda: batch + torch.empty(2, 3, device="meta"),
    "backward through a linear without bias": lambda: without(batch).sum().backward(),
}
EXPECTED = ["a tensor on cpu", "a tensor on cpu", "RuntimeError", "RuntimeError", "RuntimeError"]
seen = []
for name, call in TRIED.items():
    try:
        found = call()
        seen.append("no error" if found is None else f"a tensor on {found.device}")
    except RuntimeError:
        seen.append("RuntimeError")
    print(f"{name}: {seen[-1]}")
if seen != EXPECTED:
    sys.exit("no longer so")
END
