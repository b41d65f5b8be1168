"""The report's figures of what the paper measures beyond its headline, on the paper's axes.

Firing frequencies by width (figure 5), instruction-tuned models (4.5), subsets (4.6), precision
(4.7), uniformity of importance (C.3); each only where a run has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from sae_train.report.bars import RowBars, RowChart, render_rows
from sae_train.report.figures import ReportRun, frontier_chart
from sae_train.report.svg import Axis, Chart, Series, figure, render

_Numbers = Mapping[str, Any]


def published_sections(runs: Sequence[ReportRun], *, legend: str) -> str:
    """The sections there is something to show in, as HTML."""
    return "\n".join(
        section
        for section in (
            _widths(runs, legend=legend),
            _importance(runs, legend=legend),
            _subsets(runs, legend=legend),
            _precision(runs, legend=legend),
            _elsewhere(runs, legend=legend),
        )
        if section
    )


def _section(heading: str, note: str, figures: str, *, legend: str) -> str:
    return (
        f'<h2>{escape(heading)}</h2><p class="note">{note}</p>'
        f'<div class="charts">{figures}</div>{legend}'
    )


def width_charts(runs: Sequence[ReportRun]) -> dict[str, Chart]:
    """Histograms of runs that differ in width alone, one over the other, by what they share."""
    groups: dict[tuple[str, ...], list[ReportRun]] = {}
    for run in runs:
        sae = run.folder.config.sae
        if (run.folder.evaluation or {}).get("frequency_histogram"):
            shared = (f"{sae.site} of layer {sae.layer}", sae.architecture, run.pressure)
            groups.setdefault(shared, []).append(run)
    return {
        ", ".join(part for part in (shared[0], shared[2]) if part): _overlay(members)
        for shared, members in groups.items()
        if len({run.folder.config.sae.width for run in members}) > 1
    }


def _overlay(runs: Sequence[ReportRun]) -> Chart:
    series = []
    for run in sorted(runs, key=lambda run: run.folder.config.sae.width):
        histogram = (run.folder.evaluation or {})["frequency_histogram"]
        edges, counts = histogram["log10_edges"], histogram["counts"]
        width = run.folder.config.sae.width
        series.append(
            Series(
                x=[(a + b) / 2 for a, b in itertools.pairwise(edges)],
                y=[count / width for count in counts],
                color=run.color,
                key=run.key,
            )
        )
    return Chart(
        title="Firing frequencies by width",
        x=Axis("log10 of the fraction of tokens", tight=True),
        y=Axis("share of all latents", low=0.0),
        series=series,
    )


def _widths(runs: Sequence[ReportRun], *, legend: str) -> str:
    figures = "".join(figure(chart, heading=name) for name, chart in width_charts(runs).items())
    note = (
        "Latents by how often they fire, at one setting of the sparsity (figure 5 of the paper); "
        "those that never fired are left out."
    )
    return _section("Firing frequencies by width", note, figures, legend=legend) if figures else ""


def _importance(runs: Sequence[ReportRun], *, legend: str) -> str:
    if all(run.measured("importance_uniformity") is None for run in runs):
        return ""
    chart = frontier_chart(runs, metric="importance_uniformity", label="uniformity of importance")
    note = (
        "The share of a token's active latents that does the work, by attribution to the logit "
        "of the token that came (appendix C.3): 1 where all matter alike."
    )
    drawn = figure(chart, heading="Uniformity against L0")
    return _section("Importance of active latents", note, drawn, legend=legend)


def subset_charts(runs: Sequence[ReportRun]) -> list[RowChart]:
    """Delta loss, FVU and L0 by subset, a bar for each run; subsets from best to worst."""
    rows = {run.key: (run.folder.evaluation or {}).get("by_subset") or {} for run in runs}
    measured = [run for run in runs if rows[run.key]]
    names = dict.fromkeys(name for run in measured for name in rows[run.key])

    def mean(name: str) -> float:
        found = [rows[run.key].get(name, {}).get("delta_loss") for run in measured]
        values = [value for value in found if value is not None]
        return sum(values) / len(values) if values else float("inf")

    ordered = sorted(names, key=mean)
    return [
        RowChart(
            title=f"{label} by subset",
            axis=label,
            names=ordered,
            bars=[
                RowBars(
                    values=[rows[run.key].get(name, {}).get(metric) for name in ordered],
                    color=run.color,
                    key=run.key,
                    label=run.label,
                )
                for run in measured
            ],
        )
        for metric, label in (("delta_loss", "delta loss (nats)"), ("fvu", "FVU"), ("l0", "L0"))
        if any(rows[run.key][n].get(metric) is not None for run in measured for n in rows[run.key])
    ]


def _subsets(runs: Sequence[ReportRun], *, legend: str) -> str:
    figures = "".join(
        f"<figure><h3>{escape(chart.title[0].upper() + chart.title[1:])}</h3>"
        f"{render_rows(chart)}</figure>"
        for chart in subset_charts(runs)
    )
    note = "Held-out sequences of each subset of the text by themselves (section 4.6)."
    return _section("By subset", note, figures, legend=legend) if figures else ""


def compared_chart(
    runs: Sequence[ReportRun],
    *,
    metric: str,
    label: str,
    own: Callable[[ReportRun], _Numbers | None],
    other: Callable[[ReportRun], _Numbers | None],
    words: str,
) -> Chart:
    """`metric` against L0: full marks are `own`, hollow ones `other`."""
    series = []
    for run in runs:
        for numbers, hollow in ((own(run), False), (other(run), True)):
            values = numbers or {}
            l0, value = values.get("l0"), values.get(metric)
            if l0 is None or value is None:
                continue
            told = f"{run.label}{', ' + words if hollow else ''}: L0 {l0:.1f}, {label} {value:.4g}"
            series.append(
                Series(
                    x=[l0],
                    y=[value],
                    color=run.color,
                    key=run.key,
                    marks=True,
                    hollow=hollow,
                    titles=[told],
                )
            )
    low = 0.0 if all(y >= 0 for one in series for y in one.y) else None
    return Chart(
        title=f"{label} against L0",
        x=Axis("L0 (active latents per token)", log=True),
        y=Axis(label, low=low),
        series=series,
    )


def _compared(
    runs: Sequence[ReportRun],
    own: Callable[[ReportRun], _Numbers | None],
    other: Callable[[ReportRun], _Numbers | None],
    words: str,
) -> str:
    charts = [
        compared_chart(runs, metric=metric, label=label, own=own, other=other, words=words)
        for metric, label in (("delta_loss", "delta loss (nats)"), ("fvu", "FVU"))
    ]
    headings = ("Delta loss against L0", "Unexplained variance against L0")
    return "".join(
        f"<figure><h3>{escape(heading)}</h3>{render(chart)}</figure>"
        for heading, chart in zip(headings, charts, strict=True)
    )


def _row(run: ReportRun, precision: str) -> _Numbers | None:
    for row in (run.folder.evaluation or {}).get("by_precision") or []:
        if row["model"] == row["sae"] == precision:
            return row
    return None


def _precision(runs: Sequence[ReportRun], *, legend: str) -> str:
    measured = [run for run in runs if _row(run, "bfloat16") is not None]
    if not measured:
        return ""
    figures = _compared(
        measured,
        lambda run: _row(run, "float32"),
        lambda run: _row(run, "bfloat16"),
        "bfloat16",
    )
    note = "Full marks: language model and SAE in float32; hollow: both in bfloat16 (section 4.7)."
    return _section("Precision", note, figures, legend=legend) + _precision_table(measured)


def _precision_table(runs: Sequence[ReportRun]) -> str:
    kinds = [(model, sae) for model in ("float32", "bfloat16") for sae in ("float32", "bfloat16")]
    heads = "".join(f"<th>model {model}, SAE {sae}</th>" for model, sae in kinds)
    lines = []
    for run in runs:
        rows = (run.folder.evaluation or {})["by_precision"]
        found = {(row["model"], row["sae"]): row for row in rows}
        cells = "".join(f"<td>{_pair(found.get(kind))}</td>" for kind in kinds)
        lines.append(f"<tr><th>{escape(run.label)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>delta loss / FVU</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _pair(row: _Numbers | None) -> str:
    values = [] if row is None else [row.get("delta_loss"), row.get("fvu")]
    return " / ".join("–" if value is None else f"{value:.4f}" for value in values) or "–"


def _elsewhere(runs: Sequence[ReportRun], *, legend: str) -> str:
    sections = []
    for label in dict.fromkeys(label for run in runs for label in run.folder.elsewhere):
        measured = [run for run in runs if label in run.folder.elsewhere]
        figures = _compared(
            measured,
            lambda run: run.folder.evaluation,
            lambda run, label=label: run.folder.elsewhere.get(label),  # type: ignore[misc]
            label,
        )
        note = (
            "Full marks: in the model and on the text it was trained on; hollow: "
            f"<b>{escape(label)}</b> (section 4.5)."
        )
        sections.append(_section(f"In {label}", note, figures, legend=legend))
    return "\n".join(sections)
