"""`open_latents`: read what `sae latents` wrote, one latent at a time. Loads no JAX."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_cache.runtime.errors import UserError
from activation_cache.storage.bucket_client import file_system, plain
from activation_cache.storage.files import AnyPath, StoragePath, storage_path
from activation_cache.storage.records import read_record
from sae_train.latents.records import (
    Coactive,
    Context,
    Explanation,
    Histogram,
    Latent,
    Neighbour,
    TextWindow,
    TokenCount,
    TokenValue,
)
from sae_train.latents.schema import (
    ACTIVITY,
    CONTEXTS,
    DIRECTIONS,
    EXPLANATIONS,
    EXPLANATIONS_SCHEMA,
    FOLDER,
    GROUP,
    RECORD,
    SUMMARY,
    VOCABULARY,
    WINDOWS,
    Record,
    Table,
)

_GROUPS_KEPT = 16  # row groups in memory, of each file


def open_latents(folder: AnyPath) -> Latents:
    """The latents of one SAE.

    Args:
        folder: the `latents` folder, or the folder of the run it is in.

    Raises:
        UserError: there are none, or their record is damaged.
    """
    path = storage_path(folder)
    for place in (path, path / FOLDER):
        if (place / RECORD).is_file():
            return Latents(place, read_record(place / RECORD, Record))
    raise UserError(f"{path} holds no latents yet: write them with `sae latents {path}`")


def has_latents(folder: StoragePath) -> bool:
    """Does a run's folder hold finished latents?"""
    return (folder / FOLDER / RECORD).is_file()


class Explanations(Mapping[int, tuple[Explanation, ...]]):
    """What `sae explain` wrote, by latent: columns in memory, objects of those that are asked for.

    Attributes:
        latents: those that have an explanation, rising.
    """

    def __init__(self, rows: pa.Table) -> None:
        numbers = rows["latent"].to_numpy()
        order = np.argsort(numbers, kind="stable")
        is_sorted = bool((order[1:] > order[:-1]).all())
        self._rows = rows if is_sorted else rows.take(order)
        self.latents, begins = np.unique(numbers[order], return_index=True)
        self._begins = np.append(begins, len(rows))

    @functools.cached_property
    def last(self) -> pa.Table:
        """The row of explanations.parquet that was written last, of each of `latents`."""
        if len(self.latents) == len(self._rows):
            return self._rows
        return self._rows.take(self._begins[1:] - 1)

    def __getitem__(self, latent: int) -> tuple[Explanation, ...]:
        place = int(np.searchsorted(self.latents, latent))
        if place == len(self.latents) or self.latents[place] != latent:
            raise KeyError(latent)
        begin, end = self._begins[place : place + 2]
        return tuple(
            Explanation(row["text"], row["method"], row["model"], json.loads(row["scores"] or "{}"))
            for row in self._rows.slice(begin, end - begin).to_pylist()
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.latents.tolist())

    def __len__(self) -> int:
        return len(self.latents)


class Latents:
    """The latents of one SAE on disk; `latents[17]` reads one of them.

    Attributes:
        folder: where the files are.
        record: what they were made from.
    """

    def __init__(self, folder: StoragePath, record: Record) -> None:
        self.folder, self.record = folder, record
        self._group = functools.lru_cache(maxsize=3 * _GROUPS_KEPT)(self._read_group)

    def __len__(self) -> int:
        return self.record.width

    def __iter__(self) -> Iterator[Latent]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} latents of {self.name}, {self.record.alive} of them alive>"

    @property
    def name(self) -> str:
        """The name of the SAE's run."""
        return self.record.name

    @property
    def model(self) -> str:
        """`model.weights` of the model that was walked."""
        return self.record.model

    @functools.cached_property
    def summary(self) -> pa.Table:
        """One row per latent: counts, mean, maximum, the first of each ranking."""
        return self.open_file(SUMMARY.name).read().combine_chunks()

    @functools.cached_property
    def vocabulary(self) -> list[str]:
        """The string of every token id, as the tokenizer has it: `▁the`, `<0x0A>`."""
        return self.open_file(VOCABULARY).read(["piece"])["piece"].to_pylist()

    @functools.cached_property
    def explanations(self) -> Explanations:
        """By latent, what `sae explain` wrote; empty before it ran."""
        if not (self.folder / EXPLANATIONS).is_file():
            return Explanations(EXPLANATIONS_SCHEMA.empty_table())
        return Explanations(self.open_file(EXPLANATIONS).read())

    def __getitem__(self, index: SupportsIndex) -> Latent:
        """Read one latent; raises `UserError` if there is no such latent."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise UserError(
                f"{self.name} has the latents 0 to {len(self) - 1}: there is no latent {index}"
            )
        summary = self.summary.slice(index, 1).to_pylist()[0]
        activity, directions = (self._rows(one, index)[0] for one in (ACTIVITY, DIRECTIONS))
        histogram = None
        if summary["count"]:
            histogram = _histogram(activity, "histogram")
        return Latent(
            sae=self.name,
            index=index,
            count=summary["count"],
            frequency=summary["frequency"],
            mean=summary["mean"],
            maximum=summary["maximum"],
            histogram=histogram,
            interval_counts=tuple(activity["interval_counts"]),
            contexts=tuple(self._context(row) for row in self._rows(CONTEXTS, index)),
            top_logits=self._ranked(directions, "top"),
            bottom_logits=self._ranked(directions, "bottom"),
            plain_top_logits=self._ranked(directions, "plain_top"),
            plain_bottom_logits=self._ranked(directions, "plain_bottom"),
            logit_histogram=_histogram(directions, "logit"),
            plain_logit_histogram=_histogram(directions, "plain_logit"),
            encoder_top=self._ranked(directions, "encoder_top"),
            encoder_bottom=self._ranked(directions, "encoder_bottom"),
            top_inputs=tuple(
                TokenCount(token, self.vocabulary[token], count, lift)
                for token, count, lift in _columns(activity, "input", "ids", "counts", "lifts")
            ),
            neighbours=self._neighbours(directions, "neighbour"),
            encoder_neighbours=self._neighbours(directions, "encoder_neighbour"),
            coactive=tuple(
                Coactive(*row)
                for row in _columns(activity, "coactive", "latents", "counts", "scores")
            ),
            explanations=self.explanations.get(index, ()),
        )

    def silent_windows(self, index: int) -> list[TextWindow]:
        """The windows of the text in which a latent fires on none of the tokens that count.

        Raises:
            UserError: the files are of a version that kept no windows.
        """
        windows, numbers, latents = self._windows
        fires = set(numbers[latents == index].tolist())
        return [window for number, window in enumerate(windows) if number not in fires]

    @functools.cached_property
    def _windows(self) -> tuple[list[TextWindow], np.ndarray, np.ndarray]:
        """All windows; of each pair of a window and a latent that fires in it the two numbers."""
        if not (self.folder / WINDOWS).is_file():
            raise UserError(
                f"{self.folder} has no {WINDOWS}, from which texts are taken in which a latent is "
                "silent: an earlier version wrote these latents. Write them anew with "
                f"`sae latents {self.folder.parent}`; explanations and answers stay"
            )
        table = self.open_file(WINDOWS).read()
        rows = table.select(["sequence", "start", "tokens"]).to_pylist()
        windows = [
            TextWindow(
                tuple(self.vocabulary[token] for token in row["tokens"]),
                row["sequence"],
                row["start"],
            )
            for row in rows
        ]
        latents = table["latents"].combine_chunks()
        numbers = np.repeat(np.arange(len(rows)), np.diff(latents.offsets.to_numpy()))
        return windows, numbers, latents.values.to_numpy()

    def _rows(self, table: Table, index: int) -> list[dict[str, Any]]:
        group = self._group(table.name, index // GROUP)
        begin, end = np.searchsorted(group["latent"].to_numpy(), [index, index + 1])
        return group.slice(begin, end - begin).to_pylist()

    def _read_group(self, name: str, number: int) -> pa.Table:
        return self.open_file(name).read_row_group(number)

    @functools.cached_property
    def _files(self) -> dict[str, pq.ParquetFile]:
        return {}

    def open_file(self, name: str) -> pq.ParquetFile:
        """A file of the folder, opened once.

        Raises:
            UserError: it is missing or damaged.
        """
        if name not in self._files:
            path = self.folder / name
            try:
                if isinstance(path, Path):
                    self._files[name] = pq.ParquetFile(path, memory_map=True)
                else:
                    source = file_system(path.scheme).open(plain(path), "rb")
                    self._files[name] = pq.ParquetFile(source)
            except (FileNotFoundError, pa.ArrowInvalid) as error:
                raise UserError(
                    f"{path} is missing or damaged: delete {self.folder / RECORD} and give "
                    f"`sae latents {self.folder.parent}` again"
                ) from error
        return self._files[name]

    def _ranked(self, row: dict[str, Any], name: str) -> tuple[TokenValue, ...]:
        return tuple(
            TokenValue(token, self.vocabulary[token], value)
            for token, value in _columns(row, name, "ids", "values")
        )

    def _neighbours(self, row: dict[str, Any], name: str) -> tuple[Neighbour, ...]:
        return tuple(
            Neighbour(self.record.saes[sae].name, latent, cosine)
            for sae, latent, cosine in _columns(row, name, "saes", "latents", "cosines")
        )

    def _context(self, row: dict[str, Any]) -> Context:
        return Context(
            tokens=tuple(self.vocabulary[token] for token in row["tokens"]),
            token_ids=tuple(row["tokens"]),
            values=tuple(row["values"]),
            peak=row["position"] - row["start"],
            sequence=row["sequence"],
            position=row["position"],
            subset=row["subset"],
            interval=row["interval"],
        )


def _columns(row: dict[str, Any], name: str, *ends: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(row[f"{name}_{end}"] for end in ends), strict=True)


def _histogram(row: dict[str, Any], name: str) -> Histogram | None:
    """Edges as `numpy.linspace` makes them in float64; None where there are no values."""
    counts = row[f"{name}_counts"]
    if not counts:
        return None
    edges = np.linspace(float(row[f"{name}_low"]), float(row[f"{name}_high"]), len(counts) + 1)
    return Histogram(tuple(edges.tolist()), tuple(counts))
