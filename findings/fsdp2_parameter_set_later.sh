#!/usr/bin/env bash
# torch.distributed.fsdp.fully_shard: a parameter that is set after the first forward is thrown away at the next one.
#
# A unit remembers, from its first forward on, which tensor belongs under which name, and puts it back there after every
# forward and backward. A parameter that code sets later under that name (weights tied, a new head, a layer
# of another initialisation) stands there until then: the old tensor comes back, the new one is
# nobody's. Before the first forward the same code works. No error, no warning; an optimizer that was built in between holds
# other tensors than the network.
#
# Why it matters: to evaluate first and then tie the embedding to the head (`head.weight = embed.weight`) is ordinary. The
# optimizer lists one tensor for both; the head is another one, that gets gradients and never a step.
#
# Seen with torch 2.13.0+cpu, Python 3.11.7, one process with gloo:
#
#   torch 2.13.0+cpu
#   tied before the first forward: tied True, after 3 steps tied True, untrained: nothing
#   tied after an evaluation: tied True, after 3 steps tied False, untrained: head.weight
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
tokens = torch.arange(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def tied(evaluated: bool) -> tuple[bool, bool, str]:
    net = fully_shard(Model(), mesh=mesh)
    if evaluated:
        with torch.no_grad():
            net(tokens)
        net.reshard()
    net.head.weight = net.embed.weight
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    at_first = net.head.weight is net.embed.weight
    before = {name: value.full_tensor().clone() for name, value in net.state_dict().items()}
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(tokens), tokens).backward()
        optimizer.step()
        if step == 0:  # by now the old tensor, if any, is back
            before = {name: value.full_tensor().clone() for name, value in net.state_dict().items()}
    after = {name: value.full_tensor() for name, value in net.state_dict().items()}
    still = [name for name in after if torch.equal(after[name], before[name])]
    return at_first, net.head.weight is net.embed.weight, ", ".join(still) or "nothing"


found = [tied(evaluated) for evaluated in (False, True)]
for when, (first, last, still) in zip(("before the first forward", "after an evaluation"), found):
    print(f"tied {when}: tied {first}, after 3 steps tied {last}, untrained: {still}")
distributed.destroy_process_group()
if found != [(True, True, "nothing"), (True, False, "head.weight")]:
    sys.exit("no longer so")
END
