"""Draws docs/rooms.svg from the imports: `make rooms`.

A box is a room (a sub-package) or, with `.py`, a module beside the rooms. Its row is the length
of the longest chain of imports below it, so that every arrow points down. Arrows that follow from
others are left out. A tooltip tells what a box imports of other packages.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"
COLORS = {"activation_cache": "#2f6f9f", "sae_train": "#8a5a14", "launch": "#4d7a3a"}
BOX, BEND, HEIGHT, GAP, ROW, TOP = 148, 20, 34, 16, 70, 44  # pixels
Graph = dict[str, set[str]]


def imported(path: Path) -> set[str]:
    """Every module of ours that a file imports, inside functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for module in found if module.partition(".")[0] in COLORS}


def box_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def boxes() -> Graph:
    """What each box imports."""
    needs: Graph = defaultdict(set)
    for package in COLORS:
        for path in sorted({*(ROOT / package).rglob("*.py")} - {ROOT / package / "__init__.py"}):
            box = box_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            needs[box] |= {box_of(module) for module in imported(path)} - {box}
    return needs


def reduced(needs: Graph) -> tuple[Graph, dict[str, int]]:
    """The arrows that don't follow from others, and each box's row; `CycleError` on a circle."""
    reach, kept = Graph(), Graph()
    rows: dict[str, int] = {}
    for box in graphlib.TopologicalSorter(needs).static_order():
        below = needs[box]
        reach[box] = below.union(*(reach[one] for one in below))
        rows[box] = 1 + max((rows[one] for one in below), default=-1)
        kept[box] = {one for one in below if not any(one in reach[other] for other in below)}
    return kept, rows


class Band:
    """One package: where each box is, and each arrow, bent in every row that it skips."""

    def __init__(self, needs: Graph) -> None:
        arrows, self.row_of = reduced(needs)
        self.paths = list[list[str]]()
        for box in sorted(needs):
            for one in sorted(arrows[box]):
                between = range(self.row_of[box] - 1, self.row_of[one], -1)
                bends = {f"bend {box} {one} {row}": row for row in between}
                self.row_of |= bends
                self.paths.append([box, *bends, one])
        numbers = range(1 + max(self.row_of.values()))
        self.rows = [[one for one, row in self.row_of.items() if row == n] for n in numbers]
        self.width = max(self._length(row) for row in self.rows) + 2 * GAP
        self.x: dict[str, float] = {}
        self._order()

    def _length(self, row: list[str]) -> int:
        return sum((BEND if one.startswith("bend") else BOX) + GAP for one in row) - GAP

    def _order(self) -> None:
        """Each row in the order of its neighbours' mean places, from above and from below."""
        joined: Graph = defaultdict(set)
        for path in self.paths:
            for upper, lower in itertools.pairwise(path):
                joined[upper].add(lower)
                joined[lower].add(upper)
        for sweep in range(24):
            for row in self.rows[:: 1 if sweep % 2 else -1]:
                mean: dict[str, float] = {}
                for one in row:
                    near = [self.x[other] for other in sorted(joined[one]) if other in self.x]
                    mean[one] = sum(near) / len(near) if near else self.width / 2
                row.sort(key=lambda one: (mean[one], one))
                left = (self.width - self._length(row)) / 2
                for one in row:
                    wide = BEND if one.startswith("bend") else BOX
                    self.x[one], left = left + wide / 2, left + wide + GAP

    def y(self, name: str) -> int:
        return TOP + ROW * (len(self.rows) - 1 - self.row_of[name])

    def path(self, names: list[str]) -> str:
        drawn = f"M{self.x[names[0]]:.0f} {self.y(names[0]) + HEIGHT}"
        for upper, lower in itertools.pairwise(names):
            start, end = self.y(upper) + HEIGHT, self.y(lower)
            a, b, middle = self.x[upper], self.x[lower], (start + end) // 2
            drawn += f"C{a:.0f} {middle} {b:.0f} {middle} {b:.0f} {end}V{end + HEIGHT}"
        return drawn.rpartition("V")[0]


BOX_SVG = f"""<g><title>{{title}}</title><rect x="{{left:.0f}}" y="{{y}}" width="{BOX}" rx="6" \
height="{HEIGHT}" fill="white"/><text x="{{x:.0f}}" y="{{base}}" text-anchor="middle" \
stroke="none">{{name}}<tspan fill="#777">{{ending}}</tspan></text></g>"""
BAND_SVG = """<g transform="translate({left})" stroke="{color}"><rect x="4" y="4" rx="8" \
width="{wide}" height="{high}" fill="{color}" fill-opacity="0.07" stroke="none"/>\
<text x="16" y="26" fill="{color}" stroke="none" font-weight="bold">{package}</text>"""
HEAD = '<path d="M0 0L8 4L0 8z" fill="#666" stroke="none"/>'
PICTURE_SVG = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{wide}} {{high}}" \
font-size="13" font-family="sans-serif"><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" \
markerWidth="7" markerHeight="7" orient="auto">{HEAD}</marker>\
<rect width="{{wide}}" height="{{high}}" fill="white"/>\n{{body}}\n</svg>\n"""


def picture() -> str:
    """The whole picture as SVG, the same bytes for the same imports."""
    needs = boxes()
    lines, left, high = list[str](), 0, 0
    for package, color in COLORS.items():
        own = {box: of for box, of in needs.items() if box.startswith(package)}
        band = Band({box: {one for one in of if one in own} for box, of in own.items()})
        size = {"wide": band.width - 8, "high": TOP + ROW * len(band.rows) - 24}
        lines.append(BAND_SVG.format(left=left, color=color, package=package, **size))
        for names in band.paths:
            lines.append(f'<path d="{band.path(names)}" fill="none" marker-end="url(#head)"/>')
        for box in sorted(own):
            x, y, is_room = band.x[box], band.y(box), (ROOT / box.replace(".", "/")).is_dir()
            title = f"{box} imports " + (", ".join(sorted(needs[box] - own.keys())) or "no other")
            name, ending = box.partition(".")[2], "" if is_room else ".py"
            place = {"left": x - BOX / 2, "x": x, "y": y, "base": y + 22}
            lines.append(BOX_SVG.format(name=name, ending=ending, title=title, **place))
        lines.append("</g>")
        left, high = left + band.width, max(high, size["high"] + 8)
    return PICTURE_SVG.format(wide=left, high=high, body="\n".join(lines))


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
