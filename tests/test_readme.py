"""The code of the README runs, in its order, as it stands there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[int, str]]:
    """Every python block with the number of the line on which its code starts; those of hosts run with their tests."""
    found = [(README.count("\n", 0, one.start(1)) + 1, one[1]) for one in BLOCK.finditer(README)]
    return [(line, code) for line, code in found if "auxin.hosts" not in code]


def grown(text: str) -> list[str]:
    """What grew, of lines such as `249 blocks.1 <- copy of blocks.0 · ... · 20 ms`; moments and times differ."""
    return [line.split(" · gradient")[0].split(" ", 1)[1] for line in text.splitlines() if " <- " in line]


def test_the_code_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = []
    for line, code in blocks():
        # Empty lines in front, so that a traceback shows the line of the README.
        exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), namespace)
        printed.append(capsys.readouterr().out)
    shown = re.search(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert shown and grown(shown[1]) == grown(printed[0])


def test_it_is_short_and_code_comes_early() -> None:
    assert len(README.split()) < 700 and blocks()[0][0] <= 15


def test_pictures_are_there() -> None:
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).exists(), picture


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_commands_exist(document: str) -> None:
    rules = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {name for rule in rules for name in rule.split()}
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", (ROOT / document).read_text(), re.MULTILINE))
    used = {name for pair in named for name in pair if name}
    assert used and used <= targets
