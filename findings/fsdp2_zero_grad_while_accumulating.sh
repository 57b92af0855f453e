#!/usr/bin/env bash
# torch.distributed.fsdp.fully_shard: zero_grad does not drop gradients that are accumulated without communication.
#
# Under set_requires_gradient_sync(False) a backward leaves its gradients in the gathered tensors of each unit, where neither
# model.zero_grad() nor optimizer.zero_grad() looks. A batch that is given up (its loss was not finite, say) and zeroed, as in
# any other loop, comes back in the next backward that is summed over the ranks, and is stepped with. No error, no warning;
# p.grad is None in between. The same code without fully_shard drops it.
#
# Why it matters: accumulating with a batch that is skipped is ordinary, and after `zero_grad()` nobody expects its gradient
# in the next step.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7, one process with gloo:
#
#   torch 2.13.0+cpu
#   plain: the gradient after a batch of 1, zero_grad and a batch of 2 is 2.0
#   fully_shard: the gradient after a batch of 1, zero_grad and a batch of 2 is 3.0 (and None right after zero_grad)
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


def found(sharded: bool) -> tuple[float, bool]:
    net = nn.Linear(1, 1, bias=False)
    if sharded:
        fully_shard(net, mesh=mesh)
        net.set_requires_gradient_sync(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.full((1, 1), 1.0)).sum().backward()  # given up
    optimizer.zero_grad()
    none = net.weight.grad is None
    if sharded:
        net.set_requires_gradient_sync(True)
    net(torch.full((1, 1), 2.0)).sum().backward()
    grad = net.weight.grad
    return float(grad.full_tensor() if sharded else grad), none


(plain, _), (sharded, none) = found(False), found(True)
print(f"plain: the gradient after a batch of 1, zero_grad and a batch of 2 is {plain}")
print(f"fully_shard: the gradient after a batch of 1, zero_grad and a batch of 2 is {sharded} (and {None if none else 'kept'} right after zero_grad)")
distributed.destroy_process_group()
if (plain, sharded, none) != (2.0, 3.0, True):
    sys.exit("no longer so")
END
