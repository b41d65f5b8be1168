"""The report's figures of what the paper measures beyond its headline, on the paper's axes.

Firing frequencies by width (figure 5), instruction-tuned models (4.5), subsets (4.6), precision
(4.7), uniformity of importance (C.3); each only where a run has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from sae_train.report.charts import Axis, Charts, mark, row_bars
from sae_train.report.described_runs import ReportRun
from sae_train.report.figures import (
    FREQUENCY_AXIS,
    L0_AXIS,
    Numbers,
    frontier,
    has_histogram,
    histogram,
    numbers_hover,
)

LEGEND = '<ul class="legend"></ul>'  # the page's script fills it


def published_sections(charts: Charts, runs: Sequence[ReportRun]) -> str:
    """The sections there is something to show in, as HTML."""
    return "\n".join(
        [
            _widths(charts, runs),
            _importance(charts, runs),
            _subsets(charts, runs),
            _precision(charts, runs),
            _extra_evaluations(charts, runs),
        ]
    )


def section(heading: str, note: str, figures: str) -> str:
    """A section with a legend below its figures; nothing without figures. `note` is HTML."""
    if not figures:
        return ""
    return (
        f'<h2>{escape(heading)}</h2><p class="note">{note}</p>'
        f'<div class="charts">{figures}</div>{LEGEND}'
    )


def _widths(charts: Charts, runs: Sequence[ReportRun]) -> str:
    """Histograms of runs that differ in width alone, one over the other, by what they share."""
    groups: dict[tuple[str, ...], list[ReportRun]] = {}
    for run in runs:
        sae = run.folder.config.sae
        if has_histogram(run):
            shared = (f"{sae.site} of layer {sae.layer}", sae.architecture, run.sparsity)
            groups.setdefault(shared, []).append(run)
    figures = ""
    for (tap, _, sparsity), members in groups.items():
        widths = {run.key: run.folder.config.sae.width for run in members}
        if len(set(widths.values())) > 1:
            figures += charts.figure(
                ", ".join(part for part in (tap, sparsity) if part),
                [histogram(run, of=widths[run.key]) for run in members],
                x=FREQUENCY_AXIS,
                y=Axis("share of all latents", zero=True, ticks="~%"),
            )
    note = (
        "Latents by how often they fire, at one setting of the sparsity (figure 5 of the paper); "
        "those that never fired are left out."
    )
    return section("Firing frequencies by width", note, figures)


def _importance(charts: Charts, runs: Sequence[ReportRun]) -> str:
    if all(run.measured("importance_uniformity") is None for run in runs):
        return ""
    drawn = frontier(
        charts,
        runs,
        heading="Uniformity against L0",
        metric="importance_uniformity",
        label="uniformity of importance",
    )
    note = (
        "The share of a token's active latents that does the work, by attribution to the "
        "mean-centred logit of the target token (appendix C.3): 1 where all matter alike."
    )
    return section("Importance of active latents", note, drawn)


def _subsets(charts: Charts, runs: Sequence[ReportRun]) -> str:
    """Delta loss, FVU and L0 by subset, a bar for each run; subsets from best to worst."""
    rows = {run.key: (run.folder.evaluation or {}).get("by_subset") or {} for run in runs}
    measured = [run for run in runs if rows[run.key]]

    def values(name: str, metric: str) -> list[float]:
        found = [rows[run.key].get(name, {}).get(metric) for run in measured]
        return [value for value in found if value is not None]

    def mean_delta_loss(name: str) -> float:
        found = values(name, "delta_loss")
        return sum(found) / len(found) if found else float("inf")

    names = sorted(dict.fromkeys(n for run in measured for n in rows[run.key]), key=mean_delta_loss)
    figures = ""
    for metric, label in (("delta_loss", "delta loss (nats)"), ("fvu", "FVU"), ("l0", "L0")):
        if any(values(name, metric) for name in names):
            bars = [
                row_bars(run, {n: rows[run.key].get(n, {}).get(metric) for n in names}, label=label)
                for run in measured
            ]
            heading = f"{label[0].upper()}{label[1:]} by subset"
            figures += charts.figure(
                heading, bars, x=Axis(label, zero=True), y=Axis(""), rows=names
            )
    note = "Held-out sequences of each subset of the text by themselves (section 4.6)."
    return section("By subset", note, figures)


def _compared(
    charts: Charts,
    runs: Sequence[ReportRun],
    own: Callable[[ReportRun], Numbers | None],
    other: Callable[[ReportRun], Numbers | None],
    words: str,
) -> str:
    """Delta loss and FVU against L0: full marks are `own`, hollow ones `other`."""
    figures = ""
    for metric, label, heading in (
        ("delta_loss", "delta loss (nats)", "Delta loss against L0"),
        ("fvu", "FVU", "Unexplained variance against L0"),
    ):
        traces, values = [], []
        for run in runs:
            for numbers, hollow in ((own(run) or {}, False), (other(run) or {}, True)):
                l0, value = numbers.get("l0"), numbers.get(metric)
                if l0 is None or value is None:
                    continue
                values.append(value)
                name = f"{run.label}, {words}" if hollow else run.label
                traces.append(
                    mark(
                        run,
                        (l0, value),
                        hover=numbers_hover(name, numbers),
                        hollow=hollow,
                    )
                )
        y = Axis(label, zero=min(values, default=0) >= 0)
        figures += charts.figure(heading, traces, x=L0_AXIS, y=y)
    return figures


def _row(run: ReportRun, precision: str) -> Numbers | None:
    for row in (run.folder.evaluation or {}).get("by_precision") or []:
        if row["model"] == row["sae"] == precision:
            return row
    return None


def _precision(charts: Charts, runs: Sequence[ReportRun]) -> str:
    measured = [run for run in runs if _row(run, "bfloat16") is not None]
    if not measured:
        return ""
    figures = _compared(
        charts,
        measured,
        lambda run: _row(run, "float32"),
        lambda run: _row(run, "bfloat16"),
        "bfloat16",
    )
    note = "Full marks: language model and SAE in float32; hollow: both in bfloat16 (section 4.7)."
    return section("Precision", note, figures) + _precision_table(measured)


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


def _pair(row: Numbers | None) -> str:
    values = [] if row is None else [row.get("delta_loss"), row.get("fvu")]
    return " / ".join("–" if value is None else f"{value:.4f}" for value in values) or "–"


def _extra_evaluations(charts: Charts, runs: Sequence[ReportRun]) -> str:
    sections = []
    for label in dict.fromkeys(label for run in runs for label in run.folder.extra_evaluations):
        measured = [run for run in runs if label in run.folder.extra_evaluations]
        figures = _compared(
            charts,
            measured,
            lambda run: run.folder.evaluation,
            lambda run, label=label: run.folder.extra_evaluations.get(label),  # type: ignore[misc]
            label,
        )
        note = (
            "Full marks: in the model and on the text it was trained on; hollow: "
            f"<b>{escape(label)}</b> (section 4.5)."
        )
        sections.append(section(f"In {label}", note, figures))
    return "\n".join(sections)
