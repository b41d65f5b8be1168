"""How a step's cost grows with width and with L0, as two plots.

    python -m benchmarks.growth docs [--repeats 3]

writes `step_by_width.svg` and `step_by_l0.svg` into that folder and prints the numbers as JSON.
Time is the median of rounds in which the programs of one size take turns (`benchmarks.step`);
memory is what XLA sets aside for a step, with the weights, second moments and rows it is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.step import Row, measure
from benchmarks.support.measure import machine, prepare
from sae_train.report.svg import HEIGHT, WIDTH, Axis, Chart, Series, render

WIDTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
L0S = (16, 32, 64, 128, 256, 512)
AT_L0, AT_WIDTH = 64, 16_384
D_MODEL, BATCH = 640, 4096
WIDEST_DENSE = 65_536  # beyond it a dense step's [B, F] arrays take minutes and gigabytes

COLORS = {"encoder": "#8a8f98", "dense": "#c2703d", "sparse": "#2f6fb5"}
STYLE = """
text { font: 13px sans-serif; fill: #444; }
.mid { text-anchor: middle; } .end { text-anchor: end; } .name { font-size: 14px; }
.grid { stroke: #e3e3e3; } .axis { stroke: #888; fill: none; }
.line { stroke: currentColor; stroke-width: 2; fill: none; } .mark { fill: currentColor; }
.label { font-size: 12px; fill: #222; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
"""


def given_bytes(row: Row) -> int:
    """Both weight matrices, their second moments, and the batch: float32."""
    return 4 * row.d_model * (4 * row.width + row.batch_size)


def plots(rows: Sequence[Row], *, x: str, label: str) -> str:
    """Time and memory of the programs of `rows` against their attribute `x`, side by side."""

    def series(program: str, *, memory: bool) -> Series:
        own = [row for row in rows if row.program == program]
        own.sort(key=lambda row: getattr(row, x))
        values = [
            (given_bytes(row) + row.temporary_bytes) / 1e9 if memory else row.median for row in own
        ]
        return Series(
            x=[getattr(row, x) for row in own],
            y=values,
            color=COLORS[program],
            marks=True,
            name=program,
        )

    axis = Axis(label, log=True)
    steps = ("dense", "sparse")
    charts = [
        Chart(
            "seconds a step",
            x=axis,
            y=Axis("seconds", log=True),
            series=[series(name, memory=False) for name in ("encoder", *steps)],
        ),
        Chart(
            "memory of a step",
            x=axis,
            y=Axis("GB", log=True),
            series=[series(name, memory=True) for name in steps],
        ),
    ]
    return beside(charts)


def beside(charts: Sequence[Chart]) -> str:
    """Charts in a row, as an SVG file that needs no page."""
    panels = [
        f'<svg x="{WIDTH * place}" width="{WIDTH}" height="{HEIGHT}">{render(chart)}</svg>'
        for place, chart in enumerate(charts)
    ]
    size = f'viewBox="0 0 {WIDTH * len(charts)} {HEIGHT}"'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
    return "\n".join([frame, '<rect width="100%" height="100%" fill="#fff"/>', *panels, "</svg>\n"])


def main() -> None:
    """Measure all sizes, write both plots, print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the plots go")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--l0s", type=int, nargs="+", default=L0S)
    told = parser.parse_args()
    prepare()

    def rows_at(width: int, l0: int) -> list[Row]:
        return measure(
            width=width,
            l0=l0,
            d_model=D_MODEL,
            batch_size=BATCH,
            repeats=told.repeats,
            dense=width <= WIDEST_DENSE,
        )

    by_width = [row for width in told.widths for row in rows_at(width, AT_L0)]
    by_l0 = [row for l0 in told.l0s for row in rows_at(AT_WIDTH, l0)]
    told.folder.mkdir(parents=True, exist_ok=True)
    by_width_svg = plots(by_width, x="width", label=f"width (L0 {AT_L0})")
    (told.folder / "step_by_width.svg").write_text(by_width_svg)
    by_l0_svg = plots(by_l0, x="l0", label=f"L0 (width {AT_WIDTH})")
    (told.folder / "step_by_l0.svg").write_text(by_l0_svg)
    found = {"by_width": by_width, "by_l0": by_l0}
    written = {name: [dataclasses.asdict(row) for row in rows] for name, rows in found.items()}
    sys.stdout.write(json.dumps({"machine": machine()} | written, indent=1) + "\n")


if __name__ == "__main__":
    main()
