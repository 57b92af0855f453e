#!/usr/bin/env bash
# torch.optim: state of another shape is loaded without a word, and the step that fails has moved half of the network.
#
# `Module.load_state_dict` refuses a tensor of another shape. `Optimizer.load_state_dict` counts parameters, but
# compares no shapes. The error comes in `step`, names no parameter, and comes late: the layers before the
# one that does not fit have already moved, and that layer's weight has been decayed.
#
# Why it matters: a checkpoint from before a layer was widened fits by count. Whoever catches the error of the
# first step and goes on has a network and step counters that no longer belong together.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7, at the default settings of AdamW on a CPU:
#
#   torch 2.13.0+cpu
#   loaded
#   step: The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0
#   moved by the failed step: 0.weight 0.bias 1.weight
#   step counters: 2 2 2 1
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/python" -I - <<'END'
import sys, warnings
import torch

print("torch", torch.__version__)
warnings.simplefilter("error")


def network(width):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, width))
    net(torch.ones(1, 2)).sum().backward()
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


_, narrow = network(3)
narrow.step()
net, optimizer = network(4)
optimizer.load_state_dict(narrow.state_dict())
print("loaded")
before = {name: p.detach().clone() for name, p in net.named_parameters()}
try:
    optimizer.step()
except RuntimeError as error:
    print("step:", error)
else:
    sys.exit("no longer so: no error")
moved = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
counters = [int(state["step"]) for state in optimizer.state.values()]
print("moved by the failed step:", *moved)
print("step counters:", *counters)
if moved != ["0.weight", "0.bias", "1.weight"] or counters != [2, 2, 2, 1]:
    sys.exit("no longer so")
END
