"""Charts as SVG text: axes, lines, points, bars. Colours of the frame come from the page's CSS.

Sized to be read at phone width: on a wide page several stand side by side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 400, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 14, 44
_TICK_ROOM, _TICK_WIDTH = 30, 7.4  # the axis' name and gaps; a character of a tick, measured
_LABEL_WIDTH, _LABEL_HEIGHT = 6.6, 13  # of a character of the 12 px label type, measured

_Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Axis:
    """One axis: its words, whether it is logarithmic, its range (None: from the data).

    A tight axis ends where the data end; others at a round number.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    tight: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined by a line, marked, or both; `key` ties it to a run.

    `titles` are what a pointer over each mark shows; `labels` are written beside the marks, `name`
    once, beside any point.
    """

    x: Sequence[float]
    y: Sequence[float]
    color: str
    key: str = ""
    line: bool = True
    marks: bool = False
    hollow: bool = False
    titles: Sequence[str] = ()
    labels: Sequence[str] = ()
    name: str = ""

    def shown(self, x: _Scale, y: _Scale) -> list[tuple[float, float, int]]:
        """The points that lie on both axes, in pixels, each with its number."""
        return [
            (x(a), y(b), index)
            for index, (a, b) in enumerate(zip(self.x, self.y, strict=True))
            if x.shows(a) and y.shows(b)
        ]


@dataclass(frozen=True)
class Bars:
    """A histogram: `heights[i]` between `edges[i]` and `edges[i + 1]`."""

    edges: Sequence[float]
    heights: Sequence[float]
    color: str
    key: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure with two axes; `title` is read aloud and shown by the page."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    bars: Sequence[Bars] = ()


@dataclass
class _Scale:
    """Maps data to pixels along one axis."""

    axis: Axis
    low: float
    high: float
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.axis.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.axis.log)


def render(chart: Chart) -> str:
    """The chart as one `<svg>` element; a note instead where it has nothing to show."""
    xs = [x for one in chart.series for x in one.x] + [e for one in chart.bars for e in one.edges]
    ys = [y for one in chart.series for y in one.y]
    ys += [h for one in chart.bars for h in (0.0, *one.heights)]
    y = _scale(chart.y, ys, start=HEIGHT - _BOTTOM, end=_TOP)
    longest = max((len(compact(tick)) for tick in y.ticks), default=0) if y else 0
    left = max(_LEFT, _TICK_ROOM + longest * _TICK_WIDTH)
    x = _scale(chart.x, xs, start=left, end=WIDTH - _RIGHT)
    if x is None or y is None:
        return '<p class="empty">Nothing measured yet.</p>'
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        _frame(x, y),
        *(_bars(one, x, y) for one in chart.bars),
        *(_series(one, x, y) for one in chart.series),
        _labels(chart.series, x, y),
        "</svg>",
    ]
    return "\n".join(parts)


def figure(chart: Chart, *, heading: str, caption: str = "") -> str:
    """The chart with its heading, and a caption of HTML, as one `<figure>`."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(heading)}</h3>{render(chart)}{below}</figure>"


def compact(value: float) -> str:
    """1200000 -> '1.2M', 0.00031 -> '3.1e-4', 12.0 -> '12': for ticks and tiles."""
    if value == 0:
        return "0"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            unit = 1e3 if suffix == "k" else limit
            return f"{value / unit:.4g}{suffix}"
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def _scale(axis: Axis, values: Sequence[float], *, start: float, end: float) -> _Scale | None:
    shown = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    if not shown:
        return None
    low = min(shown) if axis.low is None else axis.low
    high = max(shown) if axis.high is None else axis.high
    if axis.log:
        low, high = (low / 1.1, high * 1.1) if low < high else (low / 2, high * 2)
        return _Scale(axis, low, high, start, end, _log_ticks(low, high))
    if low == high:
        low = low if axis.low is not None else low - abs(low or 1) * 0.1
        high = high + abs(high or 1) * 0.1
    step = _nice_step((high - low) / 5)
    if axis.low is None and not axis.tight:
        low = math.floor(low / step) * step
    if axis.high is None and not axis.tight:
        high = math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    count = int((high - first * step) / step + 1e-9) + 1
    return _Scale(axis, low, high, start, end, [(first + i) * step for i in range(count)])


def nice_ticks(low: float, high: float) -> tuple[float, float, list[float]]:
    """A range of round numbers around two, and the round numbers in it."""
    high = high if high > low else low + 1.0
    step = _nice_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [step * i for i in range(first, last + 1)]


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    if span < 0.3:
        step = _nice_step((high - low) / 4)
        return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    multiples = (1, 1.5, 2, 3, 4, 5, 6, 8) if span < 0.8 else (1, 2, 5) if span < 2.5 else (1,)
    ticks = [m * 10.0**d for d in decades for m in multiples]
    return [tick for tick in ticks if low <= tick <= high]


def _frame(x: _Scale, y: _Scale) -> str:
    left, bottom, right = x.start, HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = ['<g class="frame">']
    for tick in y.ticks:
        at = y(tick)
        parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right}"/>')
        parts.append(
            f'<text x="{left - 7:.1f}" y="{at + 4:.1f}" class="end">{compact(tick)}</text>'
        )
    for tick in x.ticks:
        at = x(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" class="mid">{compact(tick)}</text>')
    parts.append(f'<path class="axis" d="M{left:.1f} {_TOP}V{bottom}H{right}"/>')
    middle = (left + right) / 2
    label = escape(x.axis.label)
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" class="mid name">{label}</text>')
    height = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(13 {height}) rotate(-90)" class="mid name">'
        f"{escape(y.axis.label)}</text></g>"
    )
    return "".join(parts)


def _bars(bars: Bars, x: _Scale, y: _Scale) -> str:
    shapes = []
    for left, right, height in zip(bars.edges, bars.edges[1:], bars.heights, strict=False):
        if height > 0:
            top, width = y(height), max(x(right) - x(left) - 0.8, 0.8)
            title = f"{compact(height)} between {compact(left)} and {compact(right)}"
            shapes.append(
                f'<rect x="{x(left):.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{y(0) - top:.1f}"><title>{title}</title></rect>'
            )
    return f'<g data-run="{escape(bars.key)}" fill="{bars.color}">{"".join(shapes)}</g>'


def _series(series: Series, x: _Scale, y: _Scale) -> str:
    points = series.shown(x, y)
    parts = [f'<g data-run="{escape(series.key)}" style="color:{series.color}">']
    if series.line and len(points) > 1:
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py, _ in points)
        parts.append(f'<path class="line" d="M{path}"/>')
    if series.marks or len(points) == 1:
        for px, py, index in points:
            title = f"<title>{escape(series.titles[index])}</title>" if series.titles else ""
            # A ring goes around the full mark that it may fall on.
            kind, radius = ("mark hollow", 8) if series.hollow else ("mark", 5)
            parts.append(
                f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}">{title}</circle>'
            )
    return "".join(parts) + "</g>"


def _labels(all_series: Sequence[Series], x: _Scale, y: _Scale) -> str:
    """Write each name and label where it covers no mark and no other, on no line if there is room.

    What finds no place is left to the tooltip.
    """
    points = {id(one): one.shown(x, y) for one in all_series}
    room = _Room(left=x.start + 2)
    for one in all_series:
        drawn = points[id(one)]
        if one.labels or one.name or one.marks:
            room.taken += [(px - 6, py - 6, px + 6, py + 6) for px, py, _ in drawn]
        if one.line:
            for (ax, ay, _), (bx, by, _) in itertools.pairwise(drawn):
                room.lines += _along(ax, ay, bx, by)
    parts = []
    anchors = {id(one): _anchors(points[id(one)]) for one in all_series if one.name}
    named = [one for one in all_series if one.name]
    # Who has the fewest places chooses first.
    for one in sorted(named, key=lambda one: len(room.free(one.name, anchors[id(one)]))):
        found = room.place(one.name, anchors[id(one)])
        parts += [_label_text(one.name, found, color=one.color)] if found else []
    for one in all_series:
        for px, py, index in points[id(one)] if one.labels else ():
            found = room.place(one.labels[index], [(px, py)])
            parts += [_label_text(one.labels[index], found)] if found else []
    return "".join(parts)


def _anchors(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """Where a line may be named: at its ends, then its other points, then between them."""
    marks = [(px, py) for px, py, _ in points]
    between = [((ax + bx) / 2, (ay + by) / 2) for (ax, ay), (bx, by) in itertools.pairwise(marks)]
    return [*marks[:1], *marks[:0:-1], *between]


def _label_text(words: str, place: tuple[float, float], *, color: str = "") -> str:
    style = f' style="fill:{color}"' if color else ""
    left, top = place
    return f'<text class="label"{style} x="{left:.1f}" y="{top + 11:.1f}">{escape(words)}</text>'


@dataclass
class _Room:
    """What of a chart is covered: by marks and labels, which nothing may cover, and by lines."""

    left: float
    taken: list[_Box] = field(default_factory=list)
    lines: list[_Box] = field(default_factory=list)

    def place(
        self, words: str, points: Sequence[tuple[float, float]]
    ) -> tuple[float, float] | None:
        """Take the best place beside one of the points: its left and top; None if none is free."""
        boxes = self.free(words, points)
        for box in [box for box in boxes if _is_free(box, self.lines)] or boxes:
            self.taken.append(box)
            return box[:2]
        return None

    def free(self, words: str, points: Sequence[tuple[float, float]]) -> list[_Box]:
        """The places beside the points that cover no mark and no label, the best first."""
        width = len(words) * _LABEL_WIDTH
        furthest = WIDTH - 3 - width  # a long one near the right edge is moved in
        boxes = [
            (min(left, furthest), top, min(left, furthest) + width, top + _LABEL_HEIGHT)
            for px, py in points
            for left, top in _beside(px, py, width=width)
        ]
        return [box for box in boxes if self._is_inside(box) and _is_free(box, self.taken)]

    def _is_inside(self, box: _Box) -> bool:
        return (
            box[0] > self.left and box[1] > 0 and box[2] < WIDTH - 2 and box[3] < HEIGHT - _BOTTOM
        )


def _beside(px: float, py: float, *, width: float) -> list[tuple[float, float]]:
    """Left and top of the places around a mark for a label of this width, the best first."""
    return [
        (px + 5, py - 20),
        (px + 9, py - 8),
        (px - 6 - width, py + 6),
        (px - 9 - width, py - 8),
        (px + 5, py + 7),
        (px - 6 - width, py - 20),
        (px - width / 2, py - 22),
        (px - width / 2, py + 9),
    ]


def _along(ax: float, ay: float, bx: float, by: float) -> list[_Box]:
    """Small boxes that cover a straight line."""
    count = math.ceil(math.hypot(bx - ax, by - ay) / 4) or 1
    middles = ((ax + (bx - ax) * i / count, ay + (by - ay) * i / count) for i in range(count + 1))
    return [(px - 1, py - 1, px + 1, py + 1) for px, py in middles]


def _is_free(box: _Box, others: Sequence[_Box]) -> bool:
    return not any(_overlap(box, other) for other in others)


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
