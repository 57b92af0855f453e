"""The page on the architecture: whatever it names exists, and it leaves out nothing at the top of the package."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "auxin"
PAGE = ROOT / "docs" / "architecture.md"


def named() -> list[str]:
    """What stands between backticks and looks like a file, a folder, or `file.py:function`."""
    words = re.findall(r"`([^`\n]+)`", PAGE.read_text())
    return sorted({word for word in words if re.fullmatch(r"[\w/]+(\.py(:[\w.]+)?|/)", word)})


def definitions(path: Path) -> set[str]:
    """Classes, functions and methods of a file, by dotted name."""
    found = set[str]()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")

    walk(ast.parse(path.read_text()).body, "")
    return found


def problem(word: str) -> str | None:
    """What is wrong with a name on the page."""
    file, _, name = word.partition(":")
    path = ROOT / file if file.startswith(("src/", "tests/")) else SOURCE / file
    if not path.exists():
        return f"{word}: there is no {path.relative_to(ROOT)}"
    if name and name not in definitions(path):
        return f"{word}: {file} defines no {name}"
    return None


@pytest.mark.parametrize("word", named())
def test_what_the_page_names_exists(word: str) -> None:
    assert problem(word) is None


@pytest.mark.parametrize("word", ["nowhere.py", "engine.py:nothing", "grower.py:Grower.nothing", "nowhere/"])
def test_a_wrong_name_is_found(word: str) -> None:
    assert problem(word) is not None


def test_the_page_walks_through_functions() -> None:
    assert sum(":" in word for word in named()) >= 40


@pytest.mark.parametrize("path", sorted(SOURCE.iterdir()), ids=lambda path: path.name)
def test_nothing_at_the_top_is_left_out(path: Path) -> None:
    if path.suffix == ".py" and path.name != "__init__.py" or (path / "__init__.py").exists():
        assert path.name + "/" * path.is_dir() in named(), f"docs/architecture.md does not say what is in {path.name}"
