"""The tables of docs/results.md, from the records: all trainers at the same L0s, and who is ahead.

A trainer's SAEs of one tap and seed make a curve over the logarithm of L0, straight between
neighbours: FVU (three ways) in its logarithm, delta loss and alive as they are. A curve is read up
to a factor of 1.3 beyond its ends, and not further.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.methods import METHODS, OURS
from benchmarks.quality.results import Record, Results, matching
from benchmarks.quality.stores import LAYER, TAPS
from benchmarks.quality.study import TARGETS, chosen, table_records
from benchmarks.support.measure import markdown

BEYOND = 1.3


@dataclass(frozen=True)
class At:
    """What a trainer's curve of one seed has at an L0."""

    fvu: float
    median_fvu: float
    typical_fvu: float
    delta_loss: float
    alive: float
    delta_by_sequence: tuple[float, ...]


def at_l0(records: Sequence[Record], l0: float) -> At | None:
    """The curve of one tap and seed at an L0; None where it doesn't reach."""
    records = sorted((one for one in records if one.score.l0 > 0), key=lambda one: one.score.l0)
    if not records:
        return None
    logs = np.log([one.score.l0 for one in records])
    wanted = np.log(l0)
    if not logs[0] - np.log(BEYOND) <= wanted <= logs[-1] + np.log(BEYOND):
        return None
    right = int(np.clip(np.searchsorted(logs, wanted), min(1, len(logs) - 1), len(logs) - 1))
    left = max(0, right - 1)
    share = 0.0 if logs[left] == logs[right] else (wanted - logs[left]) / (logs[right] - logs[left])
    a_V, b_V = _vector(records[left]), _vector(records[right])
    found_V = (1 - share) * a_V + share * b_V
    return At(*np.exp(found_V[:3]), *found_V[3:5], tuple(found_V[5:]))


def _vector(record: Record) -> np.ndarray:
    score = record.score
    errors = np.log([score.fvu, score.median_fvu, score.typical_fvu])
    return np.array([*errors, score.delta_loss, score.alive, *score.delta_by_sequence])


class Curves:
    """All trainers' curves, with the settings chosen."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.records = {one.name: table_records(results, one.name) for one in METHODS}

    def at(self, trainer: str, site: str, text: str, l0: float) -> list[At]:
        """One for each seed whose curve reaches the L0."""
        own = matching(self.records[trainer], site=site, text=text)
        seeds = sorted({record.seed for record in own})
        found = [at_l0(matching(own, seed=seed), l0) for seed in seeds]
        return [one for one in found if one is not None]


def settings_table(results: Results) -> str:
    """What was tried for every trainer, in order, and what was chosen."""
    head = ["trainer", "settings", "L0", "FVU", "delta loss", "alive", "chosen"]
    lines = []
    for method in METHODS:
        best = chosen(results, method.name)
        for record in results.of(phase="search", trainer=method.name):
            score = record.score
            told = json.dumps(record.settings).strip("{}").replace('"', "")
            cells = [method.name, told or "the short recipe as it is"]
            cells += [f"{score.l0:.1f}", f"{score.fvu:.4f}", f"{score.delta_loss:.3f}"]
            mark = "yes" if record.settings == best else ""
            lines.append([*cells, f"{score.alive:.0%}", mark])
    return markdown(head, lines)


def tap_table(curves: Curves, site: str, text: str) -> str:
    """All trainers on one tap and text; cells at L0 20, 50 and 100."""
    head = ["trainer", "FVU", "median token's FVU", "FVU without outlying rows"]
    head += ["delta loss", "alive", "L0 measured", "seeds"]
    lines = []
    for method in METHODS:
        found = [curves.at(method.name, site, text, l0) for l0 in TARGETS]
        own = matching(curves.records[method.name], site=site, text=text)
        if not own:
            continue
        cells = [method.name]
        cells += [_cell(found, name, "{:.4f}") for name in ("fvu", "median_fvu", "typical_fvu")]
        cells += [_cell(found, "delta_loss", "{:.3f}"), _cell(found, "alive", "{:.0%}")]
        measured = sorted(one.score.l0 for one in own if one.seed == min(r.seed for r in own))
        cells.append(" / ".join(f"{one:.1f}" for one in measured))
        lines.append([*cells, " / ".join(str(len(one)) for one in found)])
    return markdown(head, lines)


def _cell(found: Sequence[Sequence[At]], name: str, form: str) -> str:
    """Means over seeds at the three L0s, each with the largest distance of a seed from it."""
    texts = []
    for at_one in found:
        values = np.array([getattr(one, name) for one in at_one])
        if not len(values):
            texts.append("-")
            continue
        text = form.format(values.mean())
        if len(values) > 1 and name != "alive":
            text += " ± " + form.format(np.abs(values - values.mean()).max())
        texts.append(text)
    return " / ".join(texts)


def ahead_table(curves: Curves, ours: str) -> str:
    """Ours against the best other trainer of each tap, text and L0; one by FVU, one by delta loss.

    Ratios are those of the means over seeds, in brackets the lowest and the highest of a seed; ± is
    the standard error over sequences of the difference in delta loss, of the first seed. The last
    line has the geometric means of all ratios.
    """
    head = ["tap", "text", "L0", "FVU against the best", "delta loss against the best", "alive"]
    lines, logs = [], []
    for site, text in TAPS:
        for l0 in TARGETS:
            own = curves.at(ours, site, text, l0)
            others = {
                method.name: found
                for method in METHODS
                if method.name not in OURS and (found := curves.at(method.name, site, text, l0))
            }
            if not own or not others:
                continue
            by_fvu = min(others, key=lambda name: _mean(others[name], "fvu"))
            by_loss = min(others, key=lambda name: _mean(others[name], "delta_loss"))
            loss, best = _mean(own, "delta_loss"), _mean(others[by_loss], "delta_loss")
            pairs = zip(own[0].delta_by_sequence, others[by_loss][0].delta_by_sequence, strict=True)
            apart = np.array([one - other for one, other in pairs])
            error = apart.std(ddof=1) / np.sqrt(len(apart))
            cells = [site, text, str(l0), f"{_ratio(own, others[by_fvu], 'fvu')}: {by_fvu}"]
            share = _ratio(own, others[by_loss], "delta_loss")
            cells.append(f"{share}: {loss:.3f}, {best:.3f} ± {error:.3f}, {by_loss}")
            lines.append([*cells, f"{_mean(own, 'alive'):.0%}"])
            ratios = [_mean(own, "fvu") / _mean(others[by_fvu], "fvu"), loss / best]
            logs.append(np.log(ratios) if min(ratios) > 0 else [np.nan, np.nan])
    if not lines:
        return ""
    means = [f"{one:+.0%}" for one in np.expm1(np.nanmean(logs, axis=0))]
    return markdown(head, [*lines, ["all", "", "", *means, ""]])


def _ratio(own: Sequence[At], others: Sequence[At], name: str) -> str:
    """How far ours is above the other, of the means and, if both have the same seeds, by seed."""
    if _mean(others, name) <= 0:
        return "-"
    text = f"{_mean(own, name) / _mean(others, name) - 1:+.0%}"
    if len(own) != len(others) or len(own) < 2:
        return text
    pairs = zip(own, others, strict=True)
    shares = [getattr(a, name) / getattr(b, name) - 1 for a, b in pairs if getattr(b, name) > 0]
    return f"{text} ({min(shares):+.0%} to {max(shares):+.0%})"


def _mean(found: Sequence[At], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in found]))


def report(results: Results) -> str:
    """All tables, as docs/results.md has them, and how long the training of what is there took."""
    curves = Curves(results)
    parts = []
    for ours in OURS:
        table = ahead_table(curves, ours)
        title = f"### {ours[0].upper()}{ours[1:]}: against the best other trainer"
        parts += [title, table or "Nothing to compare yet."]
    for site, text in TAPS:
        if results.of(site=site, text=text):
            title = f"### `{site}.{LAYER}`, {text}, at L0 {' / '.join(map(str, TARGETS))}"
            parts += [title, tap_table(curves, site, text)]
    parts += ["### Settings tried and chosen", settings_table(results)]
    hours = sum(one.seconds for one in results.records) / 3600
    parts.append(f"{len(results.records)} SAEs, {hours:.2f} hours of CPU time in training.")
    return "\n\n".join(parts)
