"""The report's table of probes: what `sae probe` found, one row per run that has a probe.json."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sae_train.probe.record import RAW, ProbeRecord, read_probe
from sae_train.report.described_runs import ReportRun

_NOTE = (
    "Logistic regressions on the k best latents and, for comparison, on the activations "
    "themselves, scored on rows they weren't fitted on: means over data sets, ± the standard "
    "deviation over splits of the rows."
)


def probe_section(runs: Sequence[ReportRun]) -> str:
    """The section; empty where no run was probed.

    Raises:
        UserError: a probe.json is damaged.
    """
    found = [(run, record) for run in runs if (record := read_probe(run.folder.path))]
    if not found:
        return ""
    kinds = list(dict.fromkeys(kind for _, record in found for kind in record.means))
    heads = "".join(f"<th>{'activations' if kind == RAW else f'k = {kind}'}</th>" for kind in kinds)
    rows = "".join(_row(run, record, kinds) for run, record in found)
    return (
        f'<h2>Probes</h2><p class="note">{_NOTE}</p><div class="scroll"><table><thead><tr>'
        f"<th>run</th><th>data sets</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(run: ReportRun, record: ProbeRecord, kinds: Sequence[str]) -> str:
    cells = "".join(f"<td>{_cell(record, kind)}</td>" for kind in kinds)
    stale = " (of an earlier step)" if record.step != (run.folder.checkpoint_step or 0) else ""
    return f"<tr><th>{escape(run.label)}{stale}</th><td>{len(record.data_sets)}</td>{cells}</tr>"


def _cell(record: ProbeRecord, kind: str) -> str:
    means = record.means.get(kind)
    if means is None:
        return "–"
    (auc, auc_spread), (f1, _) = means["auc"], means["f1"]
    return f"AUC {auc:.3f} ± {auc_spread:.3f}, F1 {f1:.3f}"
