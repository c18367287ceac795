"""One style for the plots of all benchmarks.

A benchmark describes its plots as data: `BarChart` compares rows, `CurveChart` shows how values depend on a number of
streams, a time or a chunk size. `write` draws them with matplotlib. Every plot has a title that states the finding, a
subtitle (quantity, unit, meaning of the whiskers) and a footer (machine, model, commit, date). Values and curves are
labelled directly; texts do not overlap.

Colours differ in lightness, and curves also in markers and dashes, so that plots are readable in grey. An SVG contains
the colours for a light page, and style rules that replace them for readers who prefer dark pages. It has a background
of its own, so that its text is readable on any page.
"""

from __future__ import annotations

import functools
import itertools
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BACKGROUND, INK, MUTED, GRID = "#ffffff", "#1f2328", "#59636e", "#d8dee4"
ACCENT, NEUTRAL = "#0550ae", "#8c959f"  # bars of nemostream, and of other systems
SERIES = ("#0a3069", "#8b2252", "#1b7c83", "#bf8700", "#a8b1ba")
# Colours for dark pages; GitHub's background.
DARK = {
    BACKGROUND: "#0d1117",
    INK: "#f0f6fc",
    MUTED: "#9198a1",
    GRID: "#30363d",
    ACCENT: "#79c0ff",
    NEUTRAL: "#6e7681",
    **dict(zip(SERIES, ("#cae8ff", "#f0a3e0", "#2fa59b", "#9a6b14", "#484f58"), strict=True)),
}
_PARTS = (SERIES[3], SERIES[0], SERIES[2], SERIES[1], SERIES[4])  # of bars: neighbours differ more in lightness
_MARKERS, _DASHES = "osD^v", ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)))

# In points, of which a README column has about 620.
_WIDTH, _MARGIN, _GAP = 612.0, 14.0, 20.0
_TITLE, _TEXT, _SMALL = 13.0, 9.5, 8.5  # font sizes
_LINE = 1.35  # line height relative to the font size
_ROW, _CURVES = 21.0, 175.0  # heights of a row of bars and of a panel of curves
_COLUMNS = 3  # panels of curves in a row

# Widths are measured with a wide font, so that texts do not overlap with the narrower ones of other systems.
_MEASURED_FONT = "DejaVu Sans"
_FONTS = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
_SETTINGS = {
    "font.family": [_MEASURED_FONT],
    "svg.fonttype": "none",
    "svg.hashsalt": "nemostream",  # the same plot gives the same bytes in each run
    "text.parse_math": False,
    "text.hinting": "no_hinting",  # widths of texts do not depend on the resolution
    "axes.unicode_minus": True,
}
_NO_METADATA = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None, "Format": None, "Type": None}}


# -- description of plots ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A bar of one or more parts. `interval` is a whisker, `text` is written behind the bar."""

    parts: Sequence[float]
    text: str
    interval: tuple[float, float] | None = None

    @property
    def end(self) -> float:
        """Right end of bar and whisker."""
        return max(sum(self.parts), *(self.interval or ()), 0.0)


@dataclass(frozen=True)
class BarPanel:
    """Bars with a common unit, one for each row of the chart; None if it was not measured."""

    heading: str
    unit: str
    bars: Sequence[Bar | None]


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars. Panels with the same unit have the same scale."""

    title: str
    subtitle: str
    rows: Sequence[str]
    panels: Sequence[BarPanel]
    emphasised: Collection[str] | None = None  # rows in the accent colour; None: all
    parts: Sequence[str] = ()  # names of the parts of the bars
    reference: float | None = None  # position of a vertical line


@dataclass(frozen=True)
class Curve:
    """Points (x, y), in order of x. `label` is written at the right end; `intervals` are whiskers (low, high)."""

    label: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    style: str = "line"  # or "plain" (no markers), "points" (no line), "crosses" (no line), "fit" (thin, grey)
    series: int = 0  # colour, marker and dashes, which repeat after those of `SERIES`


@dataclass(frozen=True)
class CurvePanel:
    """Curves in the same axes; `note` is written below the heading, `limit` is the position of a horizontal line."""

    heading: str
    curves: Sequence[Curve]
    note: str = ""
    limit: float | None = None


@dataclass(frozen=True)
class CurveChart:
    """Panels of curves with the same scales. `x_ticks` maps positions to labels; None: chosen automatically.

    The subtitle names the quantity of the vertical axis; `y_unit` is written behind its highest tick.
    """

    title: str
    subtitle: str
    panels: Sequence[CurvePanel]
    x_label: str
    y_unit: str
    x_ticks: Mapping[float, str] | None = None
    log_y: bool = False
    y_max: float | None = None


Chart = BarChart | CurveChart


def probe_curves(label: str, probes: Sequence[tuple[float, float, bool]], series: int) -> list[Curve]:
    """Return the curve of probes (x, y, whether it passed): a mark for each, and a line of the medians by x.

    Filled marks passed, crosses failed.
    """
    ordered = sorted(probes, key=lambda probe: probe[0])
    medians = [
        (x, statistics.median(y for _, y, _ in group))
        for x, group in itertools.groupby(ordered, lambda probe: probe[0])
    ]
    curves = [Curve(label, medians, style="plain", series=series)] if medians else []
    for style, passed in (("points", True), ("crosses", False)):
        if marks := [(x, y) for x, y, found in ordered if found == passed]:
            curves.append(Curve("", marks, style=style, series=series))
    return curves


# -- files -------------------------------------------------------------------------------------------------------------


def write(chart: Chart, path: Path, footer: str) -> None:
    """Write a chart to a file, a PNG or an SVG by its suffix. Needs matplotlib."""
    kind = path.suffix[1:]
    with _settings():
        draw(chart, footer).savefig(path, dpi=72 if kind == "svg" else 144, metadata=_NO_METADATA[kind])
    if kind == "svg":
        path.write_text(adapt(path.read_text(encoding="utf-8"), chart.title), encoding="utf-8")


def adapt(svg: str, title: str) -> str:
    """Return matplotlib's SVG with a title for screen readers, the reader's fonts, and colours for dark pages."""
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark} !important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
        if f"{kind}: {light}" in svg
    )
    style = f"text{{font-family:{_FONTS}}}@media (prefers-color-scheme:dark){{{rules}}}"
    # matplotlib writes one property or several, depending on its version.
    svg = re.sub(r"font: ((?:\w+ )*)([\d.]+px) [^;\"]*", _font, svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r"<!--.*?-->\n? *", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", _rounded, tag[0]), svg)
    head, _, body = svg.partition("<defs>")
    escaped = title.replace("&", "&amp;").replace("<", "&lt;")
    head = head.replace("<svg ", '<svg role="img" ', 1)
    svg = f"{head}<title>{escaped}</title><style>{style}</style><defs>{body}"
    return "\n".join(line.strip() for line in svg.splitlines() if line.strip()) + "\n"


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}"


def _font(match: re.Match[str]) -> str:
    weight = match[1].strip()
    return f"font-size: {match[2]}" + (f"; font-weight: {weight}" if weight else "")


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw(chart: Chart, footer: str) -> Any:
    """Return a matplotlib figure of a chart."""
    inner = _WIDTH - 2 * _MARGIN
    heads = [(line, _TITLE, INK, True) for line in wrap(chart.title, inner, _TITLE, True)]
    heads += [(line, _TEXT, MUTED, False) for line in wrap(chart.subtitle, inner, _TEXT)]
    feet = wrap(footer, inner, _SMALL)
    top = _MARGIN + sum(size * _LINE for _, size, _, _ in heads) + 8
    body = _bars_height(chart) if isinstance(chart, BarChart) else _curves_height(chart)
    bottom = 6 + len(feet) * _SMALL * _LINE + _MARGIN / 2
    with _settings():
        page = _Page(top + body + bottom)
        y = _MARGIN
        for text, size, colour, bold in heads:
            page.text(_MARGIN, y + size + 2 * (not bold), text, size, colour, bold)
            y += size * _LINE
        for index, text in enumerate(feet):
            page.text(_MARGIN, top + body + 6 + _SMALL + index * _SMALL * _LINE, text, _SMALL, MUTED)
        if isinstance(chart, BarChart):
            _draw_bars(page, chart, top)
        else:
            _draw_curves(page, chart, top)
    return page.figure


class _Page:
    """A figure in which positions are points from the top left corner."""

    def __init__(self, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, facecolor=BACKGROUND)
        FigureCanvasAgg(self.figure)

    def text(
        self, x: float, y: float, text: str, size: float = _TEXT, colour: str = INK, bold: bool = False, **options: Any
    ) -> None:
        """Write text with its baseline at y, unless `options` (of matplotlib) have another alignment."""
        options = {"va": "baseline", "weight": "bold" if bold else "normal", "size": size, "color": colour} | options
        self.figure.text(x / _WIDTH, 1 - y / self.height, text, **options)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        from matplotlib.lines import Line2D

        x, y = ([at / _WIDTH for at, _ in points], [1 - at / self.height for _, at in points])
        self.figure.add_artist(Line2D(x, y, color=colour, linewidth=width, solid_capstyle="butt"))

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        box = (left / _WIDTH, 1 - (top + height) / self.height, width / _WIDTH, height / self.height)
        axes = self.figure.add_axes(box)
        axes.patch.set_visible(False)
        axes.spines[:].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=_SMALL, labelcolor=MUTED, pad=4)
        return axes


@functools.cache
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Return the width of a text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=_MEASURED_FONT, weight="bold" if bold else "normal", size=size)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def wrap(text: str, width: float, size: float, bold: bool = False) -> list[str]:
    """Return the lines of a text; a line has at least one word. There is no break between a number and its unit."""
    lines: list[str] = []
    for word in re.sub(r"(?<=\d) (?=(ms|s|h|µs|%)(?!\w))", "\u00a0", text).split(" "):
        if lines and text_width(f"{lines[-1]} {word}", size, bold) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def spread(wanted: Sequence[float], distance: float) -> list[float]:
    """Return positions at least `distance` apart, in the order of the wanted ones and as close to them as possible.

    The sum of the squared differences is minimal: isotonic regression by pooling of adjacent violators.
    """
    order = np.argsort(wanted, kind="stable")
    blocks: list[list[float]] = []  # sum and number of values
    for index, position in enumerate(order):
        blocks.append([wanted[position] - index * distance, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    levels = itertools.chain.from_iterable([total / count] * round(count) for total, count in blocks)
    found = [0.0] * len(wanted)
    for index, (position, level) in enumerate(zip(order, levels, strict=True)):
        found[position] = level + index * distance
    return found


# -- bars --------------------------------------------------------------------------------------------------------------


def _bars_height(chart: BarChart) -> float:
    headings = any(panel.heading for panel in chart.panels)
    return 18.0 * bool(chart.parts) + 18.0 * headings + _ROW * len(chart.rows) + 36


def _draw_bars(page: _Page, chart: BarChart, top: float) -> None:
    emphasised = chart.rows if chart.emphasised is None else chart.emphasised
    labels = [(row, chart.emphasised is not None and row in emphasised) for row in chart.rows]  # and whether it is bold
    if chart.parts:
        _draw_key(page, chart.parts, top)
        top += 18
    top += 18.0 * any(panel.heading for panel in chart.panels)
    left = _MARGIN + max(text_width(row, _TEXT, bold) for row, bold in labels) + 8
    width = (_WIDTH - _MARGIN - left - _GAP * (len(chart.panels) - 1)) / len(chart.panels)
    for index, (label, bold) in enumerate(labels):
        page.text(left - 8, top + (index + 0.5) * _ROW, label, bold=bold, ha="right", va="center_baseline")
    for number, panel in enumerate(chart.panels):
        begin = left + number * (width + _GAP)
        same = [bar for other in chart.panels if other.unit == panel.unit for bar in other.bars if bar]
        end = max((bar.end for bar in same), default=1.0) or 1.0
        limit = max([end, *(bar.end / (1 - (text_width(bar.text, _TEXT) + 7) / width) for bar in same)])
        axes = page.axes(begin, top, width, _ROW * len(chart.rows))
        axes.set(xlim=(0, limit), ylim=(len(chart.rows) - 0.5, -0.5), yticks=[])
        axes.set_xticks(_ticks(0, limit, width * end / limit))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", length=3, color=MUTED)  # no grid: it would cross the texts
        if panel.heading:
            page.text(begin, top - 7, panel.heading, bold=True)
        page.text(begin, top + _ROW * len(chart.rows) + 26, panel.unit, _SMALL, MUTED)
        for row, bar in enumerate(panel.bars):
            _draw_bar(axes, chart, row, bar, chart.rows[row] in emphasised)
        _draw_whiskers(axes, panel.bars)
        axes.axvline(0, color=MUTED, linewidth=1, clip_on=False)
        if chart.reference is not None:
            axes.axvline(chart.reference, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))


def _draw_bar(axes: Any, chart: BarChart, row: int, bar: Bar | None, emphasised: bool) -> None:
    place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center_baseline", "size": _TEXT}
    if bar is None:
        axes.annotate("not measured", (0, row), color=MUTED, **place)
        return
    begin = 0.0
    for index, length in enumerate(bar.parts):
        colour = _PARTS[index % len(_PARTS)] if chart.parts else ACCENT if emphasised else NEUTRAL
        edge = {"edgecolor": BACKGROUND, "linewidth": 0.5} if chart.parts else {}
        axes.barh(row, length, left=begin, height=0.64, color=colour, **edge)
        begin += length
    weight = "bold" if emphasised and chart.emphasised else "normal"
    axes.annotate(bar.text, (bar.end, row), color=INK, weight=weight, **place)


def _draw_whiskers(axes: Any, bars: Sequence[Bar | None]) -> None:
    found = [(row, sum(bar.parts), *bar.interval) for row, bar in enumerate(bars) if bar and bar.interval]
    if not found:
        return
    rows, ends, low, high = (np.array(each) for each in zip(*found, strict=True))
    errors = [(ends - low).clip(0), (high - ends).clip(0)]
    for colour, width, cap in ((BACKGROUND, 3.0, 4.0), (INK, 1.1, 3.0)):  # with a border, on bars of any colour
        style = {"fmt": "none", "color": colour, "elinewidth": width, "capthick": width, "capsize": cap}
        axes.errorbar(ends, rows, xerr=errors, **style)


def _draw_key(page: _Page, names: Sequence[str], top: float) -> None:
    x = _MARGIN
    for index, name in enumerate(names):
        page.line([(x, top + 5), (x + 10, top + 5)], _PARTS[index % len(_PARTS)], 9)
        page.text(x + 14, top + 5, name, va="center_baseline")
        x += text_width(name, _TEXT) + 32


def _ticks(low: float, high: float, width: float, most: int = 5) -> list[float]:
    """Return at most `most` intervals of round ticks whose labels fit next to each other into a width."""
    from matplotlib.ticker import MaxNLocator

    found = [low]
    for count in range(most, 0, -1):
        ticks = MaxNLocator(nbins=count, steps=[1, 2, 5, 10]).tick_values(low, high)
        found = [float(tick) for tick in ticks if low <= tick <= high]
        if sum(text_width(f"{tick:g}", _SMALL) + 8 for tick in found) < width:
            break
    return found


# -- curves ------------------------------------------------------------------------------------------------------------


def _panel_head(chart: CurveChart) -> float:
    """Return the height of the heading and the note of a panel."""
    return 15.0 * any(panel.heading for panel in chart.panels) + 13.0 * any(panel.note for panel in chart.panels) + 6


def _curves_height(chart: CurveChart) -> float:
    lines = -(-len(chart.panels) // _COLUMNS)
    return lines * (_panel_head(chart) + _CURVES + 20) + 16


def _draw_curves(page: _Page, chart: CurveChart, top: float) -> None:
    columns = min(len(chart.panels), _COLUMNS)
    x_range, y_range = _ranges(chart)
    y_ticks = _log_ticks(*y_range) if chart.log_y else _ticks(*y_range, _CURVES)
    y_labels = [f"{tick:g}" for tick in y_ticks]
    y_labels[-1] += chart.y_unit
    left = _MARGIN + max(text_width(label, _SMALL) for label in y_labels) + 6
    labels = [label for panel in chart.panels for label, _, _ in _right_labels(panel)]
    right = max((text_width(label, _TEXT) + 14 for label in labels), default=4.0)
    width = (_WIDTH - _MARGIN - left - _GAP * (columns - 1)) / columns - right
    for number, panel in enumerate(chart.panels):
        line, column = divmod(number, _COLUMNS)
        begin = left + column * (width + right + _GAP)
        above = top + line * (_panel_head(chart) + _CURVES + 20)
        if panel.heading:
            page.text(begin, above + _TEXT, panel.heading, bold=True)
        if panel.note:
            page.text(begin, above + 15 + _SMALL, panel.note, _SMALL, MUTED)
        begin_y = above + _panel_head(chart)
        axes = page.axes(begin, begin_y, width, _CURVES)
        if chart.log_y:
            axes.set_yscale("log")
        axes.set(xlim=x_range, ylim=y_range)
        axes.minorticks_off()
        axes.set_yticks(y_ticks, y_labels if column == 0 else [""] * len(y_ticks))
        x_ticks = chart.x_ticks or {tick: f"{tick:g}" for tick in _ticks(*x_range, width, 10)}
        axes.set_xticks(list(x_ticks), list(x_ticks.values()))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.spines["bottom"].set(visible=True, color=MUTED, linewidth=1)
        if panel.limit is not None:
            axes.axhline(panel.limit, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        for curve in panel.curves:
            _draw_curve(axes, curve)
        _label_curves(page, axes, panel, begin + width)
        if number + columns >= len(chart.panels):
            page.text(begin + width / 2, begin_y + _CURVES + 26, chart.x_label, _SMALL, MUTED, ha="center")


def _ranges(chart: CurveChart) -> tuple[tuple[float, float], tuple[float, float]]:
    curves = [curve for panel in chart.panels for curve in panel.curves]
    x = [at for curve in curves for at, _ in curve.points] + list(chart.x_ticks or {})
    y = [at for curve in curves for _, at in curve.points]
    y += [at for curve in curves for each in curve.intervals for at in each]
    y += [panel.limit for panel in chart.panels if panel.limit is not None]
    margin = 0.04 * (max(x) - min(x)) or 0.5
    if chart.log_y:
        return (min(x) - margin, max(x) + margin), (min(y) / 1.4, max(y) * 1.6)
    return (min(x) - margin, max(x) + margin), (0.0, chart.y_max or 1.08 * max(y))


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round ticks; not one at the lower end, next to the ticks of the other axis."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    span = high / low
    steps = (1, 1.5, 2, 3, 4, 5, 7) if span < 10 else (1, 2, 5) if span < 100 else (1, 3) if span < 1000 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in ticks if 1.05 * low < tick <= high]


def _draw_curve(axes: Any, curve: Curve) -> None:
    x, y = zip(*curve.points, strict=True)
    if curve.style == "fit":
        axes.plot(x, y, color=NEUTRAL, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        return
    style = curve.series % len(SERIES)
    colour, marker = SERIES[style], _MARKERS[style]
    options: dict[str, Any] = {"color": colour, "linewidth": 1.6, "linestyle": _DASHES[style]}
    if curve.style in ("points", "crosses"):
        options["linestyle"] = "none"
    if curve.style != "plain":
        edge = {"markeredgecolor": BACKGROUND, "markeredgewidth": 0.6}
        cross = {"marker": "x", "markeredgewidth": 1.6, "markersize": 6.0}
        options |= cross if curve.style == "crosses" else {"marker": marker, "markersize": 5.5, **edge}
    if curve.intervals:
        low, high = zip(*curve.intervals, strict=True)
        errors = [np.subtract(y, low).clip(0), np.subtract(high, y).clip(0)]
        axes.errorbar(x, y, yerr=errors, fmt="none", color=colour, elinewidth=1.1, capsize=2.5)
    axes.plot(x, y, clip_on=False, zorder=3, **options)


def _right_labels(panel: CurvePanel) -> list[tuple[str, tuple[float, float] | None, str]]:
    """Return the labels of a panel, each with the point that it belongs to (None: the limit), and its colour."""
    labels = [
        (curve.label, curve.points[-1], SERIES[curve.series % len(SERIES)]) for curve in panel.curves if curve.label
    ]
    return [*labels, *([("limit", None, INK)] if panel.limit is not None else [])]


def _label_curves(page: _Page, axes: Any, panel: CurvePanel, right: float) -> None:
    """Write the labels to the right of the axes, each at the height of its curve's last point."""
    labels = _right_labels(panel)
    ends = [axes.transData.transform(point or (axes.get_xlim()[1], panel.limit)).tolist() for _, point, _ in labels]
    heights = [page.height - y for _, y in ends]
    for (label, point, colour), (x, _), end, height in zip(
        labels, ends, heights, spread(heights, _TEXT * 1.25), strict=True
    ):
        page.line([(x + 4 * (point is not None), end), (right + 4, height)], colour, 0.8)
        page.text(right + 7, height, label, va="center_baseline")
