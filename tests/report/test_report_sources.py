"""Where a run is found, and what becomes of files that are cut, damaged, hostile or huge."""

import json
import math
import os
import random
import re
import time
from pathlib import Path

import pytest
import torch
from pages import EVIL, LIMIT, Log, entry, grown_log, of_class, parsed, shapes, svg, table_of, words, write_checkpoint
from torch import nn

import auxin as ax
from auxin.cli import main
from auxin.errors import GrowthError
from auxin.report import Report
from auxin.report.log import read_log
from auxin.report.run import Run


def run_of(lines: list, directory: Path) -> Run:
    path = directory / "metrics.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_log(path)


def reading(call: int, value: float | None = 1.0, **more) -> dict:
    return {"kind": "reading", "call": call, "step": 10 * call, "seconds": call / 2, "metric": value, **more}


def growth(number: int, call: int) -> dict:
    new = entry(number - 1, 10 * call, [(f"blocks.{number}", f"blocks.{number - 1}")])
    return {"kind": "growth", "number": number, "call": call, "step": 10 * call, "seconds": call / 2, "entry": new}


def steps(run: Run) -> list[float]:
    return list(run.readings.columns["step"])


# ---- the log


def test_readings_become_columns(tmp_path: Path) -> None:
    lines = [reading(1, 3.0), reading(2, None, flops=5.0, metrics={"accuracy": 0.5}), reading(3, 2.0)]
    run = run_of(lines, tmp_path)
    assert steps(run) == [10, 20, 30]
    assert list(run.readings.metrics["metric"]) == [3.0, math.inf, 2.0]  # null: measured, and not finite
    accuracy = list(run.readings.metrics["accuracy"])
    assert math.isnan(accuracy[0]) and accuracy[1] == 0.5 and math.isnan(accuracy[2])
    assert run.readings.moment(1).flops == 5.0 and math.isnan(run.readings.moment(0).flops)


def test_a_metric_that_is_mostly_null_was_not_measured(tmp_path: Path) -> None:
    """``grower.step()`` is called more often than the loss is known."""
    lines = [reading(call, 1.0 if call % 10 == 0 else None) for call in range(1, 41)]
    metric = run_of(lines, tmp_path).readings.metrics["metric"]
    assert not any(map(math.isinf, metric)) and sum(map(math.isfinite, metric)) == 4


def test_an_undone_growth_takes_its_readings_aside(tmp_path: Path) -> None:
    run = grown_log()
    run = read_log(run.write(tmp_path) / "metrics.jsonl")
    assert [g.undone is not None for g in run.growths] == [False, False, True, False]
    undone = run.growths[2]
    assert (undone.number, undone.at.step, undone.undone and undone.undone.step, undone.why) == (
        3,
        550,
        670,
        "probation",
    )
    (_, live), (owner, aside) = run.branches()
    assert owner is undone and [run.readings.columns["step"][at] for at in aside] == [*range(560, 680, 10)]
    kept = [run.readings.columns["step"][at] for at in live]
    assert kept == [*range(10, 960, 10)]  # each step once, in order
    assert len(kept) + len(aside) == len(run.readings)


def test_flows_and_decisions_find_their_growth(tmp_path: Path) -> None:
    run = read_log(grown_log().write(tmp_path) / "metrics.jsonl")
    assert {flow.growth.number for flow in run.flows} == {1, 2, 3, 4}  # two growths had the number 3
    assert len(run.flows) == 80
    waits = [decision for decision in run.decisions if decision.waiting]
    assert len(waits) == 3 and all(decision.growth is None for decision in waits)
    assert [d.growth.number for d in run.decisions if d.growth] == [1, 2, 3, 4]
    assert all(d.reason == "plateau(patience=3)" for d in run.decisions)


def test_a_resumed_run_supersedes_what_it_does_again(tmp_path: Path) -> None:
    lines = [reading(call, 1.0) for call in range(1, 9)]
    lines.insert(6, growth(1, 6))
    lines += [{"kind": "resumed", "call": 4, "step": 40, "seconds": 2.0}]
    lines += [reading(call, 2.0) for call in range(5, 8)] + [growth(1, 7)]
    run = run_of(lines, tmp_path)
    assert steps(run) == [10, 20, 30, 40, 50, 60, 70]
    assert list(run.readings.metrics["metric"]) == [1.0] * 4 + [2.0] * 3
    assert [(g.number, g.at.step) for g in run.growths] == [(1, 70.0)]
    assert run.notes == ["4 readings were made again after a resume; the later ones are shown."]


def test_a_resume_after_an_undo_keeps_the_undone_span(tmp_path: Path) -> None:
    lines = [reading(1), reading(2), growth(1, 2), reading(3), reading(4)]
    lines += [{"kind": "undone", "number": 1, "call": 4, "step": 40, "why": "undo()"}]
    lines += [
        reading(3),
        reading(4),
        reading(5),
        {"kind": "resumed", "call": 3, "step": 30, "seconds": 9.0},
        reading(4, 7.0),
    ]
    run = run_of(lines, tmp_path)
    assert [[steps(run)[at] for at in indices] for _, indices in run.branches()] == [[10, 20, 30, 40], [30, 40]]
    assert run.readings.metrics["metric"][-1] == 7.0
    assert [g.why for g in run.growths] == ["undo()"]


def test_a_resume_without_further_lines_supersedes_nothing(tmp_path: Path) -> None:
    run = run_of([reading(1), reading(2), {"kind": "resumed", "call": 1, "step": 10, "seconds": 1.0}], tmp_path)
    assert steps(run) == [10, 20] and not run.notes


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b'{"kind": "reading", "step": 10, "metric": 1}\n{"kind": "rea', "The last line of metrics.jsonl is cut off"),
        (
            b'{"kind": "reading", "step": 10, "metric": 1}\n\x00\xff\xfe junk\n[1]\n',
            "2 lines of 3 in metrics.jsonl could not",
        ),
        (
            b'{"kind": "reading", "step": 10, "metric": 1}\n{"kind": "dream"}\n',
            "of a kind that this version does not know",
        ),
        (b'{"kind": "reading", "step": 10, "metric": 1}\n' + b"[" * 100_000 + b"\n", "1 line of 2 in metrics.jsonl"),
        (
            b'{"kind": "reading", "step": 10, "metric": 1}\n{"kind": "undone", "number": 9}\n{"kind": "flow"}\n',
            "2 lines of",
        ),
    ],
    ids=["cut", "junk", "unknown", "deep", "no growth of that number"],
)
def test_what_cannot_be_read_is_said_on_the_page(content: bytes, note: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    page = parsed(Report.read(tmp_path).html())
    assert note in words(of_class(page, "notes")[0])
    assert "journal.json" not in words(of_class(page, "notes")[0])  # nothing has grown, so there is none
    assert [row[0] for row in table_of(page)] == ["10"]


# ---- directories


def test_a_cut_journal_leaves_the_log(tmp_path: Path) -> None:
    run = grown_log().write(tmp_path)
    text = (run / "journal.json").read_text()
    (run / "journal.json").write_text(text[: len(text) // 2])
    report = Report.read(run)
    assert len(report.run.kept) == 3
    assert report.run.notes == ["journal.json is damaged or cut off: it is not JSON."]


def test_a_journal_that_is_gone_leaves_the_log(tmp_path: Path) -> None:
    (grown_log().write(tmp_path) / "journal.json").unlink()
    report = Report.read(tmp_path)
    assert len(report.run.kept) == 3 and report.run.notes == ["There is no journal.json."]


def test_widths_come_with_the_journal_of_a_log(tmp_path: Path) -> None:
    log = grown_log()
    hostile = {"a.weight": "wide", "b.weight": [-1, 2], "c.weight": [True], "blocks.0.up.weight": [128, 32]}
    text = {"format": 1, "entries": log.entries, "shapes": hostile}
    (log.write(tmp_path) / "journal.json").write_text(json.dumps(text))
    assert Report.read(tmp_path).run.shapes == {"blocks.0.up.weight": (128, 32)}


def test_an_empty_journal_makes_a_page(tmp_path: Path) -> None:
    Log().read(5).write(tmp_path)
    page = parsed(Report.read(tmp_path).html())
    assert "Nothing has grown in this run." in words(page)
    assert "The journal is empty: nothing was grown." in words(page)


def test_growths_that_only_the_journal_has_are_shown_and_said(tmp_path: Path) -> None:
    log = grown_log()
    missing = log.lines.index(next(line for line in log.lines if line["kind"] == "growth"))
    del log.lines[missing]
    report = Report.read(log.write(tmp_path))
    assert [growth.at.step for growth in report.run.kept] == [250, 400, 650]
    assert "1 of 3 growths are in journal.json, but not in metrics.jsonl." in report.run.notes


def test_a_journal_that_is_shorter_than_the_log_is_said(tmp_path: Path) -> None:
    log = grown_log()
    log.entries.pop()
    report = Report.read(log.write(tmp_path))
    assert "metrics.jsonl tells of 3 growths, journal.json of 2." in report.run.notes


def test_a_directory_of_checkpoints(tmp_path: Path) -> None:
    entries = grown_log().entries
    undone = [{**entries[0], "at": {"calls": 9, "optimizer_steps": 90}, "undone_at": {"calls": 20}}]
    write_checkpoint(tmp_path / "last", entries, shapes(), optimizer_steps=1200, calls=120, undone=undone)
    for place in (tmp_path / "last", tmp_path / "last" / "checkpoint-000001", tmp_path):
        report = Report.read(place)
        assert [growth.at.step for growth in report.run.kept] == [250, 400, 650]
        assert [growth.at.step for growth in report.run.growths if growth.undone] == [90]
        assert report.run.end.step == 1200
        assert report.run.notes == ["There is no metrics.jsonl: what was measured on the way is not known."]
        assert dict(report.run.shapes) == {name: tuple(shape) for name, shape in shapes().items()}
        parsed(report.html())


def test_a_real_checkpoint_and_the_living_grower_agree(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x)

    model = nn.Sequential(Block(), Block())
    optimizer = torch.optim.Adam(model.parameters())
    grower = ax.Grower(
        model,
        optimizer,
        edits=ax.Duplicate("", by=1),
        when=ax.when.every(2),
        probe=torch.randn(4, 8),
        limit=ax.Limit(growths=2),
    )
    for _ in range(6):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        grower.step()
    ax.save(grower, tmp_path / "last")
    living, stored = Report.of(grower), Report.read(tmp_path / "last")
    for report in (living, stored):
        assert [growth.at.step for growth in report.run.growths] == [2.0, 4.0]
        assert report.run.end.step == 6
        rows = of_class(svg(parsed(report.html()), "layer-chart-step"), "bar")
        assert len(rows) == len(model) == 4
    assert dict(living.run.shapes) == dict(stored.run.shapes)
    assert "srcdoc" in living._repr_html_() and "<html" not in living._repr_html_()


def test_the_files_of_the_demo(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0 / (step + 1), "validation": None, "depth": 1} for step in range(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "journal.json").write_text(json.dumps([entry(0, 10, [("blocks.1", "blocks.0")])]))
    report = Report.read(tmp_path)
    assert (len(report.run.readings), len(report.run.kept), report.run.notes) == (20, 1, [])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda place: None, "does not exist"),
        (lambda place: place.write_text("x"), "is a file, not the directory of a run"),
        (lambda place: place.mkdir(), "holds neither metrics.jsonl, journal.json nor a checkpoint"),
        (
            lambda place: _fill(place, "journal.json", b'{"format": 1, "entr'),
            "Nothing of the run in .* damaged or cut off",
        ),
        (lambda place: _fill(place, "journal.json", b"\x80\x04\x95"), "Nothing of the run in"),
        (lambda place: _fill(place, "journal.json", b"[" * 100_000), "Nothing of the run in"),
        (lambda place: _fill(place, "journal.json", b'{"entries": 7}'), "journal.json is not a journal"),
        (lambda place: _fill(place, "metrics.jsonl", os.urandom(5000)), "could not be read"),
        (lambda place: (place.mkdir(), (place / "metrics.jsonl").mkdir()), "Nothing of the run in .* Is a directory"),
    ],
)
def test_what_is_no_run_is_refused_and_nothing_is_written(make, said: str, tmp_path: Path, capsys) -> None:
    place = tmp_path / "run"
    make(place)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(GrowthError, match=f"(?s){said}"):
        Report.read(place)
    assert main(["report", str(place)]) == 1
    assert main(["report", str(place), "--out", str(tmp_path / "page.html")]) == 1
    assert "auxin report: " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def _fill(place: Path, name: str, content: bytes) -> None:
    place.mkdir()
    (place / name).write_bytes(content)


# ---- the command, and writing


def test_the_command_writes_beside_the_log_or_where_it_is_told(tmp_path: Path, capsys) -> None:
    run = grown_log().write(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(tmp_path / "new" / "page.html")]
    assert (run / "report.html").read_bytes() == (tmp_path / "new" / "page.html").read_bytes()


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path, capsys) -> None:
    run = grown_log().write(tmp_path / "run")
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for target in (tmp_path / "file" / "page.html", tmp_path / "folder"):
        assert main(["report", str(run), "--out", str(target)]) == 1
        assert f"Cannot write the report to '{target}'" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, target = Report.read(grown_log().write(tmp_path / "run")), tmp_path / "page.html"
    target.write_text("the page of yesterday")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GrowthError, match="No space left on device"):
        report.write(target)
    assert target.read_text() == "the page of yesterday"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


@pytest.mark.parametrize("wrong", [nn.Linear(1, 1), None, "run"])
def test_a_report_of_something_else(wrong: object) -> None:
    with pytest.raises(GrowthError, match=r"Report.of\(grower\): got a \w+. For a directory use Report.read"):
        Report.of(wrong)


# ---- hostile and huge


def test_hostile_names_are_text(tmp_path: Path) -> None:
    log = Log().read(3)
    log.lines[0]["metrics"] = {EVIL: 1.0}
    log.grow([(f"{EVIL}.1", f"{EVIL}.0")], {EVIL: EVIL}, wait=1, dead=[EVIL]).read(3)
    for line in log.lines:
        line.update({key: EVIL for key in ("reason", "chosen", "waiting") if line.get(key)})
    log.lines.append({"kind": "undone", "number": 1, "call": 6, "step": 60, "why": EVIL})
    write_checkpoint(tmp_path, log.entries, {f"{EVIL}.weight": [3, 3]})
    page = Report.read(log.write(tmp_path), title=EVIL).html()
    assert "<script>alert" not in page and "\x00" not in page
    assert len([e for e in parsed(page).iter() if e.tag == "script"]) == 4  # the values of three figures, and ours
    frame = Report.read(tmp_path, title=EVIL)._repr_html_()
    assert frame.count("<") == 2 and "<script" not in frame


STRANGE = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    math.nan,
    math.inf,
    "",
    "x",
    EVIL,
    [],
    [[]],
    {},
    {"a": {}},
    ["a", 1],
    "\ud800",
]


def test_any_value_anywhere_makes_a_page_or_a_clear_refusal(tmp_path: Path) -> None:
    choice = random.Random(5)
    for number in range(300):
        log = Log().read(4).grow([("blocks.1", "blocks.0")], wait=1).read(3)
        log.grow([("blocks.2", "blocks.1")], {"blocks.1": "blocks.2"}).read(2).undo(7, 70).read(2)
        for _ in range(choice.randint(1, 8)):
            target: object = choice.choice([*log.lines, *log.entries])
            while isinstance(target, dict) and target:
                key = choice.choice(list(target))
                inner = target[key]
                if isinstance(inner, list) and inner and choice.random() < 0.5:
                    inner[0] = choice.choice(STRANGE)
                    break
                if not isinstance(inner, dict) or choice.random() < 0.3:
                    target[key] = choice.choice(STRANGE)
                    break
                target = inner
        log.lines = [line for line in log.lines if choice.random() > 0.05]
        choice.shuffle(log.lines) if number % 10 == 0 else None
        tensors = {choice.choice(["a", "blocks.1.w", EVIL, ""]): choice.choice(STRANGE) for _ in range(3)}
        directory = tmp_path / str(number)
        log.write(directory)
        if choice.random() < 0.5:
            write_checkpoint(directory, log.entries, tensors, undone=log.entries[:1], calls=choice.choice(STRANGE))
            (directory / "metrics.jsonl").unlink()
        page = Report.read(directory).html()
        assert len(page.encode()) < LIMIT
        drawn = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d"}
        places = [value for e in parsed(page).iter() for key, value in e.attrib.items() if key in drawn]
        assert not [place for place in places if re.search("nan|inf|e", place)]


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_many_lines_take_seconds_and_stay_small(tmp_path: Path, count: int) -> None:
    """A million of them in the long suite."""
    odd = count * 654_321 // 1_000_000
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for call in range(count):
            value = 1 + 1000 / (call + 300) + (call * 7919 % 97) / 500
            spike = 40.0 if call == odd else value
            places = f'"call":{call},"step":{call},"seconds":{call / 7:.2f},"flops":{call * 3e9:.4g}'
            size = 9000 + call // (3 * count // 10)
            values = f'"parameters":{size},"metric":{spike:.5g},"metrics":{{"accuracy":{1 / value:.4g}}}'
            file.write(f'{{"kind":"reading",{places},{values}}}\n')
    (tmp_path / "journal.json").write_text('{"format": 1, "entries": []}')
    begin = time.perf_counter()
    page = Report.read(tmp_path).html()
    print(f"{count:,} lines: {time.perf_counter() - begin:.1f} s, {len(page.encode()):,} bytes")
    assert len(page.encode()) < LIMIT
    assert f"40 of {count:,} readings" in page
    drawn = next(e for e in svg(parsed(page), "metric-0-chart-step").iter("path")).get("d", "")
    points = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", drawn)]
    assert min(points, key=lambda point: point[1])[0] == 654.3  # the spike has survived the thinning
