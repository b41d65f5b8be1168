"""probe.json: the scores of one SAE on each data set, and their means (docs/probing.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath
from activation_cache.storage.records import FORMAT_VERSION, read_record, write_record

FILE = "probe.json"
RAW = "raw"  # among the k: a probe on the activations themselves

Measure = Literal["f1", "accuracy", "auc"]
MEASURES: tuple[Measure, ...] = ("f1", "accuracy", "auc")


class Scores(BaseModel):
    """The scores of one kind of probe on one data set, a number for each split."""

    f1: list[float]
    accuracy: list[float]
    auc: list[float]


class DataSetScores(BaseModel):
    """What was found on one data set.

    Attributes:
        digest: SHA-256 of its file.
        rows, train, test: how many were read, and how many are in the parts of each split.
        probes: by k as text, and `raw`, the probe on the activations.
        latents: of each split the latents by rank, as many as the largest k.
    """

    digest: str
    rows: int
    train: int
    test: int
    probes: dict[str, Scores]
    latents: list[list[int]]


class ProbeRecord(BaseModel):
    """The file.

    Attributes:
        settings: k, splits, rows and max_tokens of the section `probe`.
        fingerprints: of the SAE and of the model.
        means: for each kind of probe and each measure the mean over data sets: its mean over the
            splits, and their sample standard deviation (0 for one split).
    """

    format_version: int = FORMAT_VERSION
    name: str
    step: int
    model: str
    tap: str
    width: int
    settings: dict[str, Any]
    fingerprints: dict[str, str]
    data_sets: dict[str, DataSetScores]
    means: dict[str, dict[str, tuple[float, float]]]


def means_of(data_sets: Mapping[str, DataSetScores]) -> dict[str, dict[str, tuple[float, float]]]:
    """`ProbeRecord.means` of what was found."""
    kinds = list(next(iter(data_sets.values())).probes) if data_sets else []

    def over_splits(kind: str, measure: Measure) -> tuple[float, float]:
        values = np.array([getattr(one.probes[kind], measure) for one in data_sets.values()])
        per_split = values.mean(axis=0)
        spread = per_split.std(ddof=1) if len(per_split) > 1 else 0.0
        return float(per_split.mean()), float(spread)

    return {kind: {one: over_splits(kind, one) for one in MEASURES} for kind in kinds}


def read_probe(folder: StoragePath) -> ProbeRecord | None:
    """The record in a run's folder; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / FILE
    return read_record(path, ProbeRecord) if path.is_file() else None


def continued(folder: StoragePath, fresh: ProbeRecord) -> ProbeRecord:
    """The record in a run's folder if it goes on with this SAE, model and settings, else `fresh`.

    A damaged one is made anew.
    """
    try:
        found = read_probe(folder)
    except UserError:
        found = None
    if found is None or (found.settings, found.fingerprints) != (
        fresh.settings,
        fresh.fingerprints,
    ):
        return fresh
    return found


def write_probe(folder: StoragePath, record: ProbeRecord) -> ProbeRecord:
    """Write a record with the means of its data sets, atomically; returns it with them."""
    written = record.model_copy(update={"means": means_of(record.data_sets)})
    write_record(folder / FILE, written)
    return written
