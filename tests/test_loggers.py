"""Loggers of other packages, by stand-ins that have their ways; `make loggers` runs the packages themselves."""

import logging
import math
import warnings

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.loggers import RARELY, Loggers, MLflowRun, logger_of

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Writer:
    """The ways of TensorBoard's SummaryWriter."""

    def __init__(self):
        self.told, self.said = [], []

    def add_scalar(self, tag, scalar_value, global_step=None):
        self.told.append((tag, scalar_value, global_step))

    def add_text(self, tag, text_string, global_step=None):
        self.said.append((text_string, global_step))


class Mlflow(Writer):
    """The ways of the module mlflow."""

    def log_metrics(self, metrics, step=None, synchronous=None):
        self.told += [(name, value, step) for name, value in metrics.items()]

    def set_tag(self, key, value):
        self.said.append((value, int(key.rpartition("/")[2])))


class Client(Writer):
    """The ways of MlflowClient."""

    def log_batch(self, run_id, metrics=()): ...

    def log_metric(self, run_id, key, value, timestamp=None, step=None):
        assert run_id == "a run"
        self.told.append((key, value, step))

    def set_tag(self, run_id, key, value):
        assert run_id == "a run"
        self.said.append((value, int(key.rpartition("/")[2])))


class Lightning(Writer):
    """The ways of a logger of Lightning, one that writes for TensorBoard."""

    def log_metrics(self, metrics, step=None):
        self.told += [(name, value, step) for name, value in metrics.items()]

    @property
    def experiment(self):
        return self


class Trackio(Writer):
    """The way of trackio: ``log``."""

    def log(self, metrics, step=None):
        for name, value in metrics.items():
            (self.said if isinstance(value, str) else self.told).append(
                (value, step) if isinstance(value, str) else (name, value, step)
            )


class Wandb(Writer):
    """The ways of a run of Weights & Biases: rows have a step of their own, and are written by the user's own log."""

    def __init__(self):
        super().__init__()
        self.row, self.axes = {}, {}

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, data, step=None, commit=None):
        assert step is None and commit is False and self.axes == {"auxin/*": "auxin/step"}
        at = data["auxin/step"]
        for name, value in data.items():
            if isinstance(value, str):
                self.said.append((value, at))
            elif name != "auxin/step":
                self.told.append((name, value, at))


class Aim(Writer):
    """The ways of aim's Run."""

    def track(self, value, name=None, step=None, epoch=None, *, context=None):
        self.told.append((name, value, step))

    def __setitem__(self, key, value):
        self.said.append((value, int(key.rpartition("/")[2])))


WAYS = [Writer, Mlflow, Client, Lightning, Trackio, Wandb, Aim]


def handed_over(logger):
    return MLflowRun(logger, "a run") if isinstance(logger, Client) else logger


for kind in (Mlflow, Client, Trackio, Wandb, Aim):  # they have those of a SummaryWriter for the tests only
    kind.add_scalar = kind.add_text = None


def trained(log, calls=12, **words):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    edit = ax.Insert("", Block, index=0)
    options = {"edits": edit, "when": ax.when.at([4, 8]), "probe": X, "log": log, "limit": ax.Limit(growths=2)} | words
    grower = ax.Grower(model, optimizer, **options)
    for _ in range(calls):
        training_step(grower)
    return grower


def training_step(grower):
    optimizer = grower.companions[0]
    optimizer.zero_grad()
    nn.functional.mse_loss(grower.model(X), Y).backward()
    optimizer.step()
    grower.step(1.0)


@pytest.mark.parametrize("kind", WAYS)
def test_growths_parameters_and_flops_are_told(kind):
    logger = kind()
    trained(handed_over(logger))
    told = {name: [(value, step) for n, value, step in logger.told if n == name] for name, _, _ in logger.told}
    block, rest = 8 * 16 + 16 + 16 * 8 + 8, 9
    assert told["auxin/growths"][0] == (0, 1) and (1, 4) in told["auxin/growths"] and (2, 8) in told["auxin/growths"]
    assert (block + rest, 1) in told["auxin/parameters"] and (3 * block + rest, 8) in told["auxin/parameters"]
    flops = [value for value, _ in told["auxin/flops"]]
    assert flops == sorted(flops) and flops[-1] > 0
    assert [step for _, step in logger.said] == [4, 8] and all("parameters" in text for text, _ in logger.said)


def test_readings_are_told_rarely_and_never_without_end():
    class Counted(Writer):
        pass

    logger, loggers = Counted(), None
    loggers = Loggers([logger])
    for step in range(1, 10_001):
        loggers.reading(step, 0, 10, float(step))
    steps = [step for name, _, step in logger.told if name == "auxin/flops"]
    assert steps[0] == 1 and all(later > RARELY * earlier for earlier, later in zip(steps, steps[1:], strict=False))
    assert len(steps) < 100 + math.log(10_000) / math.log(RARELY)


def test_flops_that_are_not_known_are_left_out():
    logger = Writer()
    grower = trained(logger, probe=lambda: X)
    assert grower.journal and {name for name, _, _ in logger.told} == {"auxin/growths", "auxin/parameters"}


def test_a_way_back_is_told():
    logger = Writer()
    grower = trained(logger, calls=4)
    grower.undo()
    assert [value for name, value, _ in logger.told if name == "auxin/growths"][-2:] == [1, 0]
    assert logger.said[-1] == ("growth 1: undo()", 4)


def squared_error(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def test_the_gain_that_was_predicted_is_told():
    logger = Writer()
    evidence = ax.Evidence(squared_error, [(X, Y)] * 2)
    grower = trained(logger, 4, evidence=evidence, when=ax.when.at([4]), choose=ax.choose.by_gain())
    told = {name: value for name, value, _ in logger.told}
    (decision,) = grower.ledger.decisions
    assert told["auxin/predicted_gain"] == pytest.approx(decision.options[decision.chosen].predicted)
    assert told["auxin/predicted_gain"] > 0 and "auxin/obtained_gain" not in told


def test_the_gain_that_was_obtained_is_told():
    logger = Writer()
    choose = ax.choose.by_trial(score=lambda model: 1.0 - 0.25 * len(model), steps=lambda grower: None)
    grower = trained(logger, 4, when=ax.when.at([4]), choose=choose)
    assert len(grower.journal) == 1
    told = {name: value for name, value, _ in logger.told}
    assert told["auxin/obtained_gain"] == pytest.approx(0.25) and "auxin/predicted_gain" not in told


@pytest.mark.parametrize("chosen", [None, 0])
def test_no_gain_is_told_where_nothing_grows(chosen):
    logger = Writer()
    stays = {"edit": "as it is", "predicted": None, "obtained": 1.0}
    Loggers([logger]).weighed({"options": [stays], "chosen": chosen}, 3)
    assert logger.told == []


def test_a_directory_and_loggers_together(tmp_path):
    logger, other = Writer(), Aim()
    grower = trained([tmp_path / "run", logger, other])
    assert (tmp_path / "run" / "metrics.jsonl").exists() and grower.log.directory == tmp_path / "run"
    assert logger.told == other.told and logger.told
    grower.log.close()
    before = list(logger.told)
    grower.step(1.0)
    assert logger.told == before


def test_nothing_is_told_from_inside_a_trial():
    logger = Writer()
    grower = trained(logger, calls=3)
    before = list(logger.told)
    with grower.trial(ax.Insert("", Block, index=0)):
        grower.step(1.0)
    assert logger.told == before


class Raises(Writer):
    def add_scalar(self, *told):
        raise ConnectionError("the server is gone")

    add_text = add_scalar


def test_a_logger_that_raises_is_warned_of_once_and_training_goes_on():
    logger = Writer()
    with pytest.warns(UserWarning, match="log= has raised ConnectionError: the server is gone. Training") as caught:
        grower = trained([Raises(), logger])
    assert len([one for one in caught if "has raised" in str(one.message)]) == 1
    assert len(grower.journal) == 2 and grower.calls == 12 and [step for _, step in logger.said] == [4, 8]


def test_a_run_with_a_logger_goes_as_one_without():
    told, untold = trained(Writer()), trained(None)
    for (name, one), (_, other) in zip(told.model.state_dict().items(), untold.model.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_flops_are_not_told_where_a_resume_has_lost_count(tmp_path):
    ax.save(trained(None, calls=5), tmp_path)
    logger = Writer()
    model = nn.Sequential(Block(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    edit = ax.Insert("", Block, index=0)
    grower = ax.Grower(model, optimizer, edits=edit, when=ax.when.at([8]), probe=X, log=logger)
    ax.load(tmp_path, grower)
    grower.step(1.0)
    assert ("auxin/growths", 1, 5) in logger.told and "auxin/flops" not in {name for name, _, _ in logger.told}


@pytest.mark.parametrize("log", [logging.getLogger("a"), print, Writer, object()])
def test_what_has_none_of_the_ways_is_refused(log):
    with pytest.raises(ax.GrowthError, match=r"pass a directory, e\.g\. log='run', or a logger that has add_scalar"):
        trained(log, calls=0)


def test_a_client_of_mlflow_is_told_how_it_is_passed():
    with pytest.raises(ax.GrowthError, match=r"does not say which run.*log=auxin\.loggers\.MLflowRun\(client, run_id"):
        logger_of(Client())


def test_two_directories_are_refused(tmp_path):
    with pytest.raises(ax.GrowthError, match="a run writes its log into one directory"):
        trained([str(tmp_path / "a"), str(tmp_path / "b")], calls=0)


def test_a_long_text_is_shortened():
    logger = Writer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loggers([logger]).text("auxin/growth", "x" * 5000, 1)
    assert len(logger.said[0][0]) == 500
