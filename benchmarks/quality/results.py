"""results.jsonl: a line for every SAE, which lies beside it; what is there isn't done again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from benchmarks.quality.measure import Score
from sae_train.inference.sae import TENSORS, Sae

Settings = Mapping[str, Any]
Phase = Literal["search", "grid"]


@dataclass(frozen=True)
class Record:
    """One SAE: what it is of, with which settings it was trained, and what it does.

    Attributes:
        phase: whether it tried settings or belongs to the table.
        target: the L0 that was asked for, and `aim` how: k, a target, a coefficient.
        settings: all others.
        seconds: of CPU time that training took.
    """

    phase: Phase
    trainer: str
    site: str
    text: str
    seed: int
    target: int
    settings: Settings
    aim: Settings
    score: Score
    seconds: float


class Results:
    """The records of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "results.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self.records = [_read(json.loads(line)) for line in lines]
        self._files = [json.loads(line)["sae"] for line in lines]

    def add(self, record: Record, sae: Sae) -> None:
        """Write the SAE, then its line."""
        trainer = record.trainer.replace(",", "").replace(" ", "_")
        name = f"{len(self.records):04d}-{trainer}-{record.site}-{record.text}"
        path = self.folder / "saes" / f"{name}-{record.target}-{record.seed}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        k = {} if sae.k is None else {"k": np.array(sae.k)}
        np.savez(path, **{one: np.asarray(getattr(sae, one)) for one in TENSORS}, **k)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(record) | {"sae": path.name}) + "\n")
        self.records.append(record)
        self._files.append(path.name)

    def sae(self, record: Record) -> Sae:
        """The SAE of one of the records."""
        name = self._files[self.records.index(record)]
        with np.load(self.folder / "saes" / name) as tensors:
            k = int(tensors["k"]) if "k" in tensors else None
            return Sae(**{one: jnp.asarray(tensors[one]) for one in TENSORS}, k=k)

    def of(self, **wanted: Any) -> list[Record]:
        """The records whose fields have these values."""
        return matching(self.records, **wanted)


def matching(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records whose fields have these values."""
    return [
        record
        for record in records
        if all(getattr(record, name) == value for name, value in wanted.items())
    ]


def _read(line: dict[str, Any]) -> Record:
    fields = {name: line[name] for name in Record.__dataclass_fields__}
    by_sequence = tuple(line["score"]["delta_by_sequence"])
    score = Score(**(line["score"] | {"delta_by_sequence": by_sequence}))
    return Record(**(fields | {"score": score}))
