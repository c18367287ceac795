"""The style of plots: layout without overlaps, colours in light and dark mode and in grey, SVG files."""

from __future__ import annotations

import itertools
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="needs the bench extra")

from matplotlib.text import Text
from matplotlib.transforms import Bbox

from nemostream.benchmarks import report
from nemostream.benchmarks.harness import plots
from nemostream.benchmarks.harness.plots import Bar, BarChart, BarPanel, Chart, Curve, CurveChart, CurvePanel

RESULTS = report.ROOT / "benchmarks" / "results"
COMMITTED = report.committed(report.ROOT)
CHARTS: dict[str, tuple[Chart, str]] = {
    f"{name}-{kind}": (chart, report.footer([result]))
    for name, result in COMMITTED.items()
    for kind, chart in report.charts(result).items()
} | report._overviews(COMMITTED)

LONG = " ".join(["A title that needs more than one line because it has many words,"] * 3)
EXTREMES: dict[str, Chart] = {
    "many bars": BarChart(
        LONG,
        LONG,
        [f"row {index} with a long name" for index in range(20)],
        [
            BarPanel("first", "ms", [Bar([10.0**index], f"{10**index} ms", None) for index in range(-10, 10)]),
            BarPanel("second", "ms", [Bar([1.0, 2.0, 3.0], "three parts", (0.5, 9e8))] * 19 + [None]),
            BarPanel("third", "%", [Bar([0.0], "nothing")] * 20),
        ],
        ["row 3 with a long name"],
        ["one", "two", "three"],
        2.0,
    ),
    "one bar": BarChart("Title", "Subtitle", ["row"], [BarPanel("", "ms", [None])]),
    "equal curves": CurveChart(
        LONG,
        "Subtitle",
        [
            CurvePanel(
                f"panel {index}", [Curve(f"curve {n}", [(0, 5.0), (9, 5.0)], series=n) for n in range(6)], "note", 5
            )
            for index in range(4)
        ],
        "x",
        " ms",
    ),
    "one point": CurveChart("Title", "Subtitle", [CurvePanel("", [Curve("", [(3, 7.0)])])], "x", "", log_y=True),
    "one small point": CurveChart(
        "Title", "Subtitle", [CurvePanel("", [Curve("", [(3, 2.9)])])], "x", " ms", log_y=True
    ),
    "decades": CurveChart(
        "Title", "Subtitle", [CurvePanel("", [Curve("up", [(1, 1e-3), (2, 1e6)])])], "x", " ms", log_y=True
    ),
}


def visible_texts(figure: Any) -> list[tuple[str, Any]]:
    """The texts and their boxes in points, without the rounding of glyphs to whole pixels."""
    figure.set_dpi(720)
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [text.get_window_extent() for text in found]
    scaled = [Bbox(box.get_points() / 10) for box in boxes]
    return [(text.get_text(), box) for text, box in zip(found, scaled, strict=True) if box.width]


@pytest.mark.parametrize("name", [*CHARTS, *EXTREMES])
def test_no_texts_overlap_and_all_are_inside(name: str) -> None:
    chart, footer = CHARTS[name] if name in CHARTS else (EXTREMES[name], LONG)
    figure = plots.draw(chart, footer)
    texts = visible_texts(figure)
    shown = " ".join(text for text, _ in texts).replace("\u00a0", " ")
    assert chart.title in shown and chart.subtitle in shown and footer in shown
    width, height = figure.get_size_inches()
    for text, box in texts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 72 * width and box.y1 <= 72 * height, text
    for (text, box), (other, other_box) in itertools.combinations(texts, 2):
        both = Bbox.intersection(box, other_box)
        assert both is None or min(both.width, both.height) < 0.5, (text, other)


def test_bars_have_the_lengths_of_their_values() -> None:
    """Measured in the drawn figure: both panels of a unit have the same scale."""
    chart = BarChart(
        "Title", "Subtitle", ["a", "b"], [BarPanel("", "ms", [Bar([30.0], ""), Bar([10.0, 5.0], "", (12.0, 24.0))])] * 2
    )
    figure = plots.draw(chart, "")
    lengths = [[bar.get_window_extent().width for bar in axes.patches] for axes in figure.axes]
    assert lengths[0] == pytest.approx(lengths[1]) and len(lengths) == 2
    long, first, second = lengths[0]
    assert (first / long, second / long) == pytest.approx((10 / 30, 5 / 30))
    for axes in figure.axes:
        for lines in axes.collections:
            ((begin, row), (end, _)) = lines.get_segments()[0]
            assert (begin, end, row) == (12.0, 24.0, 1)


def test_curves_pass_through_their_points() -> None:
    points = [(1, 2.0), (2, 8.0), (4, 4.0)]
    curve = Curve("label", points, [(1.0, 3.0), (6.0, 8.5), (4.0, 4.0)], series=1)
    figure = plots.draw(CurveChart("T", "S", [CurvePanel("", [curve], limit=5.0)], "x", " ms"), "")
    (axes,) = figure.axes
    line = next(each for each in axes.get_lines() if each.get_linestyle() == "--" and len(each.get_xdata()) == 3)
    assert line.get_xydata().tolist() == [list(point) for point in points]
    assert [segment[:, 1].tolist() for segment in axes.collections[0].get_segments()] == [[1, 3], [6, 8.5], [4, 4]]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 8.5
    limit = next(each for each in axes.get_lines() if list(each.get_ydata()) == [5.0, 5.0])
    assert limit.get_color() == plots.INK
    assert "limit" in [text for text, _ in visible_texts(figure)]


def test_curves_of_probes() -> None:
    """The line has the median of the probes with the same number; marks show which passed."""
    probes = [(4, 8.0, False), (2, 1.0, True), (4, 6.0, True), (2, 2.0, True), (4, 5.0, False)]
    assert plots.probe_curves("p99", probes, 2) == [
        Curve("p99", [(2, 1.5), (4, 6.0)], style="plain", series=2),
        Curve("", [(2, 1.0), (2, 2.0), (4, 6.0)], style="points", series=2),
        Curve("", [(4, 8.0), (4, 5.0)], style="crosses", series=2),
    ]
    assert plots.probe_curves("p99", [], 0) == []


# -- text --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 200), min_size=1, max_size=8), st.floats(1, 20), st.integers(0, 1000))
def test_labels_are_spread_as_little_as_possible(wanted: list[float], distance: float, seed: int) -> None:
    """No other allowed positions are closer to the wanted ones (the problem is convex: small changes suffice)."""

    def cost(positions: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(positions, wanted, strict=True))

    def allowed(positions: list[float]) -> bool:
        ordered = [positions[index] for index in np.argsort(wanted, kind="stable")]
        return all(b - a >= distance - 1e-6 for a, b in itertools.pairwise(ordered))

    rng, found = np.random.default_rng(seed), plots.spread(wanted, distance)
    assert allowed(found)
    for _ in range(30):
        other = (found + rng.normal(0, 0.1 * distance, len(found))).tolist()
        shift = rng.normal(0, 0.1)
        for changed in (other, [each + shift for each in found]):
            assert not allowed(changed) or cost(changed) >= cost(found) - 1e-6


@pytest.mark.parametrize("width", [60.0, 200.0, 580.0])
def test_lines_fit_into_the_width(width: float) -> None:
    text = "Finals of 80 + 1120 ms come 0.47 s earlier, at 40 % of the error rate, than those of 1120 ms chunks"
    lines = plots.wrap(text, width, 9.5)
    assert " ".join(lines).replace("\u00a0", " ") == text
    assert all(plots.text_width(line, 9.5) <= width or " " not in line for line in lines)
    assert not any(re.match(r"(ms|s|%)\b", line) for line in lines)
    for line, following in itertools.pairwise(lines):  # no line is shorter than necessary
        assert plots.text_width(f"{line} {following.split(' ')[0]}", 9.5) > width


# -- colours -----------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def lightness(colour: str) -> float:
    """L* of CIELAB, 0 to 100."""
    y = luminance(colour)
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_and_lightness(dark: bool) -> None:
    """Text has a contrast of at least 4.5, marks of 3 (WCAG); colours that are compared differ without their hue."""

    def shown(colour: str) -> str:
        return plots.DARK[colour] if dark else colour

    page = shown(plots.BACKGROUND)
    for text in (plots.INK, plots.MUTED):
        assert contrast(shown(text), page) >= 4.5
    for mark in (plots.ACCENT, plots.NEUTRAL, *plots.SERIES[:4]):
        assert contrast(shown(mark), page) >= 3, mark
    levels = sorted(lightness(shown(colour)) for colour in plots.SERIES)
    assert min(b - a for a, b in itertools.pairwise(levels)) >= 10
    assert abs(lightness(shown(plots.ACCENT)) - lightness(shown(plots.NEUTRAL))) >= 20


def test_curves_differ_without_colours() -> None:
    curves = [Curve("", [(0, index), (1, index)], series=index) for index in range(5)]
    (axes,) = plots.draw(CurveChart("T", "S", [CurvePanel("", curves)], "x", ""), "").axes
    styles = {(line.get_marker(), str(line._dash_pattern)) for line in axes.get_lines()}
    assert len({marker for marker, _ in styles}) == len({dash for _, dash in styles}) == 5


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.svg")), ids=lambda path: path.stem)
def test_committed_plots_are_adaptive(path: Path) -> None:
    """Every colour has a counterpart for dark mode; there are no scripts, links or fonts of the machine."""
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    used = set(re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)))
    dark = text.partition("prefers-color-scheme:dark")[2]
    rules = dict(re.findall(r'\[style\*="(\w+: #\w{6})"\]\{(\w+:#\w{6}) !important\}', dark))
    assert used == set(rules) and f"fill: {plots.BACKGROUND}" in used
    for rule, replaced in rules.items():
        kind, _, colour = rule.partition(": ")
        assert replaced == f"{kind}:{plots.DARK[colour]}"
    assert not re.search(r"<script|http-equiv|@import|<image|DejaVu|matplotlib \d", text)
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None and len(title.text or "") > 10 and root.get("role") == "img"
    assert float(str(root.get("width")).removesuffix("pt")) * 96 / 72 <= 830  # of a README


def test_size_of_committed_plots() -> None:
    assert sum(path.stat().st_size for path in RESULTS.glob("*.svg")) <= 500_000


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("font-size: 9px; font-family: 'DejaVu Sans'; fill: #1f2328", "font-size: 9px; fill: #1f2328"),
        ("font: 9px 'DejaVu Sans', sans-serif; fill: #1f2328", "font-size: 9px; fill: #1f2328"),
        ("font: bold 13px 'DejaVu Sans'; fill: #1f2328", "font-size: 13px; font-weight: bold; fill: #1f2328"),
    ],
)
def test_fonts_of_different_versions_of_matplotlib(written: str, kept: str) -> None:
    svg = f'<svg width="1"><defs></defs><!-- x --><text style="{written}" x="1.23456">0.12345 &lt; 1</text></svg>'
    found = plots.adapt(svg, "a < b & c")
    assert f'<text style="{kept}" x="1.23">0.12345 &lt; 1</text>' in found  # numbers in a text are not rounded
    assert "<title>a &lt; b &amp; c</title>" in found and "<!--" not in found


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plots_are_reproducible(kind: str, tmp_path: Path) -> None:
    chart, footer = CHARTS["step-times"]
    for name in "ab":
        plots.write(chart, tmp_path / f"{name}.{kind}", footer)
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_colours_in_a_browser(tmp_path: Path) -> None:
    """As an image, the SVG follows the colour scheme of the page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser_path is None:
        pytest.skip("needs Chromium")
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    plots.write(*[CHARTS["step-times"][0], tmp_path / "x.svg", CHARTS["step-times"][1]])
    (tmp_path / "page.html").write_text('<body style="margin:0"><img src="x.svg">')
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for scheme, colour in (("light", plots.BACKGROUND), ("dark", plots.DARK[plots.BACKGROUND])):
            page = browser.new_page(color_scheme=scheme)
            page.goto((tmp_path / "page.html").as_uri())
            page.wait_for_function("document.images[0].complete")
            page.screenshot(path=tmp_path / f"{scheme}.png")
            pixels = image.open(tmp_path / f"{scheme}.png").convert("RGB")
            assert bytes(pixels.getpixel((2, 2))).hex() == colour[1:]
            found = {bytes(each).hex() for _, each in pixels.getcolors(1 << 20)}
            accent = plots.ACCENT if scheme == "light" else plots.DARK[plots.ACCENT]
            assert accent[1:] in found
        browser.close()
