"""The four ways of adding layers: each example runs, and prints what it says."""

import re
from pathlib import Path

import pytest
from test_running_examples import EXAMPLES, output_of


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]


def test_sequential_appends_10_20_30_40():
    printed = output_of("sequential.py")
    lines = [line for line in printed.splitlines() if line.startswith("layers.")]
    assert [line.split(" · ")[0] for line in lines] == [
        "layers.1 <- Tanh",
        "layers.2 <- Linear",
        "layers.3 <- Tanh",
        "layers.4 <- Linear",
    ]
    assert [int(n) for n in re.findall(r"(\d+) outputs", printed)] == [20, 20, 30, 30, 40, 40]
    found = losses(printed)
    assert all(last < first / 5 for first, last in zip(found[::2], found[1::2], strict=True))
    assert "Linear(in_features=30, out_features=40, bias=True)" in printed


def test_module_list_appends_and_puts_one_in_the_middle():
    printed = output_of("module_list.py")
    assert printed.count("output shape changed") == 2
    assert "layers.2 <- Linear · +930 parameters" in printed and "function unchanged (max |d| = 0)" in printed
    assert printed.splitlines()[-1] == "[(20, 10), (30, 20), (30, 30), (40, 30)]"
    found = losses(printed)
    assert all(last < first for first, last in zip(found[::2], found[1::2], strict=True))


def test_module_dict_adds_by_name_and_takes_out_again():
    printed = output_of("module_dict.py")
    assert "inputs -> early -> middle -> outputs" in printed and printed.count("function unchanged") == 2
    assert "Remove('layers.early') · -420 parameters" in printed
    names = re.findall(r"layers\.(\w+)\.weight", printed.splitlines()[-1])
    assert names == ["inputs", "middle", "outputs"]


def test_conditional_wakes_the_layer_once_the_loss_is_flat():
    printed = output_of("conditional.py")
    assert printed.count("extra wakes: Linear") == 1 and "840 parameters begin to train" in printed
    assert "as it was when it was built: True" in printed and "outputs now: (1, 40)" in printed
    assert "Dormant" not in printed


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_no_example_is_left_out_of_the_tests(path):
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert path.stem in tests
