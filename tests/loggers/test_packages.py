"""What a run tells the loggers themselves, offline, read back from what they wrote. `make loggers` brings them."""

import csv
import importlib.util
import json
import sqlite3
from pathlib import Path

import pytest

from auxin.loggers import MLflowRun
from test_loggers import trained, training_step

BLOCK, REST = 8 * 16 + 16 + 16 * 8 + 8, 9
PARAMETERS = {1: BLOCK + REST, 4: 2 * BLOCK + REST, 8: 3 * BLOCK + REST}  # by the optimizer step
GROWTHS = {1: 0, 4: 1, 8: 2}
NAMES = ("auxin/parameters", "auxin/growths", "auxin/flops")

pytestmark = [pytest.mark.filterwarnings("ignore")]


def needs(name):
    found = importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not found, reason=f"{name} is not installed; `make loggers` brings it")


def check(told, said=None):
    """Told: (step, value) by name; said: (step, text)."""
    for name, expected in (("auxin/parameters", PARAMETERS), ("auxin/growths", GROWTHS)):
        assert {step: value for step, value in told[name] if step in expected} == expected
    assert max(value for _, value in told["auxin/flops"]) > 0
    if said is not None:
        assert [step for step, _ in said] == [4, 8] and all("parameters" in text for _, text in said)


def events_in(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    told = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    said = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("auxin/growth/text_summary")]
    return told, said


@needs("tensorboard")
def test_tensorboard(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        trained(writer)
    check(*events_in(tmp_path))


@needs("tensorboard")
def test_tensorboard_of_lightning(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    trained(logger)
    logger.finalize("success")
    check(*events_in(logger.log_dir))


def test_csv_of_lightning(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    trained(logger)
    logger.save()
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    check({name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in NAMES})


def records_in(data):
    """The records of a file of wandb: pieces of blocks of 32 KiB, each behind a sum, its length, and its kind."""
    at, whole = 7, b""  # behind the header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no head fits into the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


@needs("wandb")
@pytest.mark.parametrize("own", ["steps", "rows"])
def test_wandb_beside_the_rows_of_the_user(tmp_path, monkeypatch, own):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    run = wandb.init(project="auxin", dir=str(tmp_path))
    grower = trained(run, calls=0)
    for n in range(1, 13):
        training_step(grower)
        run.log({"loss": 1.0 / n}, **({"step": 10 * n} if own == "steps" else {}))
    run.finish()
    wandb.teardown()  # waits for the process that writes the file
    records = records_in(next(tmp_path.glob("wandb/offline-run-*/*.wandb")).read_bytes())
    items = [record.history.item for record in map(Record.FromString, records) if record.HasField("history")]
    rows = [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in one} for one in items]
    assert [row["loss"] for row in rows if "loss" in row] == [1.0 / n for n in range(1, 13)]  # none of them is lost
    told = {name: [(row["auxin/step"], row[name]) for row in rows if name in row] for name in (*NAMES, "auxin/growth")}
    check(told, told["auxin/growth"])


@needs("mlflow")
@pytest.mark.parametrize("door", ["module", "client"])
def test_mlflow(tmp_path, door):
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    client = mlflow.MlflowClient()
    with mlflow.start_run() as run:
        trained(mlflow if door == "module" else MLflowRun(client, run.info.run_id))
    told = {n: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)] for n in NAMES}
    tags = client.get_run(run.info.run_id).data.tags
    said = sorted((int(name.rpartition("/")[2]), text) for name, text in tags.items() if "auxin/growth/" in name)
    check(told, said)


@needs("trackio")
@pytest.mark.parametrize("door", ["module", "run"])
def test_trackio(tmp_path, monkeypatch, door):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    import trackio
    from trackio import sqlite_storage, utils

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path)  # it was read when the first of them was imported
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path)
    run = trackio.init(project=f"auxin-{door}", embed=False)
    trained(trackio if door == "module" else run)
    trackio.finish()
    with sqlite3.connect(next(tmp_path.rglob(f"auxin-{door}.db"))) as data:
        rows = [(step, json.loads(text)) for step, text in data.execute("select step, metrics from metrics")]
    told = {name: [(step, row[name]) for step, row in rows if name in row] for name in (*NAMES, "auxin/growth")}
    check(told, told["auxin/growth"])


@needs("aim")
def test_aim(tmp_path):
    import aim

    run = aim.Run(repo=str(tmp_path), system_tracking_interval=None, log_system_params=False)
    trained(run)
    columns = {metric.name: metric.data.items_list() for metric in run.metrics()}
    told = {name: list(zip(steps, values, strict=True)) for name, (steps, (values, *_)) in columns.items()}
    said = [(step, run[f"auxin/growth/{step}"]) for step in (4, 8)]
    run.close()
    check(told, said)
