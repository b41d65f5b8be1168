"""The report's figures: which numbers of the runs go on which axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sae_train.report.svg import Axis, Bars, Chart, Series, compact
from sae_train.runs.folder import RunFolder

# Dense to sparse: blue to red, each legible on white and on near-black.
_PALETTE = (
    (66, 99, 214),
    (26, 147, 178),
    (35, 160, 110),
    (151, 160, 40),
    (222, 140, 40),
    (205, 70, 70),
)
_MOST_POINTS = 400  # per training curve: more than the pixels it is drawn on
_MOST_LABELLED = 3  # families of a frontier whose every mark has room for words


@dataclass(frozen=True)
class ReportRun:
    """A run as the report shows it.

    Attributes:
        label: what tells it from the others, short.
        family: runs of one family differ only in how strongly sparsity is pressed; the frontier
            joins them with a line.
        pressure: how strongly it is pressed, what tells it from its family.
    """

    folder: RunFolder
    label: str
    family: str
    pressure: str
    color: str

    @property
    def key(self) -> str:
        """What the page's script calls the run by: its config's name."""
        return self.folder.config.name

    def measured(self, name: str) -> float | None:
        """A number of evaluation.json."""
        value = (self.folder.evaluation or {}).get(name)
        return float(value) if isinstance(value, int | float) else None

    def trained(self, name: str) -> float | None:
        """A number of the last row of metrics.jsonl."""
        value = self.folder.metrics[-1].get(name) if self.folder.metrics else None
        return float(value) if isinstance(value, int | float) else None


_Point = tuple[float, float, ReportRun]  # L0, a metric, whose they are


def palette(count: int) -> list[str]:
    """`count` colours spread over the palette, as #rrggbb."""
    colors = []
    for index in range(count):
        at = index / max(count - 1, 1) * (len(_PALETTE) - 1)
        lower = min(int(at), len(_PALETTE) - 2)
        part = at - lower
        mixed = (
            round(a + (b - a) * part)
            for a, b in zip(_PALETTE[lower], _PALETTE[lower + 1], strict=True)
        )
        colors.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return colors


def frontier_chart(runs: Sequence[ReportRun], *, metric: str, label: str) -> Chart:
    """`metric` of evaluation.json against L0, families joined, runs labelled.

    Many families are named once each, and what tells their runs apart is left to the tooltips.
    """
    families: dict[str, list[_Point]] = {}
    for run in runs:
        l0, value = run.measured("l0"), run.measured(metric)
        if l0 is not None and value is not None:
            families.setdefault(run.family, []).append((l0, value, run))
    crowded = len(families) > _MOST_LABELLED
    lines, marks = [], []
    for family, members in families.items():
        members.sort(key=lambda member: member[0])
        middle = members[len(members) // 2][2].color if len(families) > 1 else "var(--muted)"
        l0s, values = [m[0] for m in members], [m[1] for m in members]
        lines.append(Series(x=l0s, y=values, color=middle, name=family if crowded else ""))
        marks += _frontier_marks(members, label=label, labelled=not crowded)
    every = [y for line in lines for y in line.y]
    # Sites that differ much in what they cost.
    log = crowded and min(every) > 0 and max(every) > 20 * min(every)
    low = 0.0 if not log and all(y >= 0 for y in every) else None
    return Chart(
        title=f"{label} against L0",
        x=Axis("L0 (active latents per token)", log=True),
        y=Axis(label, log=log, low=low),
        series=[*lines, *marks],
    )


def _frontier_marks(members: Sequence[_Point], *, label: str, labelled: bool) -> list[Series]:
    """A mark for each run of a family, which is named at its sparse end."""
    marks = []
    for index, (l0, value, run) in enumerate(members):
        words = run.label if index == 0 else run.pressure or run.label
        marks.append(
            Series(
                x=[l0],
                y=[value],
                color=run.color,
                key=run.key,
                marks=True,
                titles=[f"{run.label}: L0 {l0:.1f}, {label} {value:.4g}"],
                labels=[words] if labelled else [],
            )
        )
    return marks


def training_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """Loss, FVU, L0, dead fraction and mean threshold against tokens, every run."""
    return [
        _curves(runs, metric="loss", label="training loss"),
        _curves(runs, metric="fvu", label="FVU", zero=True),
        _curves(runs, metric="l0", label="L0", log=True),
        _curves(runs, metric="dead_fraction", label="dead latents (fraction)", zero=True),
        _curves(runs, metric="threshold_mean", label="mean threshold"),
        _curves(runs, metric="learning_rate", label="learning rate", zero=True),
    ]


def _curves(
    runs: Sequence[ReportRun], *, metric: str, label: str, log: bool = False, zero: bool = False
) -> Chart:
    series = []
    for run in runs:
        rows = [row for row in run.folder.metrics if row.get(metric) is not None]
        stride = math.ceil(len(rows) / _MOST_POINTS)
        rows = rows[:: stride or 1] + (rows[-1:] if stride > 1 else [])
        if rows:
            series.append(
                Series(
                    x=[row["tokens"] for row in rows],
                    y=[row[metric] for row in rows],
                    color=run.color,
                    key=run.key,
                )
            )
    values = [y for one in series for y in one.y if math.isfinite(y) and y > 0]
    log = log or (not zero and bool(values) and max(values) > 20 * min(values))
    return Chart(
        title=f"{label} against tokens",
        x=Axis("tokens", low=0.0, tight=True),
        y=Axis(label, log=log, low=0.0 if zero else None),
        series=series,
    )


def histogram_chart(run: ReportRun) -> Chart | None:
    """How many latents fire how often, on a log axis; None without an evaluation."""
    histogram = (run.folder.evaluation or {}).get("frequency_histogram")
    if not histogram:
        return None
    return Chart(
        title=f"Firing frequencies of {run.label}",
        x=Axis("log10 of the fraction of tokens", tight=True),
        y=Axis("latents", low=0.0),
        bars=[
            Bars(
                edges=histogram["log10_edges"],
                heights=histogram["counts"],
                color=run.color,
                key=run.key,
            )
        ],
    )


def position_charts(runs: Sequence[ReportRun]) -> list[Chart]:
    """L0, FVU and delta loss against the position in the sequence."""
    return [
        _by_position(runs, metric="l0", label="L0"),
        _by_position(runs, metric="fvu", label="FVU"),
        _by_position(runs, metric="delta_loss", label="delta loss (nats)"),
    ]


def _by_position(runs: Sequence[ReportRun], *, metric: str, label: str) -> Chart:
    series = []
    for run in runs:
        curves = (run.folder.evaluation or {}).get("by_position") or {}
        pairs = [
            (x, y)
            for x, y in zip(curves.get("position", []), curves.get(metric, []), strict=False)
            if y is not None
        ]
        if pairs:
            series.append(
                Series(
                    x=[x for x, _ in pairs], y=[y for _, y in pairs], color=run.color, key=run.key
                )
            )
    return Chart(
        title=f"{label} by position",
        x=Axis("position in the sequence", tight=True),
        y=Axis(label),
        series=series,
    )


def tiles(runs: Sequence[ReportRun]) -> list[tuple[str, str]]:
    """The few numbers at the top: (number, words)."""
    evaluated = [run for run in runs if run.measured("l0") is not None]
    trained = sum(run.folder.state == "trained" for run in runs)
    found = [(f"{trained} of {len(runs)}" if len(runs) > 1 else f"{trained}", _runs_words(runs))]
    found += _range(evaluated, "l0", "L0", lambda value: f"{value:.3g}")
    found += _range(evaluated, "fvu", "FVU", lambda value: f"{value:.3f}")
    found += _range(evaluated, "delta_loss", "delta loss, nats", lambda value: f"{value:.3f}")
    tokens = max((run.trained("tokens") or 0 for run in runs), default=0)
    return [*found, (compact(tokens), "training tokens a run")]


def _runs_words(runs: Sequence[ReportRun]) -> str:
    return "runs trained" if len(runs) > 1 else "run trained"


def _range(
    runs: Sequence[ReportRun], metric: str, words: str, text: Callable[[float], str]
) -> list[tuple[str, str]]:
    values: list[Any] = [run.measured(metric) for run in runs]
    values = [value for value in values if value is not None]
    if not values:
        return []
    low, high = text(min(values)), text(max(values))
    return [(low if low == high else f"{low}–{high}", words)]
