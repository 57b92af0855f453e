"""The code of these pages of the documentation runs, each page in its order, as it stands there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["edits.md", "scores.md", "target_networks.md", "widen.md"])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = (DOCS / page).read_text()
    module = types.ModuleType("a_page_of_the_docs")  # its functions are importable, as those of a user's file are
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = list(BLOCK.finditer(text))
    assert found
    for one in found:
        before = "\n" * text.count("\n", 0, one.start(1))
        exec(compile(before + one[1], str(DOCS / page), "exec"), module.__dict__)
