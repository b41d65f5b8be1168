"""The SAEs that the browser shows: those of the given folders, with what was measured of each."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import AnyPath, StoragePath, storage_path
from sae_train.config.file import FILE_NAME
from sae_train.latents.reader import Latents, has_latents, open_latents
from sae_train.report.described_runs import describe_runs
from sae_train.runs.folder import read_run, run_folders

# In this order: the first that an explanation has is its score. `sae explain` writes them.
_SCORES = (
    ("detection", "balanced_accuracy"),
    ("fuzzing", "balanced_accuracy"),
    ("simulation", "correlation"),
)
_MEASURED = (
    "l0", "fvu", "fvu_without_outlying", "fvu_median_token", "delta_loss", "loss_recovered",
    "alive_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """An SAE in the browser.

    Attributes:
        id: its part of an address.
        label: what tells it from the others.
        color: `#rrggbb`, as in the report.
        measured: numbers of evaluation.json; None where it isn't measured.
        latents: None where `sae latents` hasn't run.
    """

    id: str
    folder: StoragePath
    name: str
    label: str
    color: str
    measured: dict[str, float | None]
    latents: Latents | None

    def facts(self) -> dict[str, Any]:
        """What the first page says of it."""
        facts: dict[str, Any] = {"id": self.id, "name": self.name, "label": self.label}
        facts["color"] = self.color
        facts |= {"folder": str(self.folder), **self.measured}
        if self.latents is not None:
            record = self.latents.record
            keys = ("model", "site", "layer", "target", "architecture", "width", "alive", "tokens")
            facts |= {key: getattr(record, key) for key in keys}
            facts |= {"explained": len(self.latents.explanations), "sequences": record.sequences}
            facts["mean_abs_cosine"] = record.mean_abs_cosine
        return facts


def catalogue(folders: Sequence[AnyPath]) -> list[Shown]:
    """The SAEs of runs, sweeps and suites, and of lone `latents` folders.

    Raises:
        UserError: a folder is none of these, or no SAE of all has latents.
    """
    found: list[Shown] = []
    for folder in folders:
        found += _shown(storage_path(folder), several=len(folders) > 1)
    if not any(one.latents is not None for one in found):
        names = " ".join(str(folder) for folder in folders)
        raise UserError(f"{names} holds no latents yet: write them with `sae latents {names}`")
    if len({one.label for one in found}) < len(found):  # runs of several sweeps
        found = [dataclasses.replace(one, label=one.name) for one in found]
    return found


def _shown(folder: StoragePath, *, several: bool) -> list[Shown]:
    if not (folder / FILE_NAME).is_file():
        latents = open_latents(folder)
        name = latents.name
        return [Shown(_slug(name), folder, name, name, "#4263d6", {}, latents)]
    runs = describe_runs([read_run(path) for path in run_folders(folder)])
    shown = []
    for run in runs:
        path = run.folder.path
        inside = str(path)[len(str(folder)) + 1 :] or path.name
        name = f"{folder.name}/{inside}" if several and inside != folder.name else inside
        shown.append(
            Shown(
                id=_slug(name),
                folder=path,
                name=name,
                label=run.label,
                color=run.color,
                measured={key: _finite(run.measured(key)) for key in _MEASURED},
                latents=open_latents(path) if has_latents(path) else None,
            )
        )
    return shown


def _slug(name: str) -> str:
    """A name in an address: `/` would be a folder of it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "~", name)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def index(shown: Sequence[Shown], *, live: bool) -> dict[str, Any]:
    """The first page's JSON."""
    return {"live": live, "saes": [one.facts() for one in shown]}


def score_of(scores: Mapping[str, Any]) -> float | None:
    """The number that explanations are sorted by, of an explanation's `scores`."""
    for kind, measure in _SCORES:
        value = (scores.get(kind) or {}).get(measure)
        if isinstance(value, int | float):
            return float(value)
    return None


def latent_json(shown: Sequence[Shown], one: Shown, latent: int) -> dict[str, Any]:
    """Everything about a latent; its neighbours carry the `id` of an SAE that is shown.

    Raises:
        UserError: there is no such latent.
    """
    assert one.latents is not None
    found = _plain(one.latents[latent])
    ids = _ids_of_neighbours(shown, one)
    for key in ("neighbours", "encoder_neighbours"):
        found[key] = [row | {"id": ids.get(row["sae"])} for row in found[key]]
    return found | {"width": len(one.latents)}


def _ids_of_neighbours(shown: Sequence[Shown], one: Shown) -> dict[str, str]:
    """By the name in the record, the id of each SAE that is shown with its latents."""
    assert one.latents is not None
    by_fingerprint = {
        other.latents.record.saes[0].fingerprint: other.id
        for other in shown
        if other.latents is not None
    }
    entries = one.latents.record.saes
    found = {
        entry.name: by_fingerprint[entry.fingerprint]
        for entry in entries
        if entry.fingerprint in by_fingerprint
    }
    return found | {entries[0].name: one.id}


def _plain(value: Any) -> Any:
    """What JSON carries, at six significant digits: more than is shown and half of the bytes."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    return value
