#!/usr/bin/env bash
# heavyball: HyperBallAdamW never trains a matrix that begins at zero.
#
# Each matrix keeps the norm that it has at its first step, and its update has that length. A matrix of zeros has the
# norm 0, so its updates are 0 too, whatever its gradient: it stays as it is for the whole run, while its state is kept
# and its gradient computed. No error, no warning.
#
# Why it matters: the last matrix of a residual block, a classifier's, the B of a LoRA pair and every layer that is to
# join a network without changing it are begun at zero on purpose. None of them would ever learn.
#
# Seen with heavyball 3.2.1, torch 2.13.0+cpu, Python 3.11.7: distance to the target before and after 50 steps
#
#   heavyball 3.2.1 torch 2.13.0+cpu
#   HyperBallAdamW   4.00 -> 4.00
#   torch AdamW      4.00 -> 0.01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 opt-einsum==3.4.0
"$dir/env/bin/pip" install -qq --no-compile --no-deps heavyball==3.2.1
"$dir/env/bin/python" -I - <<'END'
import sys
from importlib.metadata import version
import heavyball, torch

heavyball.utils.compile_mode = None  # it only saves the time to compile
print("heavyball", version("heavyball"), "torch", torch.__version__)


def distances(kind):
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = kind([weight], lr=0.1)
    seen = [(weight.detach() - 1).norm().item()]
    for _ in range(50):
        weight.grad = weight.detach() - 1
        optimizer.step()
    return [*seen, (weight.detach() - 1).norm().item()]


ball, adam = distances(heavyball.HyperBallAdamW), distances(torch.optim.AdamW)
print(f"HyperBallAdamW   {ball[0]:.2f} -> {ball[1]:.2f}")
print(f"torch AdamW      {adam[0]:.2f} -> {adam[1]:.2f}")
if ball != [4.0, 4.0] or adam[1] > 0.5:
    sys.exit("no longer so")
END
