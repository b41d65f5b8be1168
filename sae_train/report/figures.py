"""The report's figures: which numbers of the runs go on which axes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sae_train.report.charts import Axis, Charts, Trace, curve, hover_text, joined, mark
from sae_train.report.described_runs import ReportRun, families_of

Numbers = Mapping[str, Any]  # of one evaluation
_Point = TypeVar("_Point")

L0_AXIS = Axis("L0 (active latents per token)", log=True)
FREQUENCY_AXIS = Axis("log₁₀ of the fraction of tokens")
_MOST_POINTS = 400  # of a curve: more than the pixels it is drawn on
_POINTS_OF_PAGE = 40_000  # of all curves, so that a suite's page stays under 3 MB
_CURVES_PER_RUN = 9
_MOST_LABELLED = 8  # marks of a frontier that have room for words


def numbers_hover(run: str, numbers: Numbers, *, also: Mapping[str, str] | None = None) -> str:
    """What a pointer over a run's mark shows: the run, L0, FVU, delta loss, and `also`."""
    shown = {"L0": ("l0", ".1f"), "FVU": ("fvu", ".4g"), "delta loss": ("delta_loss", ".4g")}
    if numbers.get("fvu_without_outlying") is not None:
        shown["FVU without outlying tokens"] = ("fvu_without_outlying", ".4g")
        shown["median token's FVU"] = ("fvu_median_token", ".4g")
    found = {
        words: "–" if numbers.get(key) is None else format(numbers[key], form)
        for words, (key, form) in shown.items()
    }
    return hover_text(run, {**found, **(also or {})})


def frontier(
    charts: Charts, runs: Sequence[ReportRun], *, heading: str, metric: str, label: str
) -> str:
    """`metric` of evaluation.json against L0, the runs of a family joined by a line."""
    families = {
        name: sorted(points, key=lambda point: point[0])
        for name, members in families_of(runs).items()
        if (points := _frontier_points(members, metric))
    }
    values = [value for points in families.values() for _, value, _ in points]
    # Sites that differ much in what they cost.
    log = len(families) > 3 and min(values) > 0 and max(values) > 20 * min(values)
    labelled = len(families) == 1 and len(values) <= _MOST_LABELLED
    lines, marks = [], []
    for points in families.values():
        middle = points[len(points) // 2][2].color if len(families) > 1 else ""
        lines.append(joined([run for *_, run in points], [p[:2] for p in points], middle))
        for l0, value, run in points:
            known = metric in ("fvu", "fvu_without_outlying", "delta_loss")
            more = {} if known else {label: f"{value:.4g}"}
            marks.append(
                mark(
                    run,
                    (l0, value),
                    hover=numbers_hover(run.label, run.folder.evaluation or {}, also=more),
                    label=(run.sparsity or run.label) if labelled else "",
                    # The frontier falls from left to right.
                    beside="bottom left" if (l0, value) == points[-1][:2] else "top right",
                )
            )
    positive = all(value >= 0 for value in values)
    y = Axis(label, log=log, zero=not log and positive)
    return charts.figure(heading, [*lines, *marks], x=L0_AXIS, y=y)


def _frontier_points(
    runs: Sequence[ReportRun], metric: str
) -> list[tuple[float, float, ReportRun]]:
    found = [(run.measured("l0"), run.measured(metric), run) for run in runs]
    return [(l0, y, run) for l0, y, run in found if l0 is not None and y is not None]


def training_figures(charts: Charts, runs: Sequence[ReportRun]) -> str:
    """Loss, FVU, L0, dead fraction, threshold and learning rate against tokens, every run."""
    axes = {
        "loss": Axis("training loss"),
        "fvu": Axis("FVU", zero=True),
        "l0": Axis("L0", log=True),
        "dead_fraction": Axis("dead latents (fraction)", zero=True),
        "threshold_mean": Axis("mean threshold"),
        "learning_rate": Axis("learning rate", zero=True),
    }
    return "".join(_training(charts, runs, metric, y) for metric, y in axes.items())


def _training(charts: Charts, runs: Sequence[ReportRun], metric: str, y: Axis) -> str:
    """One figure; an axis that needn't begin at 0 is logarithmic where values differ 20 times."""
    hover = f"%{{x:.3~s}} tokens<br>{y.label} %{{y:.4~g}}"
    curves = []
    for run in runs:
        rows = [row for row in run.folder.metrics if row.get(metric) is not None]
        points = [(row["tokens"], row[metric]) for row in _thinned(rows, len(runs))]
        if points:
            curves.append(curve(run, points, hover=hover))
    values = [v for one in curves for v in one["y"] if v > 0]
    log = y.log or (not y.zero and bool(values) and max(values) > 20 * min(values))
    y = dataclasses.replace(y, log=log)
    return charts.figure(_capital(y.label), curves, x=Axis("tokens", zero=True, ticks="~s"), y=y)


def _thinned(points: Sequence[_Point], runs: int) -> Sequence[_Point]:
    """Evenly chosen points, the last among them, as many as the page can carry."""
    most = max(min(_MOST_POINTS, _POINTS_OF_PAGE // (runs * _CURVES_PER_RUN)), 2)
    stride = math.ceil(len(points) / most)
    return [*points[:-1:stride], points[-1]] if stride > 1 else points


def frequency_figures(charts: Charts, runs: Sequence[ReportRun]) -> str:
    """How many latents fire how often, on a log axis; one figure for each family."""
    figures = ""
    for family, members in families_of(runs).items():
        traces = [histogram(run) for run in members if has_histogram(run)]
        if traces:
            heading = family or "Latents by firing frequency"
            y = Axis("latents", zero=True)
            figures += charts.figure(heading, traces, x=FREQUENCY_AXIS, y=y)
    return figures


def has_histogram(run: ReportRun) -> bool:
    """Whether the run's evaluation counted firing frequencies."""
    return bool((run.folder.evaluation or {}).get("frequency_histogram"))


def histogram(run: ReportRun, *, of: int | None = None) -> Trace:
    """The run's counts of latents by log10 frequency, in steps; as a share `of` a number."""
    found = (run.folder.evaluation or {})["frequency_histogram"]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(found["log10_edges"])]
    counts = found["counts"] if of is None else [count / of for count in found["counts"]]
    shown = "%{y} latents" if of is None else "%{y:.2%} of all latents"
    alive = run.measured("alive_fraction")
    if alive is not None:
        shown += f"<br>{alive:.1%} fired at least once"
    points = list(zip(middles, counts, strict=True))
    return curve(run, points, hover=f"10^%{{x:.2f}} of tokens<br>{shown}", steps=True)


def position_figures(charts: Charts, runs: Sequence[ReportRun]) -> str:
    """L0, FVU and delta loss against the position in the sequence, where they were measured."""
    metrics = (("l0", "L0"), ("fvu", "FVU"), ("delta_loss", "delta loss (nats)"))
    figures = ""
    for metric, label in metrics:
        traces = []
        for run in runs:
            found = (run.folder.evaluation or {}).get("by_position") or {}
            pairs = zip(found.get("position", []), found.get(metric, []), strict=False)
            points = _thinned([(x, y) for x, y in pairs if y is not None], len(runs))
            if points:
                hover = f"position %{{x}}<br>{label} %{{y:.4~g}}"
                traces.append(curve(run, points, hover=hover))
        if traces:
            x = Axis("position in the sequence")
            figures += charts.figure(_capital(label), traces, x=x, y=Axis(label))
    return figures


def prefix_figures(charts: Charts, runs: Sequence[ReportRun]) -> str:
    """FVU, delta loss, L0 and alive latents of each prefix of Matryoshka SAEs."""
    metrics = (
        ("fvu", "FVU"),
        ("delta_loss", "delta loss (nats)"),
        ("l0", "L0"),
        ("alive_fraction", "share of latents alive"),
    )
    figures = ""
    for metric, label in metrics:
        traces = []
        for run in runs:
            rows = (run.folder.evaluation or {}).get("by_prefix") or []
            points = [(row["latents"], row[metric]) for row in rows if row.get(metric) is not None]
            if points:
                hover = f"the first %{{x:,}} latents<br>{label} %{{y:.4~g}}"
                traces.append(curve(run, points, hover=hover))
        if traces:
            x = Axis("latents of the prefix", log=True, ticks="~s")
            figures += charts.figure(_capital(label), traces, x=x, y=Axis(label))
    return figures


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def tiles(runs: Sequence[ReportRun]) -> list[tuple[str, str]]:
    """The few numbers at the top: (number, words)."""
    evaluated = [run for run in runs if run.measured("l0") is not None]
    trained = sum(run.folder.state == "trained" for run in runs)
    several = len(runs) > 1
    found = [
        (f"{trained} of {len(runs)}", "runs trained") if several else (f"{trained}", "run trained")
    ]
    found += _range(evaluated, "l0", "L0", lambda value: f"{value:.3g}")
    found += _range(evaluated, "fvu", "FVU", lambda value: f"{value:.3f}")
    found += _range(evaluated, "delta_loss", "delta loss, nats", lambda value: f"{value:.3f}")
    tokens = max((run.trained("tokens") or 0 for run in runs), default=0)
    return [*found, (compact(tokens), "training tokens a run")]


def _range(
    runs: Sequence[ReportRun], metric: str, words: str, text: Callable[[float], str]
) -> list[tuple[str, str]]:
    values: list[Any] = [run.measured(metric) for run in runs]
    values = [value for value in values if value is not None]
    if not values:
        return []
    low, high = text(min(values)), text(max(values))
    return [(low if low == high else f"{low}–{high}", words)]


def compact(value: float) -> str:
    """1200000 -> '1.2M', 0.25 -> '0.25', 12.0 -> '12'."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            unit = 1e3 if suffix == "k" else limit
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"
