"""``auxin demo`` from end to end: a quick run on a small synthetic CSV, and its errors."""

import json
import math
from pathlib import Path

import pytest

import auxin as ax
from auxin.cli import main
from auxin.demo.folder import closing
from auxin.demo.network import Network


def synthetic(path: Path, series: int = 4, length: int = 60) -> Path:
    """Series with a trend and a season of 6."""
    lines = ["shop,sales"]
    for month in range(length):
        for shop in range(series):
            lines.append(f"{shop},{50 + 10 * shop + month + 8 * math.sin(2 * math.pi * month / 6 + shop):.3f}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The directory of a quick run."""
    folder = tmp_path_factory.mktemp("demo")
    file = synthetic(folder / "shops.csv")
    own = ["--csv", str(file), "--target", "sales", "--id", "shop", "--horizon", "6", "--season", "6"]
    assert main(["demo", "--quick", "--out", str(folder / "out"), *own]) == 0
    return folder / "out"


def test_a_smoke_test_says_that_it_measures_nothing_and_where_the_page_is(
    finished: Path, capsys, tmp_path: Path
) -> None:
    page = (finished / "report.html").read_text()
    assert "This was a smoke test" in page and "forecasts with a sMAPE of" not in page
    assert '<tr class="marked"><th scope="row">grown from depth 1</th>' in page
    said = closing(3.2, tmp_path)
    assert said.splitlines()[-1] == (tmp_path / "report.html").as_uri() and said.splitlines()[-1].startswith("file://")


def test_it_leaves_everything_behind(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"checkpoint", "journal.json", "metrics.jsonl", "report.html"}
    journal = json.loads((finished / "journal.json").read_text())
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["depth"] == 1 and metrics[-1]["depth"] == 1 + len(journal)
    page = (finished / "report.html").read_text()
    assert "grown from depth 1" in page and "shops.csv, sales" in page and "<svg" in page


def test_the_checkpoint_loads_into_the_network_it_began_with(finished: Path) -> None:
    journal = json.loads((finished / "journal.json").read_text())
    network = Network(lookback=12, horizon=6, dim=128, depth=1)
    extra = ax.load(finished / "checkpoint", network)
    assert len(network.blocks) == 1 + len(journal) and extra["steps"] > 0


def test_it_does_not_write_into_a_full_directory(finished: Path, tmp_path: Path, capsys) -> None:
    file = synthetic(tmp_path / "shops.csv")
    own = ["--csv", str(file), "--target", "sales", "--id", "shop", "--horizon", "6"]
    assert main(["demo", "--quick", "--out", str(finished), *own]) == 1
    assert "is not empty; choose another directory with --out" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path: Path, capsys) -> None:
    file = synthetic(tmp_path / "shops.csv")
    assert main(["demo", "--csv", str(file), "--target", "price", "--horizon", "6"]) == 1
    assert capsys.readouterr().err == (
        f"auxin demo: {file} has no column 'price' (--target); its columns: shop, sales.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--csv", "x.csv"], "--csv FILE needs --target COLUMN and --horizon N"),
        (["--target", "y"], "--target belongs to --csv FILE"),
        (["--csv", "x.csv", "--target", "y", "--horizon", "0"], "'0' is not a whole number from 1"),
        (["--seeds", "many"], "'many' is not a whole number from 1"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_command_it_shows_what_there_is(capsys) -> None:
    assert main([]) == 2 and "grow networks on real series" in capsys.readouterr().out
