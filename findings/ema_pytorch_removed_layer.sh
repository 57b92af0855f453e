#!/usr/bin/env bash
# ema-pytorch: after a layer was removed, the average of one layer follows the weights of another.
#
# `EMA` knows its parameters by name, but uses the names only to leave some out. Averages and weights are
# then paired by their place in two lists. With layers a, b, c and b removed, the lists are (a, b, c) and
# (a, c): the average called b goes to the weights of c, and the average called c stands still. Layers
# of equal shape, as blocks of a network are, give no error.
#
# Why it matters: whoever prunes a block out of a network in training gets an average in which every later
# block is off by one.
#
# Seen with ema-pytorch 0.8.3, torch 2.13.0+cpu, Python 3.11.7, after the weights of c went from 3 to 9:
#
#   ema-pytorch 0.8.3 torch 2.13.0+cpu
#   averages before: {'a': 1.0, 'b': 2.0, 'c': 3.0}
#   averages after:  {'a': 1.0, 'b': 9.0, 'c': 3.0}
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install -qq --no-compile --no-deps ema-pytorch==0.8.3
"$dir/env/bin/python" -I - <<'END'
import sys, warnings
from importlib.metadata import version
import torch
from ema_pytorch import EMA

print("ema-pytorch", version("ema-pytorch"), "torch", torch.__version__)
warnings.simplefilter("error")
net = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in "abc"})
for value, layer in enumerate(net.values(), start=1):
    torch.nn.init.constant_(layer.weight, value)
ema = EMA(net, beta=0.9, update_after_step=0, update_every=1)
ema.update()


def averages():
    return {name: round(layer.weight.mean().item(), 2) for name, layer in ema.ema_model.items()}


print("averages before:", averages())
del net["b"]
torch.nn.init.constant_(net["c"].weight, 9)
for _ in range(200):
    ema.update()
print("averages after: ", averages())
if averages() != {"a": 1.0, "b": 9.0, "c": 3.0}:
    sys.exit("no longer so")
END
