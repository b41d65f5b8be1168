"""All rows of a tap, from several arrays one after the other: found, checked, read by sequence.

Legend: S rows of a sequence, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from activation_cache.rows.arrays import is_zarr, open_npy, open_tensor, open_zarr
from activation_cache.rows.columns import float_columns, open_column, schema_of
from activation_cache.rows.row_array import FLOATS, RowArray
from activation_cache.rows.settings import ImportSettings
from activation_cache.runtime.errors import UserError
from activation_cache.store.manifest import ImportedSource

PARQUET = ".parquet"
_COLUMNS = (".arrow", PARQUET)
_SUFFIXES = (".npy", ".safetensors", *_COLUMNS)


@dataclass(frozen=True)
class Address:
    """What a command line calls rows: files or a folder, and what of them to read."""

    paths: tuple[Path, ...]
    column: str | None

    @property
    def is_parquet(self) -> bool:
        """Must they be unpacked before they can be read in any order?"""
        return self.paths[0].suffix == PARQUET

    @property
    def names(self) -> list[str]:
        """The columns of the first file; none of a kind of file without."""
        first = self.paths[0]
        return list(schema_of(first).names) if first.suffix in _COLUMNS else []

    @property
    def row_column(self) -> str | None:
        """What is read of the files: as named, or the one column of rows that they have."""
        first = self.paths[0]
        if self.column is not None or first.suffix not in _COLUMNS:
            return self.column
        found = float_columns(schema_of(first))
        return found[0] if len(found) == 1 else None

    def with_column(self, column: str) -> Address:
        """Another column of the same files."""
        return replace(self, column=column)


def find_rows(text: str) -> Address:
    """The files that `PATH` or `PATH::COLUMN` names: a file, a glob, a folder of files, a zarr.

    Raises:
        UserError: there are none, or they are of several kinds.
    """
    place, _, column = text.partition("::")
    if "://" in place:
        raise UserError(
            f"{place} is in a bucket, and rows are read from disks: copy them here first. The "
            "store may be in a bucket"
        )
    path = Path(place)
    if is_zarr(path) or path.is_file():
        found = [path]
    elif path.is_dir():
        found = [one for one in sorted(path.iterdir()) if one.suffix in _SUFFIXES or is_zarr(one)]
    else:
        found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    if not found:
        raise UserError(
            f"{place} has no rows: neither {', '.join(_SUFFIXES)} files nor zarr arrays are there"
        )
    kinds = sorted({"zarr" if is_zarr(one) else one.suffix or "no ending" for one in found})
    if len(kinds) > 1:
        raise UserError(
            f"{place} has files of {len(kinds)} kinds ({', '.join(kinds)}), and it can't be told "
            "which are meant: name one kind, as 'FOLDER/*.npy'"
        )
    return Address(tuple(found), column or None)


def open_array(path: Path, column: str | None) -> RowArray:
    """Open a file's array; `column` names a tensor or a column where the file has several.

    Raises:
        UserError: another kind of file, damaged, shorter than its header says, or of integers.
    """
    if is_zarr(path):
        return open_zarr(path, column)
    opened = {".npy": open_npy, ".safetensors": open_tensor, ".arrow": open_column}.get(path.suffix)
    if opened is None:
        raise UserError(
            f"{path} is none of the files whose rows can be read: .npy, .safetensors, .arrow, "
            ".parquet and folders of zarr arrays. Convert it to one of them"
        )
    return opened(path, column)


def open_rows(address: Address) -> list[RowArray]:
    """Open the arrays of an address; raises `UserError` as `open_array` does."""
    return [open_array(path, address.column) for path in address.paths]


@dataclass(frozen=True)
class RowSource:
    """The rows of one tap, or its token ids, as one long array, cut into sequences."""

    arrays: Sequence[RowArray]
    sequence_length: int

    @property
    def in_sequences(self) -> bool:
        """Were they given as sequences?"""
        return len(self.arrays[0].shape) == 3

    @property
    def width(self) -> int:
        """D."""
        return self.arrays[0].shape[-1]

    @cached_property
    def _ends(self) -> Int64[np.ndarray, " A"]:
        return np.cumsum([array.shape[0] for array in self.arrays], dtype=np.int64)

    @property
    def rows(self) -> int:
        """All rows, those that won't be stored included."""
        return int(self._ends[-1]) * (self.sequence_length if self.in_sequences else 1)

    @property
    def sequences(self) -> int:
        """Number of sequences; the last may be short where rows were cut into them."""
        return -(-self.rows // self.sequence_length)

    def sequence(self, number: int) -> Float[np.ndarray, "S D"]:
        """The rows of one sequence, as they are in the files."""
        if self.in_sequences:
            return self._read(number, number + 1)[0]
        start = number * self.sequence_length
        return self._read(start, min(start + self.sequence_length, self.rows))

    def place(self, sequence: int, position: int) -> str:
        """Where a row is, in words."""
        entry = sequence if self.in_sequences else sequence * self.sequence_length + position
        number = int(np.searchsorted(self._ends, entry, side="right"))
        own = entry - int(self._ends[number]) + self.arrays[number].shape[0]
        if self.in_sequences:
            return f"{self.arrays[number]}, sequence {own}, row {position} of it"
        return f"{self.arrays[number]}, row {own}"

    def entries(self, tap: str) -> list[ImportedSource]:
        """What the manifest says of the arrays."""
        return [
            ImportedSource(
                name=array.name,
                column=array.column,
                tap=tap,
                shape=list(array.shape),
                sha256=array.sha256,
            )
            for array in self.arrays
        ]

    def _read(self, start: int, stop: int) -> np.ndarray:
        parts = []
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            end = int(self._ends[number])
            first = start - end + self.arrays[number].shape[0]
            last = first + min(stop, end) - start
            parts.append(self.arrays[number].read(first, last))
            start = min(stop, end)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def make_source(arrays: Sequence[RowArray], *, settings: ImportSettings) -> RowSource:
    """Check that the arrays of a tap belong together.

    Raises:
        UserError: no rows, integers, another width or dtype than the first's.
    """
    first = arrays[0]
    for array in arrays:
        if len(array.shape) not in (2, 3):
            raise UserError(
                f"{array} has shape {list(array.shape)}: rows are an array [rows, width] or "
                "[sequences, rows, width]. Reshape it"
            )
        if array.dtype not in FLOATS:
            raise UserError(
                f"{array} holds {array.dtype}: activations are {', '.join(FLOATS)}. Convert it, "
                "or name another file"
            )
        if array.shape[1:] != first.shape[1:]:
            raise UserError(
                f"{array} has rows of shape {list(array.shape[1:])} and {first} of "
                f"{list(first.shape[1:])}: all rows of a tap have one width. Leave one of them out"
            )
        if array.dtype != first.dtype:
            raise UserError(
                f"{array} holds {array.dtype} and {first} {first.dtype}: rows of two precisions "
                "are two distributions. Convert them to one dtype first"
            )
    if len(first.shape) == 3:
        if settings.sequence_length is not None:
            raise UserError(
                f"sequence_length is {settings.sequence_length}, and {first} has sequences of "
                f"{first.shape[1]} rows already: leave sequence_length out"
            )
        source = RowSource(arrays, first.shape[1])
    else:
        source = RowSource(arrays, settings.length_for(sum(one.shape[0] for one in arrays)))
    if not source.rows or not source.width:
        raise UserError(f"{first} and {len(arrays) - 1} more hold no rows: name other files")
    return source
