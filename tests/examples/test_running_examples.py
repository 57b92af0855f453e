"""The examples about running training: each is run in a process of its own.

`resume.py` is run, and killed, in tests/killed.
"""

import functools
import json
import re
from pathlib import Path

import pytest

import anew

EXAMPLES = Path(__file__).parents[2] / "examples"


@functools.cache
def output_of(name: str, *arguments: str, seconds: int = 100) -> str:
    """What an example prints; it must not fail, nor warn."""
    run = anew.run(EXAMPLES / name, *arguments, seconds=seconds, strict=UserWarning)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_external_signal_grows_when_thread_file_and_function_say_so():
    printed = output_of("external_signal.py")
    by_thread, by_file, by_function = json.loads(printed.splitlines()[-1].removeprefix("grown at steps "))
    assert by_file == [100] and by_function == [62, 124, 187]  # 1000, 2000, 3000 samples at 16 a step
    assert len(by_thread) == 1 and by_thread[0] in (50, 51)
    assert "['grow.taken']" in printed


def test_own_surgery_keeps_the_average_in_step_and_puts_a_failure_back():
    printed = output_of("own_surgery.py")
    assert "hidden.1 <- Linear" in printed and "2 hidden layers in the average too" in printed
    assert "head.weight (3, 30) -> (4, 30)" in printed and "both know 4 classes" in printed
    assert "something went wrong in the middle: 2 hidden layers as before" in printed
    losses = [float(loss) for loss in re.findall(r"^loss (\d+\.\d+)", printed, re.M)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


def test_own_surgery_with_a_hugging_face_model():
    pytest.importorskip("transformers")
    printed = output_of("own_surgery.py")
    assert "transformer.wte.weight (100, 16) -> (110, 16)" in printed
    assert "110 tokens, embedding and head still one tensor: True" in printed


def test_language_model_grows_and_is_compared_at_equal_flops():
    printed = output_of("language_model.py", "--quick")
    assert re.findall(r"step (\d+): blocks", printed) == ["2", "5"]
    rows = re.findall(r"^(\d) -> (\d) layers: (\d\.\d+) bits per byte, (\d+) steps, (\d\.\d+) TFLOP$", printed, re.M)
    assert [(first, last) for first, last, *_ in rows] == [("2", "6"), ("6", "6"), ("2", "2")]
    flops = [float(row[4]) for row in rows]
    assert max(flops) - min(flops) < 0.011 and all(float(row[2]) < 8 for row in rows)
    log = Path(printed.splitlines()[-1].split()[-1])
    assert {"metrics.jsonl", "journal.json"} <= {path.name for path in log.iterdir()}
