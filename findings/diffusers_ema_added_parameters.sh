#!/usr/bin/env bash
# diffusers: EMAModel.step() takes more parameters than it averages, and leaves the rest out without a word.
#
# `step` pairs its own list with what it is given by zip, which ends with the shorter of the two. A layer that was added
# after the average was built is therefore not averaged; one that was inserted shifts all that follow, so that where
# shapes agree each average is drawn towards another parameter. `copy_to` pairs in the same way: the inserted layer is
# overwritten with what belongs to the one behind it. No error, no warning; `foreach=False` is the default.
#
# Why it matters: someone who makes a network deeper while it trains evaluates and publishes the average.
#
# Seen with diffusers 0.42.1, torch 2.13.0+cpu, Python 3.11.7:
#
#   diffusers 0.42.1 torch 2.13.0+cpu
#   parameters: 3, averaged: 2
#   the network holds      [1.0, 5.0, 2.0]
#   averages are drawn to  [1.0, 5.0]
#   after copy_to          [1.0, 5.0, 2.0]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -I -W ignore - <<'END'
import sys
from importlib.metadata import version

import torch
from diffusers.training_utils import EMAModel

print("diffusers", version("diffusers"), "torch", torch.__version__)


def layer(value):
    return torch.nn.Parameter(torch.tensor([value]))


first, last = layer(1.0), layer(2.0)
average = EMAModel([first, last], decay=0.0)
inserted = layer(5.0)
parameters = [first, inserted, last]
average.step(parameters)
drawn = [value.item() for value in average.shadow_params]
print(f"parameters: {len(parameters)}, averaged: {len(drawn)}")
print("the network holds     ", [p.item() for p in parameters])
print("averages are drawn to ", drawn)
average.copy_to(parameters)
print("after copy_to         ", [p.item() for p in parameters])
if drawn != [1.0, 5.0]:
    sys.exit("no longer so")
END
