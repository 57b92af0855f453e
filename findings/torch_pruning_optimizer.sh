#!/usr/bin/env bash
# torch-pruning: after a layer was pruned, the optimizer goes on with the old tensors, and most of the network stands still.
#
# Pruning replaces the parameters of the layers it cuts by new ones. An optimizer that was made before holds the old ones,
# which get no gradient any more: its steps are silently none for them. Only what was not cut, here the last bias, is
# trained. No error, no warning; the loss simply stops falling.
#
# Why it matters: pruning while a network trains (gradual, or in rounds with training between) is what the
# package is used for. Without a new optimizer the rounds train nothing, and with one the moments are lost.
#
# Seen with torch-pruning 1.6.1, torch 2.13.0+cpu, Python 3.11.7:
#
#   torch-pruning 1.6.1 torch 2.13.0+cpu
#   known to the optimizer: 0.weight no, 0.bias no, 2.weight no, 2.bias yes
#   moved in 20 steps:      0.weight no, 0.bias no, 2.weight no, 2.bias yes
#   warnings: 0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install -qq --no-compile --no-deps torch-pruning==1.6.1
"$dir/env/bin/python" -I - <<'END'
import importlib.metadata, sys, warnings
import torch
import torch_pruning
from torch import nn

print("torch-pruning", importlib.metadata.version("torch-pruning"), "torch", torch.__version__)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
x, y = torch.randn(64, 8), torch.randn(64, 1)


def step():
    opt.zero_grad()
    (net(x) - y).square().mean().backward()
    opt.step()


for _ in range(5):
    step()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=x)
    graph.get_pruning_group(net[0], torch_pruning.prune_linear_out_channels, idxs=[0, 3]).prune()
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    known = {name: id(p) in held for name, p in net.named_parameters()}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for _ in range(20):
        step()
moved = {name: not torch.equal(before[name], p) for name, p in net.named_parameters()}
for what, told in (("known to the optimizer:", known), ("moved in 20 steps:     ", moved)):
    print(what, ", ".join(f"{name} {'yes' if yes else 'no'}" for name, yes in told.items()))
print("warnings:", len(said))
if known != moved or list(moved.values()) != [False, False, False, True] or said:
    sys.exit("no longer so")
END
