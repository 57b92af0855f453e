"""The code of these pages of the documentation runs, each page in its order, as it stands there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


METHODS = sorted(f"methods/{page.name}" for page in (DOCS / "methods").glob("*.md") if page.name != "README.md")


PAGES = ["auto.md", "by_hand.md", "edits.md", "scores.md", "target_networks.md", "widen.md", *METHODS]


@pytest.mark.parametrize("page", PAGES)
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


@pytest.mark.parametrize("page", METHODS)
def test_a_method_is_short(page: str) -> None:
    text = (DOCS / page).read_text()
    assert sum(block[1].count("\n") for block in BLOCK.finditer(text)) <= 25
    assert "**When it hurts.**" in text and "**Source.**" in text
    assert page.removeprefix("methods/") in (DOCS / "methods/README.md").read_text()
