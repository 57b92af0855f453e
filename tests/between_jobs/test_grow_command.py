"""The command ``auxin grow``: what it prints, and what it refuses with nothing written."""

import json
import shutil
from pathlib import Path

import pytest
from jobs import build, train

import auxin as ax
from auxin.cli import main

DEEPER = [{"type": "Duplicate", "at": "blocks", "by": 1}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "in"
    grower = build()
    train(grower, range(2))
    ax.save(grower, path)
    return path


@pytest.fixture
def work(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(saved, tmp_path / "in")
    (tmp_path / "edits.json").write_text(json.dumps(DEEPER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return tmp_path


def words(source: str = "in", factory: str = "build", *more: str) -> list[str]:
    return ["grow", source, "out", "--model", f"train_for_grow:{factory}", "--edits", "edits.json", *more]


def test_what_moves_is_printed_first_and_then_written(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(work.rglob("*"))
    assert main(words("in", "build", "--dry-run")) == 0
    planned = capsys.readouterr().out
    assert sorted(work.rglob("*")) == before
    assert "blocks.2 <- copy of blocks.1" in planned and "function unchanged (max |d| = 0)" in planned
    assert "in/checkpoint-000001" in planned and "model.safetensors" in planned and "is written" not in planned
    assert main(words()) == 0
    assert "out is written." in capsys.readouterr().out
    files = json.loads((work / "out/checkpoint-000001/manifest.json").read_text())["files"]
    told = planned.splitlines()[-1 - len(files)]
    assert f"{sum(one['size'] for one in files.values()) / 1e6:,.1f} MB" in told


def test_edits_are_also_written_as_a_journal_writes_them(work: Path) -> None:
    live = build()
    ax.load("in", live)
    live.grow(ax.Duplicate("blocks", by=1))
    (work / "edits.json").write_text(json.dumps([live.journal.to_json()[0]["edit"]]))
    assert main(words()) == 0
    assert len(json.loads((work / "out/checkpoint-000001/journal.json").read_text())["entries"]) == 1


BAD_EDITS = {
    "": "is not valid JSON",
    "[{": "is not valid JSON",
    "[]": "holds no edit",
    "3": "holds 3 in place of an edit",
    "[[]]": "holds [] in place of an edit",
    '["Duplicate"]': "in place of an edit. Write a list of edits, each by its class and arguments",
    '[{"type": "Deepen", "at": "blocks"}]': "there is no 'Deepen'; the edits are Duplicate, Insert",
    '[{"at": "blocks"}]': "its edit has no type",
    '[{"type": "os:system"}]': "os",
    '[{"type": "Duplicate", "at": "blocks", "depth": 2}]': "has no field depth",
    '[{"type": "Duplicate", "at": "layers"}]': "layers",
    '[{"type": "Widen", "at": "blocks.*.up", "by": -1}]': "pass a whole number from 1 on",
    '[{"type": "Duplicate", "at": "blocks", "by": 1}, {"type": "Remove", "at": "blocks.9"}]': "blocks.9",
}


@pytest.mark.parametrize("text", BAD_EDITS)
def test_edits_that_do_not_parse_or_fit(work: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "edits.json").write_text(text)
    refused(work, words(), BAD_EDITS[text], capsys)


def test_no_edits_at_all(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "edits.json").unlink()
    refused(work, words(), "'edits.json' cannot be read: No such file or directory", capsys)


FACTORIES = {
    "of_another": "companions",
    "without_average": "this run was saved with the companions",
    "without_grower": "the factory returns (Net, Tensor). Return the Grower that the program hands to ax.load",
    "elsewhere": "between two jobs a run grows in one process, on the CPU",
    "raises": "it does not build: RuntimeError: no data here",
    "missing": "it does not build: AttributeError",
}


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_factory_of_something_else(work: Path, factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(work, words("in", factory), FACTORIES[factory], capsys)


def test_another_network_of_the_same_companions(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grower = build(dim=32)
    ax.save(grower, "other")
    refused(work, words("other"), "this checkpoint is of another model", capsys)


def test_in_is_missing_or_cut_off(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(work, words("nowhere"), "There is nothing at 'nowhere'", capsys)
    (work / "empty").mkdir()
    refused(work, words("empty"), "There is no checkpoint at 'empty'", capsys)
    file = work / "in/checkpoint-000001/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    refused(work, words(), "is damaged or was cut off: model.safetensors has", capsys)
    file.unlink()
    refused(work, words(), "model.safetensors is missing", capsys)


def test_out_is_not_free(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "out").mkdir()
    (work / "out/mine").write_text("mine")
    refused(work, words(), "'out' exists and is not empty", capsys)
    shutil.rmtree(work / "out")
    inside = words()
    inside[2] = "in/out"
    refused(work, inside, "is inside", capsys)


def test_no_room(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(work, words(), "0.0 MB are free there. Nothing was written", capsys)


def refused(work: Path, command: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(work)
    assert main(command) == 1
    told = capsys.readouterr()
    assert told.err.startswith("auxin grow: ") and why in told.err and "Traceback" not in told.err
    assert tree(work) == before


def tree(work: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in work.rglob("*")}
