"""What takes longer: two processes, and libraries on top of Lightning."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import auxin as ax
from auxin.hosts.lightning import GrowthCallback

HERE = Path(__file__).parent


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_processes_grow_as_one(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "lightning_ranks.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    print(found)
    assert found["wrapped"][-1] == "DistributedDataParallel"
    assert found["blocks"] == 4 and found["before"] == 2 and found["steps"] == 6
    assert found["spread"] == found["resumed spread"] == found["resumed"] == 0
    assert found["alone"] <= 1e-12  # in float64


def series() -> Any:
    """Four noisy waves, 300 days each."""
    import numpy
    import pandas

    days, noise = numpy.arange(300), numpy.random.default_rng(0)
    ds = pandas.date_range("2000-01-01", periods=300, freq="D")
    waves = {f"s{i}": numpy.sin(days / 7 + i) + 0.1 * noise.standard_normal(300) for i in range(4)}
    return pandas.concat(pandas.DataFrame({"unique_id": name, "ds": ds, "y": y}) for name, y in waves.items())


@pytest.mark.long
@pytest.mark.parametrize("name", ["NHITS", "NBEATS"])
@pytest.mark.parametrize("counted_by", [None, "n_blocks"])
def test_neuralforecast_saves_and_loads_what_has_grown(tmp_path: Path, name: str, counted_by: str | None) -> None:
    """It compares no unexpected keys: without a count it loads the small network, and forecasts with it."""
    neuralforecast = pytest.importorskip("neuralforecast")
    models = importlib.import_module("neuralforecast.models")
    length, horizon = 28, 7
    window = {"insample_y": torch.randn(8, length, 1), "insample_mask": torch.ones(8, length, 1)}
    probe = ({**window, "futr_exog": None, "hist_exog": None, "stat_exog": None},)
    edit, trigger = ax.Duplicate("blocks", by=1, order="last"), ax.when.at([1, 2])
    growth = GrowthCallback(edit, trigger, monitor="ptl/val_loss", probe=probe, counted_by=counted_by)
    steps: dict[str, Any] = {"max_steps": 40, "val_check_steps": 10, "windows_batch_size": 64, "batch_size": 4}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    size: dict[str, Any] = {"h": horizon, "input_size": length, "mlp_units": 3 * [[32, 32]], "n_blocks": [1, 1, 1]}
    stacks = {"stack_types": 3 * ["identity"]}
    model = getattr(models, name)(callbacks=[growth], accelerator="cpu", **size, **stacks, **steps, **quiet)
    forecaster = neuralforecast.NeuralForecast([model], freq="D")
    forecaster.fit(series(), val_size=50)
    grown = forecaster.models[0]
    assert len(grown.blocks) == 5 and grown.hparams["n_blocks"] == ([1, 1, 3] if counted_by else [1, 1, 1])
    forecast = forecaster.predict()[name].to_numpy()
    forecaster.save(str(tmp_path / "saved"), save_dataset=True)
    loaded = neuralforecast.NeuralForecast.load(str(tmp_path / "saved"))
    assert len(loaded.models[0].blocks) == (5 if counted_by else 3)
    assert (loaded.predict()[name].to_numpy() == forecast).all() == (counted_by is not None)


@pytest.mark.long
def test_the_page_on_libraries_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("neuralforecast")
    monkeypatch.chdir(tmp_path)
    page = (HERE.parent.parent / "docs" / "hosts" / "lightning.md").read_text()
    code = page.split("## Libraries on top of Lightning")[1].split("```python\n")[1].split("```")[0]
    given: dict[str, Any] = {"torch": torch, "ax": ax, "GrowthCallback": GrowthCallback, "series": series()}
    exec(compile(code, "lightning.md", "exec"), given)
    grown, loaded = given["forecaster"].models[0], given["loaded"].models[0]
    assert len(loaded.blocks) == len(grown.blocks) > 3
    assert (given["loaded"].predict()["NHITS"] == given["forecaster"].predict()["NHITS"]).all()
