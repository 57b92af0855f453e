#!/usr/bin/env bash
# torch.optim.swa_utils: a layer inserted into the network shifts its average onto other layers, without a word.
#
# `AveragedModel.update_parameters` walks through both lists of parameters side by side and stops at the end of the
# shorter one. After a layer was inserted at the front, the average of the old first layer follows the new layer, that
# of the old second layer follows the old first, and the network's last layer is averaged nowhere. Where shapes agree,
# as those of equal blocks do, nothing is said; `use_buffers=True` changes nothing about it.
#
# Why it matters: whoever adds a block while a network trains goes on averaging, evaluates the average, and gets a
# network that mixes the layers of one depth into another.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7:
#
#   torch 2.13.0+cpu
#   parameters: 6 of the network, 4 of its average, 0 warning(s)
#   average of layer 0 follows the layer inserted before it: True, its own: False
#   average of layer 1 follows layer 0: True, its own: False
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/python" -I - <<'END'
import sys, warnings
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

print("torch", torch.__version__)
torch.manual_seed(0)
first, second, inserted = (nn.Linear(4, 4) for _ in range(3))
net = nn.Sequential(first, second)
average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
net.insert(0, inserted)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(300):
        average.update_parameters(net)


def follows(number, layer):
    return torch.allclose(average.module[number].weight, layer.weight, atol=1e-6)


sizes = [len(list(module.parameters())) for module in (net, average.module)]
seen = [follows(0, inserted), follows(0, first), follows(1, first), follows(1, second)]
print(f"parameters: {sizes[0]} of the network, {sizes[1]} of its average, {len(said)} warning(s)")
print(f"average of layer 0 follows the layer inserted before it: {seen[0]}, its own: {seen[1]}")
print(f"average of layer 1 follows layer 0: {seen[2]}, its own: {seen[3]}")
if (sizes, len(said), seen) != ([6, 4], 0, [True, False, True, False]):
    sys.exit("no longer so")
END
