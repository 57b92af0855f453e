#!/usr/bin/env bash
# peft: an adapter loaded onto a shallower network loses layers, without an error or a warning.
#
# An adapter of four layers is saved and loaded onto a network of two layers. `PeftModel.from_pretrained`
# keeps the two layers that fit and drops the tensors of the other two. It warns about tensors that the
# file lacks, but not about tensors that the network lacks. What is saved next holds only the rest.
#
# Why it matters: whoever removes layers, or builds a grown network at its first depth before loading,
# gets half of an adapter that looks like a whole one.
#
# Seen with peft 0.21.2, transformers 5.24.0, accelerate 1.15.0, torch 2.13.0+cpu, Python 3.11.7:
#
#   peft 0.21.2 torch 2.13.0+cpu
#   saved from 4 layers: 8 tensors
#   loaded onto 6 layers: 1 warning(s)
#   loaded onto 2 layers: 4 tensors kept, 0 warning(s)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6
"$dir/env/bin/pip" install -qq --no-compile --no-deps peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 \
    huggingface_hub==2.4.0 safetensors==0.8.0 tokenizers==0.23.3 regex==2026.11.19 packaging==26.4 psutil==7.2.2 \
    PyYAML==6.0.4 tqdm==4.70.1 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 anyio==4.16.0 idna==3.20 h11==0.16.0
HF_HUB_OFFLINE=1 "$dir/env/bin/python" -I - "$dir/adapter" <<'END'
import logging, sys, warnings
import peft, torch
from safetensors.torch import load_file

print("peft", peft.__version__, "torch", torch.__version__)
where, said = sys.argv[1], []
keep = logging.Handler()
keep.emit = said.append
logging.getLogger().addHandler(keep)
logging.captureWarnings(True)
warnings.simplefilter("always")


def network(depth):
    return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(depth)))


def load(depth):
    said.clear()
    model = peft.PeftModel.from_pretrained(network(depth), where)
    return sum("lora_" in name for name, _ in model.named_parameters()), len(said)


config = peft.LoraConfig(target_modules=r"\d+")
peft.get_peft_model(network(4), config).save_pretrained(where)
saved = len(load_file(where + "/adapter_model.safetensors"))
_, deeper = load(6)
kept, shallower = load(2)
print(f"saved from 4 layers: {saved} tensors")
print(f"loaded onto 6 layers: {deeper} warning(s)")
print(f"loaded onto 2 layers: {kept} tensors kept, {shallower} warning(s)")
if (saved, kept, deeper, shallower) != (8, 4, 1, 0):
    sys.exit("no longer so")
END
