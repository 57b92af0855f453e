"""The code of the documentation runs, each page in its order; what a page shows is what is printed."""

import contextlib
import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from docs_names import names

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


METHODS = sorted(f"methods/{page.name}" for page in (DOCS / "methods").glob("*.md") if page.name != "README.md")


PAGES = [
    "auto.md",
    "by_hand.md",
    "edits.md",
    "loggers.md",
    "scores.md",
    "silent.md",
    "target_networks.md",
    "verdict.md",
    "widen.md",
    *METHODS,
]
NETWORKS = ["start.md", *sorted(f"networks/{page.name}" for page in (DOCS / "networks").glob("*.md"))]
# Pages that show a few lines of a run: the rest of it stands in `docs_names.py`.
LINES = [
    "README.md",
    "choosers.md",
    "coming_from.md",
    "conditional_layers.md",
    "own_groups.md",
    "pruning.md",
    "sites.md",
    "triggers.md",
]
# Run by the tests of what they are about, some of them in processes of their own.
ELSEWHERE = {
    "compile.md": "compiled/test_compile_page.py",
    "ddp.md": "ddp/test_by_hand.py",
    "forecasting.md": "forecasting/test_forecasting_page.py",
    "fsdp.md": "ddp/test_by_hand.py",
    "hosts/accelerate.md": "hosts/test_pages.py",
    "hosts/lightning.md": "hosts/test_lightning.py",
    "hosts/transformers.md": "hosts/test_pages.py",
    "hosts/without.md": "hosts/test_pages.py",
    "report.md": "report/test_report_of_a_real_run.py",
    "resume.md": "killed/test_example.py",
}
# Excerpts of a longer program, or signatures: of `auxin.demo`, of companions that a user writes, of a log's reader.
EXCERPTS = {"companions.md", "demo.md", "gradient_flow.md", "upscale.md"}
SHOWN = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Moments, times, ratios, rounding, losses: they differ by machine.
NUMBER = re.compile(r"^\d+(?= )|\d+\.?\d*(?:e-?\d+)?(?= ms|x|\))|\d+\.\d+", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    carry_out(page, monkeypatch, {})


@pytest.mark.parametrize("page", LINES)
def test_the_lines_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    carry_out(page, monkeypatch, names())


@pytest.mark.parametrize("page", NETWORKS)
def test_a_network_grows_as_its_page_shows(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = [NUMBER.sub("#", lines) for lines in carry_out(page, monkeypatch, {})]
    shown = dict(SHOWN.findall((DOCS / page).read_text()))
    assert shown
    blocks = [found[1] for found in BLOCK.finditer((DOCS / page).read_text())]
    for code, text in shown.items():
        assert printed[blocks.index(code)] == NUMBER.sub("#", text)


def carry_out(page: str, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> list[str]:
    """What each block of a page prints."""
    torch.manual_seed(0)
    text = (DOCS / page).read_text()
    module = types.ModuleType("a_page_of_the_docs")  # its functions are importable, as those of a user's file are
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__dict__.update(given)
    found = list(BLOCK.finditer(text))
    assert found
    printed: list[str] = []
    for one in found:
        before = "\n" * text.count("\n", 0, one.start(1))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(before + one[1], str(DOCS / page), "exec"), module.__dict__)
        printed.append(out.getvalue())
    return printed


def test_no_page_shows_code_that_nothing_runs() -> None:
    pages = {str(page.relative_to(DOCS)): page.read_text() for page in DOCS.rglob("*.md")}
    known = {*PAGES, *NETWORKS, *LINES, *ELSEWHERE, *EXCERPTS}
    assert {page for page, text in pages.items() if BLOCK.search(text)} == known
    for page, test in ELSEWHERE.items():
        code = (Path(__file__).parent / test).read_text()
        assert Path(page).stem in code, f"{test} does not run {page}"


def test_the_site_leads_to_every_page() -> None:
    listed = re.findall(r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


LINK = re.compile(r"(?<!!)\[[^]\[]*(?:\[[^]]*\][^]\[]*)*\]\(([^)\s]+)\)|!\[[^]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and GitHub make them."""
    found = HEADING.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in found]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in plain}


def test_all_links_lead_somewhere() -> None:
    broken: list[str] = []
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in (a or b for a, b in LINK.findall(text)):
            if link.startswith(("http:", "https:", "mailto:")):
                continue
            name, _, anchor = link.partition("#")
            to = (page.parent / name).resolve() if name else page
            if not to.exists() or (anchor and anchor not in anchors(to)):
                broken.append(f"{page.relative_to(DOCS.parent)}: {link}")
    assert not broken


@pytest.mark.parametrize("page", METHODS)
def test_a_method_is_short(page: str) -> None:
    text = (DOCS / page).read_text()
    assert sum(block[1].count("\n") for block in BLOCK.finditer(text)) <= 25
    assert "**When it hurts.**" in text and "**Source.**" in text
    assert page.removeprefix("methods/") in (DOCS / "methods/README.md").read_text()
