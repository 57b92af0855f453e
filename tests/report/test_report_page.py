"""The page as a whole: one small, well-formed, self-contained file whatever it is given."""

import ast
import base64
import hashlib
import math
import random
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from pages import EVIL, entry, journal, metrics, of_class, parsed, render, render_report, section, svg, words

import auxin.report
from auxin.report import Report
from auxin.report.script import FINGERPRINT, SCRIPT
from auxin.report.style import STYLE

LOSS = "metric-0"  # training and validation loss on one chart
TABLE = {
    "caption": "Test loss at equal compute.",
    "columns": ["Method", "Loss", "Spread"],
    "rows": [["Grown", 1.412, 0.008], ["Fixed", 1.5, None]],
}
FORECAST = {
    "title": "Household 4",
    "history": [1.0, 2.0, 1.0, 2.0],
    "actual": [1.0, 2.0],
    "forecast": [1.5, 2.0],
}


def test_a_run_has_every_part() -> None:
    root = render(journal(), metrics(), sentence="It grew.", table=TABLE, forecasts=[FORECAST] * 3)
    assert [h.text for h in root.iter("h1")] == ["A run"]
    assert [h.text for h in root.iter("h2")] == [
        "Loss",
        "Did growing help?",
        "Layers",
        "Parameters",
        "Gradient ratio",
        "Forecasts",
        "Results",
        "Decisions",
    ]
    assert [p.text for p in of_class(root, "lead")] == ["It grew."]
    figures = {e.find("dt").text: e.find("dd").text for e in of_class(root, "figures")[0]}
    assert figures["Depth"] == "1 → 4"
    assert figures["Parameters"] == "1k → 4k"
    assert figures["Growths"] == "3"
    assert figures["Time"] == "59.9 s"
    assert figures["Compute"] == "1.86 TFLOP"


def test_one_mark_per_growth_and_one_bar_per_layer() -> None:
    root = render(journal(), metrics())
    loss, layers = svg(root, f"{LOSS}-chart-step"), svg(root, "layer-chart-step")
    assert len(of_class(loss, "growth")) == 3
    assert [words(e) for e in of_class(loss, "label") if "wide" in e.get("class")] == [
        "1 blocks.1",
        "2 blocks.1",
        "3 blocks.3",
    ]
    assert len(of_class(svg(root, "parameter-chart-step"), "mark")) == 3
    bars = of_class(layers, "bar")
    assert len(bars) == 4
    assert [bar.get("x") for bar in bars] == ["0%", "48.41%", "25.04%", "71.79%"]  # of 599 steps
    assert [bar.get("class") for bar in bars] == ["bar shade0", "bar shade2", "bar shade1", "bar shade4"]
    assert [words(e) for e in of_class(layers, "path") if "wide" in e.get("class")] == [
        "blocks.0",
        "2 blocks.1 ← blocks.0",
        "1 blocks.2 ← blocks.0",
        "3 blocks.3 ← blocks.2",
    ]


def test_a_bar_ends_where_its_layer_is_removed() -> None:
    entries = [
        entry(1, 100, [("blocks.2", "blocks.1")]),
        entry(2, 300, [], {"blocks.2": "blocks.1"}, edit={"type": "x:Remove", "at": "blocks.1"}),
    ]
    layers = svg(render(entries, [{"step": 400, "loss": 1.0}]), "layer-chart-step")
    bars = {words(g.find("title")): g.find("rect") for g in of_class(layers, "layer")}
    removed = bars["blocks.1: from the start; removed at step 300."]
    assert (removed.get("x"), removed.get("width")) == ("0%", "75%")
    grown = bars["blocks.1: growth 1, step 100, from blocks.1, born as blocks.2."]
    assert (grown.get("x"), grown.get("width")) == ("25%", "75%")


def test_every_picture_is_named_for_screen_readers() -> None:
    root = render(journal(), metrics(), forecasts=[FORECAST])
    pictures = [e for e in root.iter("svg") if e.get("class") == "chart"]
    assert len(pictures) == 3 * 4 + 1  # three axes, and one forecast
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        assert picture.get("role") == "img"
        assert picture[0].tag == "title" and picture[1].tag == "desc"
        assert picture.get("aria-labelledby").split() == [picture[0].get("id"), picture[1].get("id")]
        assert picture[0].text and picture[1].text
    assert all(e.get("viewBox") for e in root.iter("svg") if e.get("class") == "curves")
    assert root.get("lang") == "en"


def test_tables_have_caption_and_scope_and_scroll_in_their_own_box() -> None:
    root = render(journal(), metrics(), table=TABLE)
    tables = list(root.iter("table"))
    assert len(tables) == 4 + 3  # behind each figure; growths, results and decisions
    for table in tables:
        assert words(table.find("caption"))
        assert {th.get("scope") for th in table.find("thead").iter("th")} == {"col"}
        assert all(row[0].tag == "th" and row[0].get("scope") == "row" for row in table.find("tbody"))
    boxes = of_class(root, "scroll")
    assert all(box.get("tabindex") == "0" and box.get("aria-label") for box in boxes)
    results = section(root, "results").find(".//tbody")
    assert [words(cell) for cell in results[0]] == ["Grown", "1.412", "0.008"]
    assert [words(cell) for cell in results[1]] == ["Fixed", "1.500", "–"]


def test_a_table_lies_behind_every_figure() -> None:
    root = render(journal(), metrics(), forecasts=[FORECAST])
    names = [words(details.find("summary")) for details in root.iter("details")]
    figures = ["Loss", "Layers", "Parameters", "Gradient ratio", "Household 4"]
    assert names == [f"{name} as a table" for name in figures]
    rows = [[words(cell) for cell in row] for row in section(root, "forecasts").find(".//tbody")]
    assert rows == [["1", "1.000", "1.500"], ["2", "2.000", "2.000"]]


def test_a_decision_shows_what_was_checked() -> None:
    entries = journal()
    entries[1] |= {"preserved": False, "max_difference": 0.25, "gradient_ratio": None, "seconds": math.nan}
    rows = section(render(entries, metrics()), "decisions").find(".//tbody")
    assert [words(cell) for cell in rows[0]] == [
        "1",
        "150",
        "Duplicate blocksblocks.1 ← blocks.0",
        "validation 2.500",
        "kept",
        "+1,000 (+100 %)",
        "yes, 0 (to the bit)",
        "0.800× (probe)",
        "3.00",
    ]
    assert [words(cell) for cell in rows[1]][6:] == ["no, 0.25", "–", "–"]


def test_everything_is_escaped() -> None:
    entries = [
        entry(
            1,
            5,
            [(EVIL + ".1", EVIL + ".0")],
            {EVIL: EVIL},
            edit={"type": EVIL, "at": EVIL},
            metrics={EVIL: EVIL},
            max_difference=EVIL,
            summary=EVIL,
        )
    ]
    page = render_report(
        entries,
        [{"step": 1, "loss": 2.0, "validation": EVIL, "depth": EVIL}],
        title=EVIL,
        sentence=EVIL,
        table={"caption": EVIL, "columns": [EVIL], "rows": [[EVIL, EVIL]]},
        forecasts=[{"title": EVIL, "history": [1.0, EVIL], "actual": EVIL, "forecast": [2.0]}],
    )
    assert "<script>alert" not in page and "\x00" not in page
    scripts = [e for e in parsed(page).iter() if e.tag == "script"]
    assert [e.get("type") for e in scripts] == ["application/json", None]
    assert scripts[-1].text == SCRIPT
    attributes = {name for e in parsed(page).iter() for name in e.attrib}
    assert not [name for name in attributes if name.startswith("on")]


@pytest.mark.parametrize("evil", ["\ud800", "\ufffe", "\x1b[0m", "]]>", "--><b>", "\u2028"])
def test_text_that_breaks_encoders_and_parsers(evil: str, tmp_path: Path) -> None:
    target = Report.from_metrics([entry(1, 5, [(evil, None)])], [], title=evil).write(tmp_path / "report.html")
    assert parsed(target.read_text(encoding="utf-8")).find("body") is not None


def test_nothing_is_fetched() -> None:
    page = render_report(journal(), metrics(), title="A run", table=TABLE, forecasts=[FORECAST])
    assert not re.search(r"https?:|//|@import|url\(|src=|href=|<link|<img|<iframe", page.replace(FINGERPRINT, ""))
    assert "default-src &#x27;none&#x27;" in page


def test_only_our_script_may_run() -> None:
    page = render_report(journal(), metrics())
    policy = next(e for e in parsed(page).iter("meta") if e.get("http-equiv")).get("content")
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not set("<&") & set(SCRIPT)  # one text for HTML and for XML


def test_html_is_balanced() -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: list) -> None:
            assert tag in {"meta", "path", "line", "rect", "circle", "input"}  # an HTML parser would leave others open

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(render_report(journal(), metrics(), title="A run", table=TABLE, forecasts=[FORECAST]))
    parser.close()
    assert not parser.open


@pytest.mark.parametrize(
    ("entries", "points"),
    [
        ([], []),
        ([], [{}]),
        ([], [{"step": 0, "loss": 2.3}]),
        ([], [{"step": 7, "loss": math.nan, "validation": math.inf, "parameters": -math.inf}]),
        ([], [{"loss": 0.0}, {"loss": 0.0}]),
        ([], [{"step": 3, "loss": -1e300}, {"step": 3, "loss": 1e300}, {"step": 3, "loss": 10**400}]),
        ([], [{"step": 1, "loss": 1e-320}, {"step": 2, "loss": 1e99}]),
        ([], [{"step": 1, "loss": 1e16}, {"step": 2, "loss": 1e16 + 2}]),
        ([], [{"step": math.nan, "loss": 1.0}, {"step": 1e99, "loss": "high", "depth": True}]),
        ([{}], []),
        ([{"added": None, "renamed": None, "at": None, "edit": None, "metrics": None}], [{"step": 4}]),
        ([entry(1, 0, [("head._grown", None)])], []),
        ([entry(1, 900, [("0", None), ("a.b.c.12", "zzz")])], [{"step": 3, "loss": 1.0}]),
        ([entry(1, 5, [("blocks.999999999", "blocks.0")])], [{"step": 3, "loss": 1.0}]),
        ([entry(1, 5, [], {}, edit={"type": "m:Remove", "at": "x"}, parameters={"before": math.nan})], []),
    ],
)
def test_odd_runs_still_make_a_page(entries: list, points: list) -> None:
    root = render(entries, points)
    assert [h.text for h in root.iter("h1")] == ["A run"]
    places = [e.get(key) for e in root.iter() for key in ("x", "x1", "cx", "width", "height") if e.get(key)]
    assert all(re.fullmatch(r"-?[\d.]+%?", place) for place in places)
    assert not [e for e in root.iter("path") if re.search("nan|inf", e.get("d", ""))]


@pytest.mark.parametrize("table", [{}, {"columns": ["A"]}, {"rows": [[], [1, 2]]}, {"rows": [[True, None]]}])
def test_odd_tables(table: dict) -> None:
    render([], [], table=table)


def test_what_is_not_finite_is_said() -> None:
    points = metrics()
    points[100]["loss"], points[200]["validation"] = math.nan, math.inf
    root = render(journal(), points)
    assert "2 values not finite: a gap in the line." in words(section(root, LOSS))
    line = next(e for e in of_class(svg(root, f"{LOSS}-chart-step"), "line") if "main" in e.get("class"))
    assert line.get("d").count("M") == 2


def test_ten_thousand_points_and_a_thousand_growths_stay_small() -> None:
    points = metrics(10_000, every=1)
    path = "a" * 60 + ".blocks."
    entries = [entry(i, 10 * i, [(path + str(i + 8), path + str(i))], summary="<" * 500) for i in range(1000)]
    table = {
        "caption": "c" * 999,
        "columns": [str(i) for i in range(99)],
        "rows": [[1 / 3] * 99 for _ in range(500)],
    }
    noise = random.Random(1)
    values = [noise.random() for _ in range(9999)]
    forecast = {"title": "<" * 300, "history": values, "actual": values, "forecast": values}
    root = render(entries, points, title="t" * 9999, sentence="<" * 9999, table=table, forecasts=[forecast] * 30)
    assert "Not shown:" in words(section(root, "results"))
    assert "Not drawn:" in words(section(root, "layers"))
    assert "Vertical marks: 1,000 growths." in words(section(root, LOSS))


def test_the_file_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    target = Report.from_metrics(journal(), metrics(), title="Ünïcode ≥ 3").write(tmp_path / "new" / "page.html")
    page = target.read_text(encoding="utf-8")
    assert target == tmp_path / "new" / "page.html"
    assert page == render_report(journal(), metrics(), title="Ünïcode ≥ 3")
    assert "Ünïcode ≥ 3" in page
    assert len(page.encode()) < 120_000
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_nothing_but_the_standard_library() -> None:
    for path in Path(auxin.report.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        tree.body = [n for n in tree.body if ast.unparse(getattr(n, "test", n)) != "TYPE_CHECKING"]
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert all(
                name.split(".")[0] in sys.stdlib_module_names or name.startswith(("auxin.report", "auxin.errors"))
                for name in names
            )


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_of_text_and_lines(theme: int) -> None:
    colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)[theme]))
    for name in ("ink", "soft", "accent", "warn"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    assert contrast(colours["ink"], colours["field"]) >= 4.5
    assert contrast(colours["paper"], colours["accent"]) >= 4.5  # the chosen axis
    for name in ("line", "mark", "lost", *(f"shade{i}" for i in range(6))):
        assert contrast(colours[name], colours["paper"]) >= 3.0, name


def test_crowded_marks_fall_back_to_numbers() -> None:
    entries = [entry(i, 40 * i, [(f"model.encoder.layers.{i}", None)]) for i in range(1, 15)]
    labels = of_class(svg(render(entries, metrics()), f"{LOSS}-chart-step"), "label")
    assert [words(label) for label in labels] == [str(i) for i in range(1, 15)]
    rows: dict[str, list[float]] = {}
    for label in labels:
        rows.setdefault(label.get("y"), []).append(float(label.get("x").removesuffix("%")))
    assert all(b - a > 6 for places in rows.values() for a, b in pairwise(places))  # 15 pixels on a phone


def test_losses_in_different_units_get_a_chart_each() -> None:
    points = [
        {**point, "validation": None if point["validation"] is None else 100 * point["validation"]}
        for point in metrics()
    ]

    def names(entries: list, readings: list) -> list[str]:
        return [h.text for h in render(entries, readings).iter("h2")][:3]

    assert names(journal(), points) == ["Validation loss", "Training loss", "Did growing help?"]
    assert names(journal(), metrics()) == ["Loss", "Did growing help?", "Layers"]
