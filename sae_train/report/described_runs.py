"""The runs as the report shows them: what tells each from the others, its family, its colour."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sae_train.config.file import differing_fields, value_at
from sae_train.config.run import Config
from sae_train.recipe.fill import CHOSE
from sae_train.runs.folder import RunFolder

# Settings that make an SAE sparse: runs that differ in these alone form one frontier.
_SPARSITY = ("train.sparsity.", "sae.k")
# Settings that may differ between any two runs and tell a reader nothing.
_OWN = ("name", "output", "cache", "mesh")
# Dense to sparse: blue to red, each legible on white and on near-black.
_PALETTE = (
    (66, 99, 214),
    (26, 147, 178),
    (35, 160, 110),
    (151, 160, 40),
    (222, 140, 40),
    (205, 70, 70),
)
# Of the families, in turn: plotly's name for a mark, and a letter that looks like it.
SYMBOLS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "triangle-down": "▼",
    "star": "★",
    "cross": "✚",
    "x": "✖",
}


@dataclass(frozen=True)
class ReportRun:
    """A run as the report shows it.

    Attributes:
        label: what tells it from the others, short.
        family: runs of one family differ only in the settings that make them sparse; the frontier
            joins them with a line.
        sparsity: those settings, which tell it from its family.
        color: `#rrggbb`.
        symbol: of its family's marks, a key of `SYMBOLS`.
    """

    folder: RunFolder
    label: str
    family: str
    sparsity: str
    color: str
    symbol: str

    @property
    def key(self) -> str:
        """What the page's script calls the run: its config's name."""
        return self.folder.config.name

    def measured(self, name: str) -> float | None:
        """A number of evaluation.json."""
        value = (self.folder.evaluation or {}).get(name)
        return float(value) if isinstance(value, int | float) else None

    def trained(self, name: str) -> float | None:
        """A number of the last row of metrics.jsonl."""
        value = self.folder.metrics[-1].get(name) if self.folder.metrics else None
        return float(value) if isinstance(value, int | float) else None


def describe_runs(folders: Sequence[RunFolder]) -> list[ReportRun]:
    """Give each run a label, a family and a colour; families together, from dense to sparse."""
    differing = _differing([run.config for run in folders])
    if "sae.architecture" in differing:  # which decides the penalty
        differing = [key for key in differing if key != "train.sparsity.penalty"]
    sparsity = [key for key in differing if key.startswith(_SPARSITY)]
    rest = [key for key in differing if key not in sparsity]
    differing = rest + sparsity
    families = list(dict.fromkeys(_settings(run.config, rest) for run in folders))
    ordered = sorted(
        folders,
        key=lambda run: (families.index(_settings(run.config, rest)), _sparsity_order(run)),
    )
    symbols = dict(zip(families, itertools.cycle(SYMBOLS)))
    return [
        ReportRun(
            folder=run,
            label=_settings(run.config, differing) or run.config.name,
            family=_settings(run.config, rest),
            sparsity=_settings(run.config, sparsity),
            color=color,
            symbol=symbols[_settings(run.config, rest)],
        )
        for run, color in zip(ordered, palette(len(ordered)), strict=True)
    ]


def families_of(runs: Sequence[ReportRun]) -> dict[str, list[ReportRun]]:
    """The runs by family, in their order."""
    found: dict[str, list[ReportRun]] = {}
    for run in runs:
        found.setdefault(run.family, []).append(run)
    return found


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


def _sparsity_order(run: RunFolder) -> tuple[float, str]:
    measured = (run.evaluation or {}).get("l0")
    if measured is None and run.metrics:
        measured = run.metrics[-1].get("l0")
    return (-measured if measured is not None else 0.0, run.name)


def _differing(configs: Sequence[Config]) -> list[str]:
    keys: dict[str, None] = {}
    for config in configs[1:]:
        keys.update(dict.fromkeys(differing_fields(configs[0], config)))
    return [key for key in keys if key.partition(".")[0] not in _OWN and key != CHOSE]


def _settings(config: Config, keys: Sequence[str]) -> str:
    names = [key.rpartition(".")[2] for key in keys]
    words = []
    for key, name in zip(keys, names, strict=True):
        value = value_at(config, key)
        if name == "layer" and "sae.site" in keys:
            continue  # the site's name holds it
        if key == "sae.site":
            words.append(config.sae.tap.name)
        elif value is not None:
            short = {"coefficient": "λ", "target": "target"}.get(name, name)
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            words.append(f"{short}\u00a0{shown}")
    return ", ".join(words)
