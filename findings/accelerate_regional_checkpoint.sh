#!/usr/bin/env bash
# accelerate: with regional compilation, a layer appended to the prepared model is missing in its checkpoint.
#
# With `use_regional_compilation`, `prepare` returns a second tree of modules over the same weights, while
# the accelerator keeps the first one for `save_state`. A layer appended to a `ModuleList` of the returned
# model runs and is trained, and `get_state_dict(model)` holds it, but `save_state` writes the weights without it.
# The saved optimizer does hold its momentum. With the whole model compiled, the layer is saved. Why it
# matters: the checkpoint of a network that was made deeper cannot bring the new layer back, and no warning is given.
#
# Seen with accelerate 1.15.0, torch 2.13.0+cpu, Python 3.11.7:
#
#   accelerate 1.15.0 torch 2.13.0+cpu whole: tensors in get_state_dict, model file, optimizer file: [6, 6, 6]
#   accelerate 1.15.0 torch 2.13.0+cpu regions: tensors in get_state_dict, model file, optimizer file: [6, 4, 6]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install -qq --no-compile --no-deps accelerate==1.15.0 huggingface_hub==2.4.0 safetensors==0.8.0 \
    packaging==26.4 psutil==7.2.2 PyYAML==6.0.4 tqdm==4.70.1 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 \
    anyio==4.16.0 idna==3.20 h11==0.16.0
cat > "$dir/finding.py" <<'END'
import sys
import accelerate, torch
from accelerate.utils import TorchDynamoPlugin
from safetensors.torch import load_file


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


where, mode = sys.argv[1:]
plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=mode == "regions")
accelerator, net = accelerate.Accelerator(cpu=True, dynamo_plugin=plugin), Net()
model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
layer = torch.nn.Linear(4, 4)
before = layer.weight.detach().clone()
model.layers.append(layer)
optimizer.add_param_group({"params": list(layer.parameters())})
accelerator.backward(model(torch.ones(2, 4)).sum())
optimizer.step()
accelerator.save_state(where)
counts = [len(accelerator.get_state_dict(model)), len(load_file(where + "/model.safetensors"))]
counts.append(len(torch.load(where + "/optimizer.bin")["state"]))
versions = f"accelerate {accelerate.__version__} torch {torch.__version__}"
print(f"{versions} {mode}: tensors in get_state_dict, model file, optimizer file: {counts}")
if torch.equal(before, layer.weight) or counts != [6, 4 if mode == "regions" else 6, 6]:
    sys.exit("no longer so")
END
for mode in whole regions; do TMPDIR="$dir" "$dir/env/bin/python" -I "$dir/finding.py" "$dir/$mode" "$mode"; done
