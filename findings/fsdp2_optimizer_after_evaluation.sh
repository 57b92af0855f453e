#!/usr/bin/env bash
# torch.distributed.fsdp.fully_shard: an optimizer that is built after an evaluation never trains the root's parameters.
#
# A forward without a backward leaves the root unit with its full parameters, since it reshards only in a backward:
# `model.parameters()` then gives plain tensors that FSDP2 throws away at the next backward. An optimizer that is built
# from them (torch's order: shard, then optimizer) steps tensors that nobody uses; their gradient stays None. There is no
# error and no warning; embeddings, the last norm and the head, which belong to the root, stay at their first values.
#
# Why it matters: to evaluate before training, or to build a new optimizer between two phases after an evaluation, is
# ordinary. The loss falls all the same, since the blocks train.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7, one process with gloo:
#
#   torch 2.13.0+cpu
#   the optimizer holds: DTensor DTensor Parameter Parameter
#   the network holds: DTensor DTensor DTensor DTensor
#   after 3 steps moved: 0.weight 0.bias
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
GLOO_SOCKET_IFNAME=lo "$dir/env/bin/python" -I - "$dir/store" <<'END'
import sys, warnings
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

print("torch", torch.__version__)
warnings.simplefilter("error")
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
fully_shard(net[0], mesh=mesh)
fully_shard(net, mesh=mesh)
x = torch.ones(2, 4)
with torch.no_grad():
    net(x)  # an evaluation
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
print("the optimizer holds:", *(type(p).__name__ for p in optimizer.param_groups[0]["params"]))
before = {name: value.full_tensor().clone() for name, value in net.state_dict().items()}
for _ in range(3):
    optimizer.zero_grad()
    net(x).pow(2).mean().backward()
    optimizer.step()
print("the network holds:", *(type(p).__name__ for p in net.parameters()))
moved = [name for name, p in net.named_parameters() if not torch.equal(p.full_tensor(), before[name])]
print("after 3 steps moved:", *moved)
distributed.destroy_process_group()
if moved != ["0.weight", "0.bias"]:
    sys.exit("no longer so")
END
