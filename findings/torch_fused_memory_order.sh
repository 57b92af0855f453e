#!/usr/bin/env bash
# torch.optim: `fused=True` takes wrong steps after `model.to(memory_format=torch.channels_last)`, without a word.
#
# The state of a weight keeps the memory order that it was made in. The fused kernels on a CPU walk through weight,
# gradient and state by their place in memory and not by their index, so that each entry of a convolution is moved by
# the moments of another entry. The same happens when a state from a contiguous network is loaded beside such weights
# by hand. The foreach and the for-loop implementations take the right steps.
#
# Why it matters: changing the memory order is a documented call that keeps every value. Whoever makes it while the
# network trains, or maps states onto changed tensors, goes on with shuffled moments.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7; the largest difference of a weight to the for-loop's, three steps after:
#
#   torch 2.13.0+cpu
#   SGD: foreach below 1e-6, fused above 1e-3
#   Adagrad: foreach below 1e-6, fused above 1e-3
#   Adam: foreach below 1e-6, fused above 1e-3
#   AdamW: foreach below 1e-6, fused above 1e-3
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
KINDS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adagrad": {"lr": 0.1}, "Adam": {"lr": 0.01}, "AdamW": {"lr": 0.01}}


def trained(kind, **how):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
    opt = getattr(torch.optim, kind)(conv.parameters(), **KINDS[kind], **how)
    for number in range(6):
        if number == 3:
            conv.to(memory_format=torch.channels_last)
        opt.zero_grad()
        conv(x).square().mean().backward()
        opt.step()
    return conv.weight.detach()


so = True
for kind in KINDS:
    loop, foreach, fused = (trained(kind, **how) for how in ({"foreach": False}, {"foreach": True}, {"fused": True}))
    right, wrong = ((other - loop).abs().max().item() for other in (foreach, fused))
    told = [f"{'below' if right < 1e-6 else 'above'} 1e-6", f"{'above' if wrong > 1e-3 else 'below'} 1e-3"]
    print(f"{kind}: foreach {told[0]}, fused {told[1]}")
    so = so and right < 1e-6 and wrong > 1e-3
if not so:
    sys.exit("no longer so")
END
