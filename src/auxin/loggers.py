"""What a run tells the loggers that people have: growths, parameters, FLOPs, predicted and obtained gains.

A logger is known by its ways, not by its class, and none is imported. The names of all that is told begin with
``auxin/``.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from auxin.errors import GrowthError

LONGEST = 500  # characters of a text; MLflow's shortest limit for a tag
RARELY = 1.01  # a reading is told where the FLOPs so far have grown by this factor, or the network has


class Logger(Protocol):
    """What is made of every logger."""

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by their names."""
        ...

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text."""
        ...


class Scalars:
    """TensorBoard's ``SummaryWriter``, and what has its ways: ``add_scalar``, ``add_text``."""

    def __init__(self, writer: Any):
        self.writer = writer

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """A text, where the writer takes one."""
        if hasattr(self.writer, "add_text"):
            self.writer.add_text(name, text, step)


class Metrics:
    """MLflow's module, a logger of Lightning, and what has their way: ``log_metrics(values, step=...)``."""

    def __init__(self, logger: Any):
        self.logger = logger

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """All at once."""
        self.logger.log_metrics(dict(values), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """A tag in MLflow; a text where a logger of Lightning writes for TensorBoard; else nothing."""
        if hasattr(self.logger, "set_tag"):
            self.logger.set_tag(f"{name}/{step}", text)
        elif hasattr(getattr(self.logger, "experiment", None), "add_text"):
            self.logger.experiment.add_text(name, text, step)


class MLflowRun:
    """A run of an ``MlflowClient``, which needs to be told of which: ``log=MLflowRun(client, run_id)``."""

    def __init__(self, client: Any, run_id: str):
        self.client, self.run_id = client, run_id

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """One metric each."""
        for name, value in values.items():
            self.client.log_metric(self.run_id, name, value, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """A tag."""
        self.client.set_tag(self.run_id, f"{name}/{step}", text)


class Steps:
    """Trackio, an ``Accelerator``, and what has their way: ``log(values, step=...)``."""

    def __init__(self, run: Any):
        self.run = run

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """All at once."""
        self.run.log(dict(values), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """A value like others."""
        self.run.log({name: text}, step=step)


class Rows:
    """Weights & Biases, its module or a run. Rows have a step of their own there, so what is told joins the next row.

    ``auxin/step`` is the optimizer step, and the axis of all that is told.
    """

    def __init__(self, run: Any):
        self.run, self._axis = run, False

    def numbers(self, values: Mapping[str, Any], step: int) -> None:
        """Put them into the row that the run writes next."""
        if not self._axis:
            self.run.define_metric("auxin/*", step_metric="auxin/step")
            self._axis = True
        self.run.log({**values, "auxin/step": step}, commit=False)

    def text(self, name: str, text: str, step: int) -> None:
        """A value like others."""
        self.numbers({name: text}, step)


class Tracks:
    """aim's ``Run``: ``track(value, name=..., step=...)``."""

    def __init__(self, run: Any):
        self.run = run

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """One value each."""
        for name, value in values.items():
            self.run.track(value, name=name, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """A parameter of the run."""
        self.run[f"{name}/{step}"] = text


def logger_of(given: Any) -> Logger:
    """What can be told about a run, from whatever logger.

    Raises:
        GrowthError: it is none.
    """
    if isinstance(given, (Scalars, Metrics, MLflowRun, Steps, Rows, Tracks)):
        return given
    for way, kind in (("log_metrics", Metrics), ("add_scalar", Scalars), ("track", Tracks), ("define_metric", Rows)):
        if callable(getattr(given, way, None)) and not isinstance(given, type):
            return kind(given)
    if callable(getattr(given, "log_metric", None)) and callable(getattr(given, "log_batch", None)):
        raise GrowthError(
            f"log={type(given).__name__}: a client of MLflow does not say which run is meant. Pass "
            "log=auxin.loggers.MLflowRun(client, run_id), or the module: log=mlflow."
        )
    if _takes_a_step(getattr(given, "log", None)):
        return Steps(given)
    raise GrowthError(
        f"log={given!r:.80} is a {type(given).__name__}; pass a directory, e.g. log='run', or a logger that has "
        "add_scalar (a SummaryWriter), log (wandb, trackio), log_metrics (mlflow, Lightning) or track (aim), or a list "
        "of these."
    )


class Loggers:
    """Tells several loggers; one that raises is warned of once, and training goes on.

    Args:
        given: the loggers.

    Raises:
        GrowthError: one of them is none.
    """

    def __init__(self, given: Sequence[Any]):
        self._loggers = [logger_of(one) for one in given]
        self._failed: set[int] = set()
        self._network: tuple[int, int] | None = None  # growths and parameters that were told last
        self._flops = math.nan

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def reading(self, step: int, growths: int, parameters: int, flops: float) -> None:
        """How far the run is; where little has happened since the last time, nothing is told."""
        if self._network == (growths, parameters) and not flops > RARELY * self._flops:
            return
        self._network, self._flops = (growths, parameters), flops
        values: dict[str, float] = {"auxin/growths": growths, "auxin/parameters": parameters, "auxin/flops": flops}
        self._tell("numbers", values, step)

    def text(self, name: str, text: str, step: int) -> None:
        """A mark: a growth, or that one was undone."""
        self._tell("text", name, text if len(text) <= LONGEST else text[: LONGEST - 1] + "…", step)

    def weighed(self, decision: Mapping[str, Any], step: int) -> None:
        """The gains of what was chosen, as the ledger has them.

        Predicted: what the first step on the new entries takes off the loss. Obtained: by how much the loss of its
        branch is below that of the network as it was.
        """
        options, chosen = decision["options"], decision["chosen"]
        if chosen is None or options[chosen]["edit"] == "as it is":
            return
        one = options[chosen]
        stayed = next((o["obtained"] for o in options if o["edit"] == "as it is"), None)
        obtained = None if stayed is None or one["obtained"] is None else stayed - one["obtained"]
        values = {"auxin/predicted_gain": one["predicted"], "auxin/obtained_gain": obtained}
        self._tell("numbers", {name: value for name, value in values.items() if value is not None}, step)

    def _tell(self, way: str, *told: Any) -> None:
        if way == "numbers":
            values, step = told
            told = {name: float(value) for name, value in values.items() if math.isfinite(value)}, step
            if not told[0]:
                return
        for number, logger in enumerate(self._loggers):
            try:
                getattr(logger, way)(*told)
            except Exception as error:  # whatever a logger raises: it is no reason to lose a run
                if number not in self._failed:
                    self._failed.add(number)
                    warnings.warn(
                        f"the logger of log= has raised {type(error).__name__}: {error}. Training goes on; what it "
                        "does not take will be missing there.",
                        stacklevel=5,
                    )


def _takes_a_step(log: Any) -> bool:
    """Whether a function is ``log(values, step=...)``: that of Python's own loggers is not."""
    try:
        return callable(log) and "step" in inspect.signature(log).parameters
    except ValueError:  # one in C, without a signature
        return False
