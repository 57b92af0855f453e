#!/usr/bin/env bash
# NeuralForecast 3.3.0: a saved model that has more tensors than its hyperparameters say loads without a word, as a smaller
# model with another forecast.
#
# A user appends a fourth block to a fitted NBEATS of three identical stacks and saves it; the file holds all four blocks.
# `NeuralForecast.load` builds three, from `hparams`, loads with strict=False, and compares only the names that are missing
# with those that may be; names that are left over are looked at only if others are missing.
#
# Printed on NeuralForecast 3.3.0, torch 2.13.0+cpu, Python 3.11:
#
#   neuralforecast 3.3.0, torch 2.13.0
#   blocks: 4 saved, 3 loaded; warnings that name one of them: 0
#   forecasts are the same: False
#
# Why it matters: whoever changes a network while it trains gets no word that the file does not open as what it holds; the
# other direction, a missing block, is an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile neuralforecast==3.3.0 torch==2.13.0
cat > "$folder/seen.py" <<'PY'
import copy, logging, sys, warnings

logging.disable(logging.WARNING)
import numpy as np, pandas as pd, torch, neuralforecast
from neuralforecast import NeuralForecast
from neuralforecast.models import NBEATS

quiet = dict(accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False)
data = pd.DataFrame({"unique_id": "a", "ds": range(120), "y": np.sin(np.arange(120) / 3)})
sizes = dict(h=4, input_size=12, max_steps=5, mlp_units=3 * [[16, 16]], stack_types=3 * ["identity"])
library = NeuralForecast([NBEATS(**sizes, **quiet)], freq=1)
library.fit(data)
net = library.models[0]
net.blocks.append(copy.deepcopy(net.blocks[2]))
library.fit(data)
library.save(sys.argv[1], overwrite=True, save_dataset=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = NeuralForecast.load(sys.argv[1])
named = sum("blocks.3" in str(w.message) for w in caught)
same = np.array_equal(*(one.predict()["NBEATS"].to_numpy() for one in (library, loaded)))
print(f"neuralforecast {neuralforecast.__version__}, torch {torch.__version__.partition('+')[0]}")
print(f"blocks: {len(net.blocks)} saved, {len(loaded.models[0].blocks)} loaded; warnings that name one of them: {named}")
print(f"forecasts are the same: {same}")
sys.exit(not (len(net.blocks) == 4 and len(loaded.models[0].blocks) == 3 and named == 0 and not same))
PY
cd "$folder"
"$folder/venv/bin/python" seen.py "$folder/saved" 2> "$folder/errors" || { tail -3 "$folder/errors" >&2; exit 1; }
