"""Every figure of the page is read back, and compared with the log and the journal that it was made from."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from pages import Log, at, grown_log, of_class, parsed, section, shapes, svg, table_of, words, write_checkpoint

from auxin.report import Report

AXES = ("step", "flops", "seconds")
PIXEL = 0.06  # coordinates are written with one decimal


@pytest.fixture(scope="module")
def log() -> Log:
    return grown_log()


@pytest.fixture(scope="module")
def page(log: Log, tmp_path_factory: pytest.TempPathFactory) -> ET.Element:
    directory = log.write(tmp_path_factory.mktemp("run"))
    write_checkpoint(directory, log.entries, shapes())
    return parsed(Report.read(directory).html())


def of_kind(log: Log, kind: str) -> list[dict]:
    return [line for line in log.lines if line["kind"] == kind]


def live(log: Log) -> list[dict]:
    """The readings of the run without its undone span: lines between the third growth and its way back."""
    begin = [at for at, line in enumerate(log.lines) if line["kind"] == "growth"][2]
    end = next(at for at, line in enumerate(log.lines) if line["kind"] == "undone")
    return [line for at, line in enumerate(log.lines) if line["kind"] == "reading" and not begin < at < end]


def aside(log: Log) -> list[dict]:
    """The reading before the third growth, and those that were undone."""
    kept = live(log)
    begin = of_kind(log, "growth")[2]["call"]
    return [kept[begin - 1], *(line for line in of_kind(log, "reading") if line not in kept)]


def where(log: Log, line: dict, axis: str) -> float:
    """A line's place, 0 .. 1; a growth has the FLOPs of the reading before it."""
    before = log.lines[: log.lines.index(line) + 1]
    value = line.get(axis)
    if value is None:
        value = next(earlier[axis] for earlier in reversed(before) if axis in earlier)
    return value / max(other[axis] for other in log.lines if axis in other and other["kind"] in ("reading", "growth"))


def points(path: ET.Element) -> list[tuple[float, float]]:
    """The corners of a line, in the coordinates of its frame."""
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d", ""))]


def vertical(chart: ET.Element):
    """From pixels of the chart to values, by the labels of its axis; and pixels per unit."""
    ticks = [e for e in of_class(chart, "tick") if e.get("x") == "-10"]
    (y0, v0), (y1, v1) = ((float(e.get("y", "")), _number(words(e))) for e in (ticks[0], ticks[-1]))
    return (lambda y: v0 + (y - y0) / (y1 - y0) * (v1 - v0)), abs((y1 - y0) / (v1 - v0))


def _number(text: str) -> float:
    scale = {"k": 1e3, "M": 1e6}.get(text[-1], 1)
    return float(text.rstrip("kM").replace(",", "")) * scale


def values(chart: ET.Element, path: ET.Element) -> tuple[list[float], list[float], float]:
    """Places 0 .. 1 and values of a line, and how exactly its values can be read."""
    frame = next(e for e in chart.iter("svg") if e.get("class") == "curves")
    top, (value, pixels) = float(frame.get("y", "")), vertical(chart)
    corners = points(path)
    return [x / 1000 for x, _ in corners], [value(top + y) for _, y in corners], 2 * PIXEL / pixels


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("figure", "name"), [("metric-0", "metric"), ("metric-1", "accuracy")])
def test_lines_are_the_readings(page: ET.Element, log: Log, axis: str, figure: str, name: str) -> None:
    chart = svg(page, f"{figure}-chart-{axis}")
    lines = {"undone" in e.get("class", ""): e for e in of_class(chart, "line")}
    for undone, readings in ((False, live(log)), (True, aside(log))):
        places, found, exact = values(chart, lines[undone])
        assert places == pytest.approx([where(log, line, axis) for line in readings], abs=1e-4)
        assert found == pytest.approx([line.get(name, line["metrics"].get(name)) for line in readings], abs=exact)
    pieces = lines[False].get("d", "").count("M")
    assert pieces == (1 if axis == "step" else 2)  # FLOPs and time go on while a growth is tried that will be undone
    dot = of_class(chart, "dot")[0]
    assert at(dot.get("cx")) == pytest.approx(where(log, live(log)[-1], axis), abs=1e-4)
    assert float(words(of_class(chart, "end")[1])) == pytest.approx(
        live(log)[-1].get(name, live(log)[-1]["metrics"].get(name)), rel=5e-4
    )


@pytest.mark.parametrize("axis", AXES)
def test_marks_and_spans_are_the_growths(page: ET.Element, log: Log, axis: str) -> None:
    expected = [where(log, line, axis) for line in of_kind(log, "growth")]
    undone = of_kind(log, "undone")[0]
    for chart in (svg(page, f"{name}-chart-{axis}") for name in ("metric-0", "metric-1", "parameter")):
        marks = of_class(chart, "mark")
        assert [at(mark.get("x1")) for mark in marks] == pytest.approx(expected, abs=1e-4)
        span = of_class(chart, "span")[0]
        assert at(span.get("x")) == pytest.approx(expected[2], abs=1e-4)
        assert at(span.get("x")) + at(span.get("width")) == pytest.approx(where(log, undone, axis), abs=2e-4)
    labels = [words(e) for e in of_class(svg(page, f"metric-0-chart-{axis}"), "label") if "wide" in e.get("class", "")]
    assert labels == ["1 blocks.1", "2 blocks.1", "3 undone", "4 blocks.2"]


def test_two_growths_close_together_have_a_mark_each(tmp_path: Path) -> None:
    log = Log().read(100).grow([("blocks.1", "blocks.0")]).read(1).grow([("blocks.2", "blocks.1")]).read(100)
    chart = svg(parsed(Report.read(log.write(tmp_path)).html()), "metric-0-chart-step")
    assert [at(mark.get("x1")) for mark in of_class(chart, "mark")] == pytest.approx(
        [1000 / 2010, 1010 / 2010], abs=1e-4
    )


@pytest.mark.parametrize("axis", AXES)
def test_ticks_say_where_they_stand(page: ET.Element, log: Log, axis: str) -> None:
    highest = max(line[axis] for line in log.lines if axis in line and line["kind"] in ("reading", "growth"))
    unit = {"step": 1.0, "flops": 1e9, "seconds": 1.0}[axis]
    ticks = [e for e in of_class(svg(page, f"metric-0-chart-{axis}"), "tick") if (e.get("x") or "").endswith("%")]
    numbers = [float(re.sub(r"[^\d.]", "", words(e))) for e in ticks]
    assert [at(e.get("x")) for e in ticks] == pytest.approx([number * unit / highest for number in numbers], abs=1e-4)
    assert words(ticks[0]) == {"step": "step 0", "flops": "0 GFLOP", "seconds": "0 s"}[axis]


@pytest.mark.parametrize("axis", AXES)
def test_bars_live_from_birth_to_end(page: ET.Element, log: Log, axis: str) -> None:
    births = [where(log, line, axis) for line in of_kind(log, "growth")]
    end = where(log, of_kind(log, "undone")[0], axis)
    expected = {  # begin, end, units, class: names as in the final network
        "inp": (0, 1, 32, "shade0"),
        "blocks.0": (0, 1, 128, "shade0"),
        "blocks.1": (births[1], 1, 128, "shade2"),  # step 400 of 950, in sixths
        "blocks.2": (births[3], 1, 64, "shade4"),
        "blocks.3": (births[0], 1, 128, "shade1"),
        "undone": (births[2], end, None, "undone"),
        "out": (0, 1, 1, "shade0"),
    }
    rows = of_class(svg(page, f"layer-chart-{axis}"), "layer")
    found = {}
    for row in rows:
        title, bar = words(row.find("title")), row.find("rect")
        assert bar is not None
        begin, width = at(bar.get("x")), at(bar.get("width"))
        name = "undone" if "undone" in title else re.split("[:,]", title)[0]
        found[name] = (begin, begin + width, float(bar.get("height", "")), bar.get("class", "").split()[1])
        units = expected[name][2]
        if units:
            assert f"{units} units" in title
            assert [words(e) for e in of_class(row, "units")] == [f"{units}"]
    assert list(found) == ["inp", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "undone", "out"]
    for name, (begin, until, units, shade) in expected.items():
        height = 12.0 if units is None else max(3.0, 26.0 * units / 128)
        assert found[name][:3] == pytest.approx((begin, until, height), abs=2e-3 if axis != "step" else 1e-3), name
        assert found[name][3] == shade, name


def test_the_table_of_layers(page: ET.Element) -> None:
    rows = table_of(section(page, "layers"))
    assert rows[2] == ["blocks.1", "growth 2, step 400", "blocks.0", "128", "1,000", "at the end"]
    assert rows[5][1:] == ["growth 3, step 550", "blocks.3", "–", "1,000", "undone at step 670"]
    assert [row[0] for row in rows if row[1] == "from the start"] == ["inp", "blocks.0", "out"]


@pytest.mark.parametrize("axis", AXES)
def test_stairs_are_the_parameters(page: ET.Element, log: Log, axis: str) -> None:
    chart = svg(page, f"parameter-chart-{axis}")
    line = of_class(chart, "main")[0].get("d", "")
    value, pixels = vertical(chart)
    first = re.match(r"M([\d.]+) ([\d.]+)", line)
    assert first is not None
    rises = [(float(x) / 1000, value(8 + float(y))) for x, y in re.findall(r"H([\d.]+)V([\d.]+)", line)]
    assert value(8 + float(first[2])) == pytest.approx(log.entries[0]["parameters"]["before"], abs=0.2 / pixels)
    kept = [line for line in of_kind(log, "growth") if line["entry"] in log.entries]
    assert [place for place, _ in rises] == pytest.approx([where(log, line, axis) for line in kept], abs=1e-4)
    after = [entry["parameters"]["after"] for entry in log.entries]
    assert [parameters for _, parameters in rises] == pytest.approx(after, abs=0.2 / pixels)
    assert line.endswith("H1000")
    assert after[-1] == log.parameters == live(log)[-1]["parameters"]


def test_the_table_of_parameters(page: ET.Element, log: Log) -> None:
    expected = [
        ["10", "8,801"],
        *([f"{e['at']['optimizer_steps']}", f"{e['parameters']['after']:,}"] for e in log.entries),
    ]
    rows = table_of(section(page, "parameters"))
    assert [row for row in expected if row not in rows] == []
    assert rows[-1] == ["950", f"{log.parameters:,}"]
    assert words(of_class(section(page, "parameters"), "note")[0]) == "8,801 → 34,049, 3.87 times as many."


def test_gradient_ratios_are_those_of_the_log(page: ET.Element, log: Log) -> None:
    chart = svg(page, "gradient-chart")
    flows = of_kind(log, "flow")
    drawn = of_class(chart, "flow")
    assert len(drawn) == 4
    for number, path in enumerate(drawn):
        own = flows[20 * number : 20 * number + 20]
        places, found, exact = values(chart, path)
        assert places == pytest.approx([after / 20 for after in range(1, 21)], abs=1e-4)
        assert found == pytest.approx([ratio for line in own for ratio in line["ratios"].values()], abs=exact)
    one = of_class(chart, "one")[0]
    assert vertical(chart)[0](float(one.get("y1", ""))) == pytest.approx(1.0, abs=0.01)
    rows = table_of(section(page, "gradients"))
    for number, row in enumerate(rows):
        ratios = [ratio for line in flows[20 * number : 20 * number + 20] for ratio in line["ratios"].values()]
        assert row[:3] == [str(number + 1), next(iter(flows[20 * number]["ratios"])), "20"]
        assert [float(cell) for cell in row[3:]] == pytest.approx(
            [ratios[0], min(ratios), max(ratios), ratios[-1]], rel=6e-3
        )
    assert words(of_class(page, "warning")[0]) == "No gradient has reached: blocks.2.norm.bias (growth 4)."


def test_decisions_are_those_of_the_journal(page: ET.Element, log: Log) -> None:
    rows = table_of(section(page, "decisions"))
    wait = rows.pop(1)
    assert wait[:3] == ["–", "400", "Duplicate('blocks', by=1)"]
    assert wait[4] == "waited: a gradient waits for the next step (3 times)"
    entries = [line["entry"] for line in of_kind(log, "growth")]
    assert len(rows) == len(entries) == 4
    last, growths = {}, 0  # as in the chart
    for line in log.lines:
        growths += line["kind"] == "growth"
        if line["kind"] == "flow":
            last[growths] = next(iter(line["ratios"].values()))
    for number, (row, entry) in enumerate(zip(rows, entries, strict=True), start=1):
        added, totals = entry["added"][0], entry["parameters"]
        gained = totals["after"] - totals["before"]
        assert row == [
            str(number),
            str(entry["at"]["optimizer_steps"]),
            f"Duplicate blocks{added['path']} ← {added['from']}",
            f"plateau(patience=3)metric {entry['metrics']['metric']:.3f}"
            if entry["metrics"]["metric"] >= 1
            else f"plateau(patience=3)metric {entry['metrics']['metric']:.4f}",
            "undone at 670: probation" if number == 3 else "kept",
            f"{gained:+,} ({100 * gained / totals['before']:+.0f} %)",
            "yes, 0 (to the bit)",
            f"{last[number]:.3f}×" if last[number] < 1 else f"{last[number]:.2f}×",
            "3.00",
        ]


def test_key_figures(page: ET.Element, log: Log) -> None:
    figures = {words(e.find("dt")): words(e.find("dd")) for e in of_class(page, "figures")[0]}
    last = live(log)[-1]
    assert figures == {
        "Parameters": "8.8k → 34k",
        "Growths": str(len(log.entries)),
        "Undone": "1",
        "Metric given to step": f"{live(log)[0]['metric']:.3f} → {last['metric']:.4f}",
        "Steps": str(last["step"]),
        "Time": f"{last['seconds']:.3g} s",
        "Compute": f"{last['flops'] / 1e9:.3g} GFLOP",
    }
    lead = words(of_class(page, "lead")[0])
    best = min(live(log), key=lambda line: line["metric"])
    assert lead.startswith(f"Best metric {best['metric']:.4f} at step {best['step']}, against ")
    assert lead.endswith("not known. 3 growths, and 1 that was undone: from 8,801 to 34,049 parameters.")


@pytest.mark.parametrize(("figure", "name"), [("metric-0", "metric"), ("metric-1", "accuracy")])
def test_the_tables_and_the_pointer_read_the_log(page: ET.Element, log: Log, figure: str, name: str) -> None:
    def measured(line: dict) -> float:
        return line.get(name, line["metrics"].get(name))

    readings = {line["step"]: line for line in live(log)}
    rows = table_of(section(page, figure))
    assert len(rows) == 40 and (rows[0][0], rows[-1][0]) == ("10", "950")
    for step, flops, _, value in rows:
        line = readings[int(step)]
        assert float(value) == pytest.approx(measured(line), rel=5e-4)
        number, unit = flops.split()
        assert float(number) * {"M": 1e6, "G": 1e9}[unit] == pytest.approx(line["flops"], rel=6e-3)
    data = json.loads(next(e for e in page.iter("script") if e.get("data-for") == figure).text or "")
    assert [key for key, *_ in data["axes"]] == list(AXES)
    assert len(data["rows"]) == len(readings)
    for step, flops, seconds, value in data["rows"]:
        line = readings[step]
        assert [flops, seconds, value] == pytest.approx([line["flops"], line["seconds"], measured(line)], rel=1e-5)


def test_a_run_without_undone_growths_says_nothing_of_them(tmp_path: Path) -> None:
    log = Log().read(20).grow([("blocks.1", "blocks.0")]).read(20)
    page = parsed(Report.read(log.write(tmp_path), title="A run").html())
    assert "undone" not in words(page.find("body/main"))
    assert not of_class(page, "span") and "undone" not in " ".join(e.get("class", "") for e in page.iter())
    assert "the widths of the layers are not known" in words(section(page, "layers"))
    heights = {bar.get("height") for bar in of_class(page, "bar")}
    assert heights == {"12"}
