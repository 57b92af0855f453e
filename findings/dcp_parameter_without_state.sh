#!/usr/bin/env bash
# torch.distributed.checkpoint: what is saved right after a parameter was added cannot be loaded in the documented way.
#
# `get_state_dict` of a run writes the optimizer states that there are. A parameter that has joined the optimizer since its
# last step has none, so the checkpoint holds none for it. To load, one calls `get_state_dict` on a new network and
# optimizer, which makes states for all parameters (it lets a new optimizer step once), and `dcp.load` then asks the
# checkpoint for each of them: "Missing key in checkpoint state_dict". The error is a CheckpointException, which is no
# Exception, so that `except Exception` around the loading does not catch it either.
#
# Why it matters: who adds a layer, unfreezes one, or trains an expert that no token has reached yet, and saves, finds out
# that the checkpoint does not load when it is needed. Saving gives no warning.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7, one process:
#
#   torch 2.13.0+cpu
#   saved: 2 layers, 1 of them new
#   CheckpointException, an Exception: False
#   Missing key in checkpoint state_dict: optim.state.1.weight.step.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/python" -I - "$dir" <<'END'
import sys, warnings
import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

print("torch", torch.__version__)
warnings.simplefilter("ignore")
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)


def states(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    model, optim = get_state_dict(net, optimizer)
    return {"model": model, "optim": optim}


net = nn.Sequential(nn.Linear(4, 4))
optimizer = torch.optim.Adam(net.parameters())
net(torch.ones(1, 4)).sum().backward()
optimizer.step()
optimizer.zero_grad()
net.append(nn.Linear(4, 4))
optimizer.param_groups[0]["params"].extend(net[1].parameters())
dcp.save(states(net, optimizer), checkpoint_id=f"{sys.argv[1]}/checkpoint")
print("saved: 2 layers, 1 of them new")

again = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
said = "loaded"
try:
    dcp.load(states(again, torch.optim.Adam(again.parameters())), checkpoint_id=f"{sys.argv[1]}/checkpoint")
except dcp.CheckpointException as error:
    print(f"{type(error).__name__}, an Exception: {isinstance(error, Exception)}")
    said = next(str(one) for one, _ in error.failures.values())
print(said)
distributed.destroy_process_group()
if said != "Missing key in checkpoint state_dict: optim.state.1.weight.step.":
    sys.exit("no longer so")
END
