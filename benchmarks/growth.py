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

WIDTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
L0S = (16, 32, 64, 128, 256, 512)
AT_L0, AT_WIDTH = 64, 16_384
D_MODEL, BATCH = 640, 4096
WIDEST_DENSE = 65_536  # beyond it a dense step's [B, F] arrays take minutes and gigabytes

COLORS = {"encoder": "#8a8f98", "dense": "#c2703d", "sparse": "#2f6fb5"}


def given_bytes(row: Row) -> int:
    """Both weight matrices, their second moments, and the batch: float32."""
    return 4 * row.d_model * (4 * row.width + row.batch_size)


def write_plots(file: Path, rows: Sequence[Row], *, x: str, label: str) -> None:
    """Time and memory of the programs of `rows` against their attribute `x`, side by side."""
    import matplotlib.pyplot as plt

    figure, (time, memory) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    sizes = sorted({getattr(row, x) for row in rows})
    for program, color in COLORS.items():
        own = sorted((row for row in rows if row.program == program), key=lambda r: getattr(r, x))
        at = [getattr(row, x) for row in own]
        time.plot(at, [row.median for row in own], "o-", color=color, label=program)
        if program != "encoder":
            gigabytes = [(given_bytes(row) + row.temporary_bytes) / 1e9 for row in own]
            memory.plot(at, gigabytes, "o-", color=color, label=program)
    for axes, unit in ((time, "seconds a step"), (memory, "memory of a step, GB")):
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.grid(color="#e3e3e3")
        axes.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


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
    width_file, l0_file = told.folder / "step_by_width.svg", told.folder / "step_by_l0.svg"
    write_plots(width_file, by_width, x="width", label=f"width (L0 {AT_L0})")
    write_plots(l0_file, by_l0, x="l0", label=f"L0 (width {AT_WIDTH})")
    found = {"by_width": by_width, "by_l0": by_l0}
    written = {name: [dataclasses.asdict(row) for row in rows] for name, rows in found.items()}
    sys.stdout.write(json.dumps({"machine": machine()} | written, indent=1) + "\n")


if __name__ == "__main__":
    main()
