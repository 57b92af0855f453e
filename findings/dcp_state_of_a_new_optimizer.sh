#!/usr/bin/env bash
# torch.distributed.checkpoint.state_dict: to read the state of an optimizer that has not stepped yet makes it step once.
#
# `get_optimizer_state_dict` (and `get_state_dict`) lets an optimizer without state take a step with zero gradients and a
# learning rate of 0, so that there is something to name. Parameters stay as they are; the state does not: it remains in
# the optimizer, and its count of steps is 1. So Adam's first real step corrects its moments as if it were the second one,
# and moves the weights by 0.075 where it should by 0.1; the moments of that step are those of the first.
#
# Why it matters: to save a checkpoint at step 0, or to look at the state before training, should change nothing, and a
# run that does is not the run that does not. There is no error and no warning.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7, one process:
#
#   torch 2.13.0+cpu
#   not looked at: the first step moves by 0.1000, counted 1
#   looked at: the first step moves by 0.0744, counted 2
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/python" -I - <<'END'
import sys
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

print("torch", torch.__version__)


def first_step(look: bool) -> tuple[str, float]:
    net = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    before = net.weight.detach().clone()
    if look:
        get_optimizer_state_dict(net, optimizer)
        assert torch.equal(net.weight, before)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    moved = (net.weight.detach() - before).abs().max()
    return f"{float(moved):.4f}", float(optimizer.state[net.weight]["step"])


plain, looked = first_step(False), first_step(True)
print(f"not looked at: the first step moves by {plain[0]}, counted {plain[1]:g}")
print(f"looked at: the first step moves by {looked[0]}, counted {looked[1]:g}")
if (plain, looked) != (("0.1000", 1.0), ("0.0744", 2.0)):
    sys.exit("no longer so")
END
