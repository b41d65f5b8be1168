"""The parts in which an SAE's latents are computed, and the files they are joined to.

A part is a range of latents: those whose firings fit in memory together, or so many rows of
weights. Each is written to a file of its own, so that a killed command goes on with the next.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from activation_cache.storage.files import StoragePath, on_disk, remove_tree, replacing
from activation_cache.storage.records import write_record
from sae_train.latents import schema
from sae_train.latents.activity import Activity, Cofiring
from sae_train.latents.contexts import Window, context_rows, window_rows
from sae_train.latents.directions import Readout, directed
from sae_train.latents.firings import Shards, shard_file
from sae_train.latents.job import LatentsJob
from sae_train.latents.schema import (
    ACTIVITY,
    CONTEXTS,
    DIRECTIONS,
    RECORD,
    SUMMARY,
    Record,
    SaeEntry,
)
from sae_train.latents.walk import Text
from sae_train.latents.writer import write_table, write_vocabulary, write_windows

COFIRING_FIRINGS = 2**25  # of the first shards: co-firing is counted on them

_ABS_COSINE, _ABS_ENCODER_COSINE = b"abs_cosine", b"abs_encoder_cosine"
LoadReadout = Callable[[], Readout]


def others_of(one: LatentsJob, jobs: Sequence[LatentsJob]) -> list[LatentsJob]:
    """The other SAEs whose decoder's rows are of the same space: same model, same place."""
    return [
        other
        for other in jobs
        if other is not one
        and other.job.folder != one.job.folder
        and other.job.target == one.job.target
        and other.job.fingerprints["model"] == one.job.fingerprints["model"]
    ]


@contextlib.contextmanager
def opened_parts(saes: Sequence[LatentsJob], text: Text, readout: LoadReadout) -> Iterator[Parts]:
    """An SAE's parts, its firings at hand; those in a bucket are on this machine meanwhile."""
    scratch = saes[0].scratch
    names = tuple(shard_file(scratch, number).name for number in range(text.num_shards))
    with on_disk(scratch, names) as folder:
        yield Parts(saes, text, readout, Shards(folder, text.first_rows, width=saes[0].width))


@dataclass(frozen=True)
class Unit:
    """A range of latents, and what is computed of them."""

    kind: Literal["activity", "directions"]
    latents: range


@dataclass(frozen=True)
class Parts:
    """One SAE's parts.

    Attributes:
        saes: the SAE itself, then the others in which neighbours are looked for.
        readout: the model's; only asked for parts of weights that are missing.
    """

    saes: Sequence[LatentsJob]
    text: Text
    readout: LoadReadout
    shards: Shards

    @property
    def one(self) -> LatentsJob:
        """The SAE."""
        return self.saes[0]

    @property
    def units(self) -> list[Unit]:
        """All parts, the same in every process."""
        width = self.one.width
        size = schema.PART_ROWS
        rows = (range(begin, min(begin + size, width)) for begin in range(0, width, size))
        return [
            *(Unit("activity", latents) for latents in self._tiles()),
            *(Unit("directions", latents) for latents in rows),
        ]

    def _tiles(self) -> Iterator[range]:
        """Ranges of at most `PART_FIRINGS` and `PART_CONTEXT_TOKENS`; one latent at least."""
        counts, settings = self.shards.counts, self.one.settings
        contexts = np.minimum(counts, settings.top)
        contexts += np.minimum(counts, schema.INTERVALS * settings.per_interval)
        limits = (
            (np.cumsum(counts), schema.PART_FIRINGS),
            (np.cumsum(contexts * settings.context), schema.PART_CONTEXT_TOKENS),
        )
        begin = 0
        while begin < len(counts):
            end = len(counts)
            for ends, most in limits:
                before = ends[begin - 1] if begin else 0
                end = min(end, int(np.searchsorted(ends, before + most, side="right")))
            yield range(begin, max(end, begin + 1))
            begin = max(end, begin + 1)

    def file(self, kind: str, latents: range) -> StoragePath:
        """The file of a part; that of directions also depends on the other SAEs."""
        among = f"-{self._identity}" if kind == "directions" else ""
        return self.one.scratch / f"{kind}{among}-{latents.start:08d}.arrow"

    @cached_property
    def _identity(self) -> str:
        named = [(one.name, one.job.fingerprints["sae"]) for one in self.saes]
        # Parts of earlier versions, whose histograms were of float32's logits, are not continued.
        return hashlib.sha256(repr(("bfloat16", named)).encode()).hexdigest()[:16]

    def compute(self, unit: Unit) -> None:
        """Write a part, unless it is there."""
        if self.file(unit.kind, unit.latents).is_file():
            return
        if unit.kind == "directions":
            found = directed(self.one, self.saes[1:], self.readout(), unit.latents)
            sums = {
                _ABS_COSINE: repr(found.abs_cosine),
                _ABS_ENCODER_COSINE: repr(found.abs_encoder_cosine),
            }
            _write(self.file(unit.kind, unit.latents), found.rows.replace_schema_metadata(sums))
            return
        activity = Activity(
            first=unit.latents.start,
            firings=self.shards.read(unit.latents),
            tokens=self.text.tokens.reshape(-1),
            token_counts=self._token_counts,
        )
        settings = self.one.settings
        contexts = context_rows(
            activity,
            self._window,
            top=settings.top,
            per_interval=settings.per_interval,
            subsets=self._subsets,
            subset_names=self.one.job.table.summary.subsets,
        )
        _write(self.file("contexts", unit.latents), contexts)
        rows = activity.rows(self._cofiring)
        rows = rows.append_column("count", pa.array(activity.counts))
        rows = rows.append_column("mean", pa.array(activity.means.astype(np.float32)))
        _write(self.file(unit.kind, unit.latents), rows)

    @cached_property
    def _token_counts(self) -> np.ndarray:
        return np.bincount(self.text.tokens[self.text.usable])

    @cached_property
    def _subsets(self) -> np.ndarray:
        return self.one.job.table.subset_of(self.one.sequences)

    @cached_property
    def _window(self) -> Window:
        tokens, table = self.text.tokens, self.one.job.table
        real = tokens != table.summary.special_ids.pad
        return Window(
            sequence_length=self.text.length,
            first_sequence=self.text.sequences.start,
            ends=tokens.shape[1] - np.argmax(real[:, ::-1], axis=1),
            begins=(tokens[:, 0] == table.summary.special_ids.bos).astype(np.int64),
            size=self.one.settings.context,
            alone=self.one.of_embedding,
        )

    @cached_property
    def cofiring_shards(self) -> int:
        """How many shards co-firing is counted on."""
        sizes = np.cumsum([self.shards.firings_of(n) for n in range(self.text.num_shards)])
        return max(1, int(np.searchsorted(sizes, COFIRING_FIRINGS, side="right")))

    @cached_property
    def _cofiring(self) -> Cofiring:
        shards = range(self.cofiring_shards)
        return Cofiring(self.shards.by_row(shards, num_rows=self.text.tokens.size))

    def join(self, pieces: Sequence[str], saes: list[SaeEntry]) -> Record:
        """Write the files from the parts, the record last, and delete the parts.

        Args:
            pieces: the string of every token id.
        """
        folder, width = self.one.folder, self.one.width
        (folder / RECORD).unlink(missing_ok=True)  # the old record isn't of the new files
        write_table(folder, CONTEXTS, self._read("contexts"), width=width)
        activity = (part.select(ACTIVITY.schema.names) for part in self._read("activity"))
        write_table(folder, ACTIVITY, activity, width=width)
        write_table(folder, DIRECTIONS, self._read("directions"), width=width)
        write_table(folder, SUMMARY, [self._summary()], width=width)
        windows = window_rows(self.shards, self._window, self.text.tokens.reshape(-1))
        write_windows(folder, windows)
        write_vocabulary(folder, pieces)
        record = self._record(saes)
        write_record(folder / RECORD, record)
        remove_tree(self.one.scratch)
        return record

    def _read(self, kind: str) -> Iterator[pa.Table]:
        wanted = "directions" if kind == "directions" else "activity"
        for unit in self.units:
            if unit.kind == wanted:
                yield _read(self.file(kind, unit.latents))

    def _summary(self) -> pa.Table:
        names = ["latent", "count", "mean", "histogram_high", "input_ids"]
        activity = pa.concat_tables(part.select(names) for part in self._read("activity"))
        names = [f"{end}_{what}" for end in ("top", "bottom") for what in ("ids", "values")]
        names += ["neighbour_latents", "neighbour_cosines"]
        directions = pa.concat_tables(part.select(names) for part in self._read("directions"))
        first = {name: _first(directions[name]) for name in names}
        maximum = pc.fill_null(activity["histogram_high"], 0.0)
        return pa.table(
            [
                activity["latent"],
                activity["count"],
                pc.divide(activity["count"].cast(pa.float64()), float(self._num_tokens)),
                activity["mean"],
                maximum,
                _first(activity["input_ids"]),
                *first.values(),
            ],
            schema=SUMMARY.schema,
        )

    @property
    def _num_tokens(self) -> int:
        return int(self.text.usable.sum())

    def _record(self, saes: list[SaeEntry]) -> Record:
        job, width = self.one.job, self.one.width
        sums = [part.schema.metadata for part in self._read("directions")]

        def mean(key: bytes) -> float | None:
            total = sum(float(one[key]) for one in sums)
            return total / (width * (width - 1)) if width > 1 else None

        is_transcoder = job.target != job.tap
        return Record(
            name=self.one.name,
            step=job.step,
            model=job.model.weights,
            site=job.tap.site,
            layer=job.tap.layer,
            target=job.target.site if is_transcoder else None,
            architecture=job.sae.architecture,
            width=width,
            sequences=len(self.text.tokens),
            sequence_length=self.text.length,
            tokens=self._num_tokens,
            cofiring_tokens=int(self.text.usable[: self._cofiring_sequences].sum()),
            alive=int((self.shards.counts > 0).sum()),
            mean_abs_cosine=mean(_ABS_COSINE),
            mean_abs_encoder_cosine=mean(_ABS_ENCODER_COSINE) if is_transcoder else None,
            subsets=job.table.summary.subsets,
            saes=saes,
            settings=self.one.record,
            fingerprints=job.fingerprints,
        )

    @property
    def _cofiring_sequences(self) -> int:
        return self.cofiring_shards * self.text.shard_sequences


def _first(column: pa.ChunkedArray) -> pa.Array:
    """The first entry of each list; null of an empty one."""
    array = column.combine_chunks()
    starts, sizes = array.offsets.to_numpy()[:-1], pc.list_value_length(array).to_numpy()
    flat = array.values
    places = pa.array(starts.astype(np.int64), mask=sizes == 0)
    return flat.take(places)


def _write(path: StoragePath, table: pa.Table) -> None:
    with replacing(path) as temporary, pa.ipc.new_file(str(temporary), table.schema) as file:
        file.write_table(table)


def _read(path: StoragePath) -> pa.Table:
    if isinstance(path, Path):
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    return pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
