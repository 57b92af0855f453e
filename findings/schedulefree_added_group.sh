#!/usr/bin/env bash
# schedulefree: a group added while training is left out by eval(), and then moved by train().
#
# Every group keeps its own note of whether the optimizer is in training mode. `add_param_group` starts it
# at False even while the optimizer trains, and `step` looks at the first group only. So `eval()` leaves the new
# parameter at its training point, and the next `train()` moves it on from there. A parameter that was there
# from the start is set to its average and back. Calling `train()` right after adding cures it.
#
# Why it matters: a layer that joined late is tested, and saved, at other weights than all the rest, and its
# first round trip of eval() and train() changes it, without a warning. AdamWScheduleFree does the same.
#
# Seen with schedulefree 1.4.1, torch 2.13.0+cpu, Python 3.11.7:
#
#   schedulefree 1.4.1 torch 2.13.0+cpu
#                          training   eval()   train()
#   added before train()     -0.2650   -0.2500   -0.2650
#   added after train()      -0.2650   -0.2650   -0.2785
#   and train() once more    -0.2650   -0.2500   -0.2650
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install -qq --no-compile --no-deps schedulefree==1.4.1
"$dir/env/bin/python" -I - <<'END'
import sys
from importlib.metadata import version
import schedulefree, torch

print("schedulefree", version("schedulefree"), "torch", torch.__version__)


def run(late, call_train=False):
    first, new = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = schedulefree.SGDScheduleFree([{"params": [first]}], lr=0.1)
    if not late:
        optimizer.add_param_group({"params": [new]})
    optimizer.train()
    if late:
        optimizer.add_param_group({"params": [new]})
    if call_train:
        optimizer.train()
    for _ in range(4):
        first.grad, new.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
    seen = [round(new.item(), 4)]
    for switch in (optimizer.eval, optimizer.train):
        switch()
        seen.append(round(new.item(), 4))
    return seen


early, late, cured = run(False), run(True), run(True, call_train=True)
print("                       training   eval()   train()")
for name, seen in (("added before train()", early), ("added after train()", late), ("and train() once more", cured)):
    print(f"{name:22}", *(f"{value:9.4f}" for value in seen))
if not (early[0] == early[2] != early[1] and late[0] == late[1] != late[2] and cured == early):
    sys.exit("no longer so")
END
