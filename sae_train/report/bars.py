"""Horizontal bars by name, as SVG text: one group of bars for each name, one bar for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sae_train.report.svg import compact, nice_ticks

_WIDTH, _TOP, _BOTTOM, _RIGHT = 400, 8, 44, 20
_GROUP, _GAP, _THINNEST = 16, 9, 3.0
_LETTER = 7.2  # of the 12.5 px type, measured
_LONGEST = 22


@dataclass(frozen=True)
class RowBars:
    """One run's bars: a value for each name, None where there is none."""

    values: Sequence[float | None]
    color: str
    key: str
    label: str


@dataclass(frozen=True)
class RowChart:
    """Bars that begin at 0; `title` is read aloud."""

    title: str
    axis: str
    names: Sequence[str]
    bars: Sequence[RowBars]


def render_rows(chart: RowChart) -> str:
    """The chart as one `<svg>` element, as high as its rows need."""
    found = [v for bars in chart.bars for v in bars.values if v is not None and math.isfinite(v)]
    low, high, ticks = nice_ticks(min(0.0, *found), max(0.0, *found))
    thick = max(_THINNEST, _GROUP / len(chart.bars))
    step = thick * len(chart.bars) + _GAP
    names = [_short(name) for name in chart.names]
    left = 14 + _LETTER * max(map(len, names))
    bottom = _TOP + step * len(names)

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - _RIGHT - left)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {bottom + _BOTTOM:.0f}" role="img" '
        f'aria-label="{escape(chart.title)}"><g class="frame">'
    ]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{at(tick):.1f} {_TOP}V{bottom:.1f}"/>')
        parts.append(
            f'<text x="{at(tick):.1f}" y="{bottom + 17:.1f}" class="mid">{compact(tick)}</text>'
        )
    middle = (left + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{bottom + 36:.1f}" class="mid name">{escape(chart.axis)}</text>'
    )
    for row, name in enumerate(names):
        y = _TOP + step * row + (step - _GAP) / 2 + _GAP / 2 + 4
        parts.append(f'<text x="{left - 7:.1f}" y="{y:.1f}" class="end">{escape(name)}</text>')
    parts.append(f'<path class="axis" d="M{at(0):.1f} {_TOP}V{bottom:.1f}"/></g>')
    for place, bars in enumerate(chart.bars):
        shapes = []
        for row, value in enumerate(bars.values):
            if value is None or not math.isfinite(value):
                continue
            y = _TOP + step * row + _GAP / 2 + thick * place
            begin, end = sorted((at(0), at(value)))
            title = escape(f"{bars.label}, {chart.names[row]}: {value:.4g}")
            shapes.append(
                f'<rect x="{begin:.1f}" y="{y:.1f}" width="{max(end - begin, 0.5):.1f}" '
                f'height="{thick * 0.88:.1f}"><title>{title}</title></rect>'
            )
        parts.append(f'<g data-run="{escape(bars.key)}" fill="{bars.color}">{"".join(shapes)}</g>')
    return "\n".join([*parts, "</svg>"])


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
