#!/usr/bin/env bash
# torch.optim.swa_utils.AveragedModel: after a layer was inserted, averages follow the weights of other layers.
#
# `update_parameters` pairs its own parameters with those of the network by their place, with zip, which ends with the
# shorter of the two. A layer that was inserted into the network takes the place of the next one, where the shapes are
# alike as in a stack of blocks: each average behind it moves towards the weights of the layer in front of its own, and
# the last layer of the network is in no average. No error, no warning. timm's ModelEmaV3 1.0.31 does the same.
#
# Why it matters: the averaged network is the one that is tested and kept; it has as many layers as before, and computes
# something that neither the old nor the new network does.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7: three layers of the one weight 1, 2, 3, which do not train; one of 100 joins
#
#   torch 2.13.0+cpu
#   network   1.00 100.00   2.00   3.00
#   average   1.00  87.75   2.12
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/python" -I - <<'END'
import sys, warnings
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

print("torch", torch.__version__)
warnings.simplefilter("error")


def layer(weight):
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(linear.weight, weight)
    return linear


net = torch.nn.Sequential(layer(1.0), layer(2.0), layer(3.0))
average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
average.update_parameters(net)
net.insert(1, layer(100.0))
for _ in range(3):
    average.update_parameters(net)
held = [p.item() for p in average.module.parameters()]
print("network", *(f"{p.item():6.2f}" for p in net.parameters()))
print("average", *(f"{value:6.2f}" for value in held))
if held != [1.0, 87.75, 2.125]:
    sys.exit("no longer so")
END
