"""Charts that plotly.js draws in the browser, from a copy of it inside the page.

A chart is a list of plotly's traces over two axes (https://plotly.com/javascript/reference/); the
test of the page holds every trace to plotly's own schema. plotly.js has 4.8 MB, so the page
carries it compressed, and the numbers likewise: the script of page.html unpacks both.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sae_train.report.described_runs import ReportRun

Trace = dict[str, Any]

_LINE_OF_HOVER = 36  # characters: what a phone is wide enough for
_LONGEST_NAME = 22  # characters of a bar's name
_DIGITS = 5  # more than can be told apart on a screen
_HEIGHT = 300  # pixels, of all charts but bars
_THINNEST, _ROW, _GAP, _BELOW = 3, 16, 9, 60  # pixels: of a bar, a row of them, between, the axis
_FRAME = "#8b939d"  # legible on white and on near-black; the page's CSS colours what it can


@dataclass(frozen=True)
class Axis:
    """One axis: its words, whether it is logarithmic, whether it begins at 0.

    `ticks` is d3's format of its numbers; without one plotly chooses.
    """

    label: str
    log: bool = False
    zero: bool = False
    ticks: str = ""


class Charts:
    """The charts of one page, in the order in which they stand on it."""

    def __init__(self) -> None:
        self._specs: list[dict[str, Any]] = []

    def figure(
        self,
        heading: str,
        traces: Sequence[Trace],
        *,
        x: Axis,
        y: Axis,
        rows: Sequence[str] = (),
    ) -> str:
        """Add a chart; returns its `<figure>`. `rows` name the rows of horizontal bars."""
        head = f"<figure><h3>{escape(heading)}</h3>"
        if not any(len(trace["x"]) for trace in traces):
            return f'{head}<p class="empty">Nothing measured yet.</p></figure>'
        layout = _layout(x, y)
        height = _HEIGHT
        if rows:
            names = [words(_shortened(name)) for name in rows]
            layout["yaxis"] |= {"tickvals": list(range(len(rows))), "ticktext": names}
            layout["yaxis"] |= {"range": [len(rows) - 0.5, -0.5], "showgrid": False}
            height = len(rows) * (max(_ROW, _THINNEST * len(traces)) + _GAP) + _BELOW
        number = len(self._specs)
        self._specs.append({"data": list(traces), "layout": layout})
        return (
            f'{head}<div class="chart" id="chart-{number}" style="height:{height}px" role="img" '
            f'aria-label="{escape(heading)}"></div></figure>'
        )

    def packed(self) -> str:
        """All charts as JSON, compressed, in base64."""
        return _packed(json.dumps(self._specs, ensure_ascii=False, separators=(",", ":")))


@functools.cache
def packed_library() -> str:
    """plotly.js, compressed, in base64."""
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def curve(
    run: ReportRun, points: Sequence[tuple[float, float]], *, hover: str, steps: bool = False
) -> Trace:
    """A run's line through `points`, or with `steps` level around each.

    `hover` is plotly's template of what a pointer near a point shows below the run's name.
    """
    finite = [point for point in points if all(map(math.isfinite, point))]
    return {
        "type": "scatter",
        "mode": "lines" if len(finite) > 1 else "markers",
        "x": _rounded([x for x, _ in finite]),
        "y": _rounded([y for _, y in finite]),
        "line": {"color": run.color, "width": 1.8, "shape": "hvh" if steps else "linear"},
        "marker": {"color": run.color, "size": 8},
        "meta": run.key,
        "name": hover_lines(run.label),
        "hovertemplate": f"<b>%{{fullData.name}}</b><br>{hover}<extra></extra>",
    }


def mark(
    run: ReportRun,
    point: tuple[float, float],
    *,
    hover: str,
    label: str = "",
    beside: str = "top right",
    hollow: bool = False,
) -> Trace:
    """One point of a run; `hover` is what a pointer over it shows, `label` stands `beside` it."""
    symbol = run.symbol + ("-open" if hollow else "")
    return {
        "type": "scatter",
        "mode": "markers+text" if label else "markers",
        "x": _rounded([point[0]]),
        "y": _rounded([point[1]]),
        # A hollow mark goes around the full one that it may fall on.
        "marker": {
            "color": run.color,
            "symbol": symbol,
            "size": 16 if hollow else 11,
            "line": {"width": 2 if hollow else 0},
        },
        "text": [words(label)],
        "textposition": beside,
        "cliponaxis": False,
        "meta": run.key,
        "hovertext": [hover],
        "hoverinfo": "text",
    }


def joined(runs: Sequence[ReportRun], points: Sequence[tuple[float, float]], color: str) -> Trace:
    """A line from run to run; it leaves out the runs that are switched off."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": _rounded([x for x, _ in points]),
        "y": _rounded([y for _, y in points]),
        "line": {"color": color or _FRAME, "width": 1.8},
        "connectgaps": True,
        "meta": [run.key for run in runs],
        "hoverinfo": "skip",
    }


def row_bars(run: ReportRun, values: Mapping[str, float | None], *, label: str) -> Trace:
    """A run's horizontal bars: one for each name that has a value, in the names' order."""
    rows = [
        (row, name, value)
        for row, (name, value) in enumerate(values.items())
        if value is not None and math.isfinite(value)
    ]
    return {
        "type": "bar",
        "orientation": "h",
        "x": _rounded([value for _, _, value in rows]),
        "y": [row for row, _, _ in rows],
        "marker": {"color": run.color},
        "meta": run.key,
        "hovertext": [
            hover_text(run.label, {words(name): None, label: f"{value:.4g}"})
            for _, name, value in rows
        ],
        "hoverinfo": "text",
    }


def hover_text(run: str, numbers: Mapping[str, str | None]) -> str:
    """What a pointer shows: the run, then a line for each number."""
    lines = [name if value is None else f"{name} {value}" for name, value in numbers.items()]
    return "<br>".join([f"<b>{hover_lines(run)}</b>", *lines])


def hover_lines(label: str) -> str:
    """A label in lines that a phone has room for."""
    return "<br>".join(words(line) for line in textwrap.wrap(label, _LINE_OF_HOVER))


def words(text: str) -> str:
    """`text` as plotly shows it unchanged: it reads text as a kind of HTML."""
    return escape(text, quote=False)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _rounded(values: Sequence[float]) -> list[float | None]:
    # JSON has no NaN; plotly leaves out null.
    return [float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None for v in values]


def _layout(x: Axis, y: Axis) -> dict[str, Any]:
    return {
        "xaxis": _axis(x),
        "yaxis": _axis(y),
        "margin": {"l": 10, "r": 14, "t": 14, "b": 10},
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "namelength": -1},
        "bargap": 0.25,
        "uirevision": "kept",  # a zoom stays when a run is switched off
    }


def _axis(axis: Axis) -> dict[str, Any]:
    return {
        "title": {"text": axis.label, "standoff": 8, "font": {"size": 13}},
        "type": "log" if axis.log else "linear",
        "rangemode": "tozero" if axis.zero else "normal",
        "tickformat": axis.ticks,
        "minorloglabels": "complete",
        "exponentformat": "none" if axis.log else "e",
        "nticks": 4 if axis.log else 7,
        "automargin": True,
        "zeroline": False,
        "showline": True,
        "linecolor": _FRAME,
    }
