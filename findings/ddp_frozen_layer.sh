#!/usr/bin/env bash
# torch DDP: freezing one layer stops the averaging of the others, in a step that raises nothing.
#
# DistributedDataParallel notes at the start which parameters get a gradient. When a layer is frozen later with
# `requires_grad_(False)`, the reducer waits for its gradient, and no bucket that is waited for is averaged: each rank
# keeps its own gradients of the layers that still train. This backward passes, and an optimizer step on it takes the
# replicas apart. Only the next forward raises, and speaks of parameters that were not used.
#
# Why it matters: freezing what is old, while what is new settles, is common. A loop that freezes before its last
# step, or that catches the error and wraps anew, goes on with ranks that hold different networks.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7, two processes of gloo:
#
#   torch 2.13.0+cpu
#   all layers train: gradients of the last layer agree
#   first layer frozen: gradients of the last layer differ, nothing raised
#   next step: RuntimeError
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
cat > "$dir/two.py" <<'END'
import datetime, sys
import torch
import torch.distributed as dist
from torch import nn


def main(rank, where):
    dist.init_process_group(
        "gloo", init_method=f"file://{where}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model = nn.parallel.DistributedDataParallel(net)
    torch.manual_seed(rank)
    x = torch.randn(8, 4)

    def step():
        model.zero_grad()
        model(x).square().mean().backward()
        mine, both = net[2].weight.grad, [torch.zeros(4, 4) for _ in range(2)]
        dist.all_gather(both, mine)
        return "agree" if torch.allclose(*both, atol=1e-7) else "differ"

    seen = [step()]
    net[0].requires_grad_(False)
    seen.append(step())
    try:
        seen.append(step())
    except RuntimeError as error:
        seen.append(type(error).__name__)
    if rank == 0:
        print("torch", torch.__version__)
        print("all layers train: gradients of the last layer", seen[0])
        print(f"first layer frozen: gradients of the last layer {seen[1]}, nothing raised")
        print("next step:", seen[2])
    dist.destroy_process_group()
    if seen != ["agree", "differ", "RuntimeError"]:
        sys.exit("no longer so")


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)
END
GLOO_SOCKET_IFNAME=lo "$dir/env/bin/python" -I "$dir/two.py" "$dir/meeting"
