"""The page in a real browser: sizes, colours, keyboard, what a screen reader is told. Skipped without Chromium."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import PROGRAM, Browser
from pages import EVIL, LIMIT, Log, grown_log, journal, metrics, shapes, write_checkpoint

from auxin.report import Report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium")

SIZES = [(375, False), (375, True), (1600, False), (1600, True)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(autouse=True)
def quiet(browser: Browser) -> Iterator[None]:
    """No exception, no complaint of the browser, nothing asked of the network."""
    browser.errors.clear()
    yield
    assert browser.errors == []


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    log = grown_log()
    write_checkpoint(log.write(directory), log.entries, shapes())
    return Report.read(directory, title="A run").write(directory / "report.html")


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long names, many growths, and everything else that a page can hold."""
    forecast = {"title": "Series 4", "history": [1.0, 2.0] * 9, "actual": [1.0, 2.0], "forecast": [1.5, 2.0]}
    table = {"caption": "c " * 90, "columns": [f"column {i}" for i in range(14)], "rows": [["a name", *range(13)]] * 4}
    log = Log().read(3)
    for number in range(1, 40):
        path = "transformer.encoder.a_very_long_name.layers."
        log.grow([(f"{path}{number}", f"{path}{number - 1}")]).read(3)
    report = Report.from_metrics(log.entries, metrics(), title="A" * 90, sentence="It grew. " * 30)
    report = Report(report.run, report.title, report.sentence, table, (forecast,) * 6)
    return report.write(tmp_path_factory.mktemp("crowded") / "report.html")


OUTSIDE = """
[...document.querySelectorAll("main *")].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width && !element.closest(".scroll, input") && (box.left < -1 || box.right > innerWidth + 1);
}).map(element => element.tagName + " " + element.textContent.slice(0, 60))
"""

TOUCHING = """
[...document.querySelectorAll("svg.chart")].flatMap(chart => {
  const texts = [...chart.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
  const seen = texts.filter(([text, box]) => box.width);
  return seen.flatMap(([one, a], at) => seen.slice(at + 1).filter(([other, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 5
  ).map(([other]) => chart.id + one.textContent + " / " + other.textContent));
})
"""


@pytest.mark.parametrize(("width", "dark"), SIZES)
@pytest.mark.parametrize("which", ["page", "crowded"])
def test_nothing_sticks_out_or_lies_upon_another(
    browser: Browser, which: str, width: int, dark: bool, request: pytest.FixtureRequest
) -> None:
    browser.show(request.getfixturevalue(which), width, dark=dark)
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask(OUTSIDE) == []
    assert browser.ask(TOUCHING) == []


CONTRAST = """
(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (front, back) => front.slice(0, 3).map((c, i) => c * (front[3] ?? 1) + back[i] * (1 - (front[3] ?? 1)));
  const back = element => {
    if (!element) return [255, 255, 255];
    return over(parse(getComputedStyle(element).backgroundColor), back(element.parentElement));
  };
  const worst = [];
  for (const element of document.querySelectorAll("main *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getBoundingClientRect().width || element.matches("script, title, desc")) continue;
    const style = getComputedStyle(element);
    const svg = element.closest("svg");
    const front = parse(svg ? style.fill : style.color), behind = back(svg ? svg.parentElement : element);
    const [a, b] = [light(over(front, behind)), light(behind)].sort((x, y) => y - x);
    worst.push([(a + 0.05) / (b + 0.05), element.textContent.slice(0, 40)]);
  }
  return worst.sort((x, y) => x[0] - y[0])[0];
})()
"""


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_every_text_has_enough_contrast(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.show(page, width, dark=dark)
    browser.ask("document.querySelectorAll('details').forEach(details => details.open = true)")
    worst, text = browser.ask(CONTRAST)
    assert worst >= 4.5, text
    paper = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 24, 26)" if dark else "rgb(252, 252, 250)")


SHOWN = "[...document.querySelectorAll('.plot.labelled')].filter(plot => plot.offsetHeight).map(plot => plot.id)"


def test_the_keyboard_changes_the_axis_of_every_figure(browser: Browser, page: Path) -> None:
    browser.show(page, 1600)
    figures = ["metric-0", "metric-1", "layers", "parameters"]
    assert browser.ask(SHOWN) == [*(f"{name}-step" for name in figures), ""]
    browser.press("Tab", 9)
    assert browser.ask("document.activeElement.id") == "axis-step"
    for axis in ("flops", "seconds", "step"):
        browser.press("ArrowRight", 39)
        assert browser.ask("document.activeElement.id") == f"axis-{axis}"
        assert browser.ask(SHOWN) == [*(f"{name}-{axis}" for name in figures), ""]
    ring = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert browser.ask(ring) == "solid"


def test_arrow_keys_read_a_chart(browser: Browser, page: Path) -> None:
    browser.show(page, 1600)
    first = grown_log().lines[0]
    browser.press("Tab", 9)
    browser.press("Tab", 9)
    assert browser.ask("document.activeElement.id") == "metric-0-step"
    browser.press("Home", 36)
    said = browser.ask("document.getElementById('metric-0-readout').textContent")
    assert said == f"step 10, 1.69e7 FLOP, {first['seconds']:g} s, metric {first['metric']:.4g}"
    browser.press("ArrowRight", 39)
    assert browser.ask("document.getElementById('metric-0-readout').textContent").startswith("step 20, ")
    browser.press("ArrowLeft", 37)
    browser.press("ArrowLeft", 37)
    assert browser.ask("document.getElementById('metric-0-readout').textContent").startswith("step 10, ")
    browser.press("End", 35)
    assert browser.ask("document.getElementById('metric-0-readout').textContent").startswith("step 950, ")
    assert browser.ask("document.querySelector('#metric-0-step .cursor').getAttribute('x1')") == "100%"


@pytest.mark.parametrize("axis", ["step", "flops", "seconds"])
def test_the_pointer_reads_a_chart(browser: Browser, page: Path, axis: str) -> None:
    browser.show(page, 1600)
    browser.ask(f"document.getElementById('axis-{axis}').click()")
    place = f"document.querySelector('#metric-0-{axis} svg').getBoundingClientRect()"
    box = browser.ask(f"(({{left, top, width}}) => ({{left, top, width}}))({place})")
    browser.point(box["left"] + box["width"] / 2, box["top"] + 150)
    said = browser.ask("document.getElementById('metric-0-readout').textContent")
    rows = json.loads(browser.ask("document.querySelector('script[data-for=metric-0]').textContent"))["rows"]
    column = ["step", "flops", "seconds"].index(axis)
    nearest = min(rows, key=lambda row: abs(row[column] - rows[-1][column] / 2))
    assert said.startswith(f"step {nearest[0]:.0f}, ")


def tree(browser: Browser) -> list[tuple[str, str]]:
    """(role, name) of all that a screen reader is told."""
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    said: list[Any] = [
        (n.get("role", {}).get("value"), n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]
    ]
    return said


def test_what_a_screen_reader_is_told(browser: Browser, page: Path) -> None:
    browser.show(page, 375)
    said = tree(browser)
    names = {role: [name for kind, name in said if kind == role] for role, _ in said}
    assert names["heading"] == [
        "A run",
        "Metric given to step",
        "Accuracy",
        "Did growing help?",
        "Layers",
        "Parameters",
        "Gradient ratio",
        "Decisions",
    ]
    assert names["radio"] == ["Steps", "FLOPs", "Time"]
    assert "Horizontal axis" in names["group"]
    images = names.get("image", []) + names.get("img", [])
    assert len(images) == 5 and all(" over " in name for name in images)  # of the three axes one is shown
    assert any(name.startswith("Metric given to step over steps Metric given to step 2.9") for name in images)
    assert len(names["DisclosureTriangle"]) == 5  # a table behind each figure
    assert names["region"][:2] == ["Metric given to step", "Accuracy"] and "Decisions, table" in names["region"]
    assert names["main"] and not [name for role, name in said if role in ("radio", "button", "link") and not name]


def test_a_table_opens_by_keyboard(browser: Browser, page: Path) -> None:
    browser.show(page, 1600)
    for _ in range(3):
        browser.press("Tab", 9)
    assert browser.ask("document.activeElement.textContent") == "Metric given to step as a table"
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, text="\r")
    browser.call("Input.dispatchKeyEvent", type="keyUp", key="Enter", windowsVirtualKeyCode=13)
    assert browser.ask("document.querySelector('details').open")
    assert browser.ask("document.querySelector('details tbody').rows.length") == 40


def test_without_scripts_the_page_works(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(page, 1600)
        assert browser.ask("document.querySelector('.readout').textContent") == ""
        browser.press("Tab", 9)
        browser.press("ArrowRight", 39)
        assert browser.ask(SHOWN)[0] == "metric-0-flops"
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_hostile_names_run_nothing(browser: Browser, tmp_path: Path) -> None:
    log = Log().read(3)
    evil = f"{EVIL}<img src=x onerror=document.title='gotcha'>"
    log.lines[0]["metrics"] = {evil: 1.0}
    log.grow([(f"{evil}.1", f"{evil}.0")], dead=[evil]).read(9)
    page = Report.read(log.write(tmp_path), title="harmless").write(tmp_path / "page.html")
    browser.show(page, 1600)
    assert browser.ask("document.title") == "harmless"
    assert browser.ask("document.images.length") == 0
    injected = page.read_text().replace("</main>", "<script>document.title='gotcha'</script></main>")
    page.write_text(injected)  # even a script that did get in is not run
    browser.show(page, 375)
    assert browser.ask("document.title") == "harmless"
    assert len(browser.errors) == 1 and "Content Security Policy" in browser.errors.pop()


def test_a_notebook_shows_the_page_in_a_frame(browser: Browser, tmp_path: Path) -> None:
    report = Report.from_metrics(journal(), metrics(), title="A 'quoted' \"run\"")
    frame = report._repr_html_()
    assert len(frame.encode()) < 2 * LIMIT
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!DOCTYPE html><style>section{{color:red}}</style><body>{frame}</body>")
    browser.show(notebook, 900)
    assert browser.ask("document.querySelector('iframe').title") == "A 'quoted' \"run\""
    assert browser.ask("document.querySelectorAll('section, style').length") == 1  # nothing of the page leaks
    targets = browser.call("Target.getTargets")["targetInfos"]
    outer, browser.session = browser.session, browser.attach(next(t for t in targets if t["url"] == "about:srcdoc"))
    try:
        assert browser.ask("document.querySelector('h1').textContent") == report.title
        browser.ask("document.getElementById('axis-flops').click()")
        assert browser.ask(SHOWN)[0] == "metric-0-flops"
        assert browser.ask("document.querySelector('.readout').textContent").startswith("Point at a chart")
    finally:
        browser.session = outer
