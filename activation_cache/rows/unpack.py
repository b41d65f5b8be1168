"""Rows that come one after the other, written to a disk so that they can be read in any order.

Shuffling all rows needs them in any order, and neither an iterator nor a compressed Parquet file
gives them so. They are unpacked first: raw arrays, in parts, each followed by a record with its
hash. That takes the disk of the store once more while the import lasts, and memory for one part. An
import that was killed goes on after the last part with a record: rows that come again are compared
with their hash and not written. Legend: N rows or sequences.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from activation_cache.config import Count, PositiveCount, Section
from activation_cache.rows.row_array import FLOATS, Given, RowArray
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.progress import ProgressMeter
from activation_cache.storage.files import disk_errors, make_folder, replacing
from activation_cache.storage.records import FORMAT_VERSION, read_record, write_record

logger = logging.getLogger(__name__)

TOKEN_IDS = "token_ids"  # the name of token ids, beside the taps
PART_BYTES = 256 * 2**20
_FINISHED = "unpacked.json"


class _Part(Section):
    """`part-000000.json`: these arrays are on the disk whole."""

    format_version: int
    rows: PositiveCount
    inner: dict[str, list[Count]]  # shape below the first dim
    sha256: dict[str, str]


class _Finished(Section):
    """`unpacked.json`: no more rows come."""

    format_version: int
    parts: PositiveCount
    rows: PositiveCount


def unpack(
    rows: Callable[[int], Iterable[Given]],
    *,
    folder: Path,
    from_start: bool,
    in_bfloat16: bool,
    stop: Callable[[], bool],
) -> dict[str, list[RowArray]]:
    """Write all that `rows` gives, or what is missing of it; returns it as arrays, by name.

    Args:
        rows: called with the number of rows (or sequences) that needn't come again.
        from_start: it gives those all the same, in the same batches: they are compared.
        in_bfloat16: are rows kept in bfloat16? Else in float32.

    Raises:
        UserError: rows that are not finite, of another width or none; or other rows than before.
        Interrupted: `stop` turned true; whole parts are kept.
    """
    make_folder(folder)
    if (folder / _FINISHED).exists():
        return _arrays(folder)
    parts = _Parts(folder, from_start=from_start, in_bfloat16=in_bfloat16)
    with ProgressMeter("unpack", total=None, unit="rows", initial=parts.taken) as meter:
        for given in rows(parts.done):
            if stop():
                raise Interrupted(f"unpacking stopped: {parts.done} rows in {folder} are kept")
            parts.add(given)
            meter.update(parts.taken)
    parts.finish()
    return _arrays(folder)


class _Parts:
    """Collects rows into parts; one is in memory."""

    def __init__(self, folder: Path, *, from_start: bool, in_bfloat16: bool) -> None:
        self.folder = folder
        self.dtype = np.dtype(ml_dtypes.bfloat16 if in_bfloat16 else np.float32)
        self.present = _read_parts(folder)
        self.done = sum(part.rows for part in self.present)
        self.taken, self.number = (0, 0) if from_start else (self.done, len(self.present))
        self.inner = self.present[0].inner if self.present else None
        self.waiting: list[dict[str, np.ndarray]] = []

    def add(self, given: Given) -> None:
        """Take some rows; writes a part if they fill it."""
        if not given.count:
            return
        self.waiting.append(self._checked(given))
        self.taken += given.count
        held = sum(array.nbytes for arrays in self.waiting for array in arrays.values())
        if held >= PART_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is left, and that it is all."""
        if self.waiting:
            self._flush()
        parts = _read_parts(self.folder)
        if not parts:
            raise UserError("no rows were given: an import needs at least one")
        rows = sum(part.rows for part in parts)
        finished = _Finished(format_version=FORMAT_VERSION, parts=len(parts), rows=rows)
        write_record(self.folder / _FINISHED, finished)

    def _checked(self, given: Given) -> dict[str, np.ndarray]:
        inner = {name: list(array.shape[1:]) for name, array in given.arrays.items()}
        if self.inner is None:
            self.inner = inner
        if inner != self.inner or any(len(one) != given.count for one in given.arrays.values()):
            found = {name: list(array.shape) for name, array in given.arrays.items()}
            raise UserError(
                f"{given.where(0)}: arrays of {found} came after some of {self.inner} (without the "
                "first dim): all must have one width and one length of sequences, and the same "
                "number of rows. Mend or leave them out"
            )
        return {name: self._converted(name, given) for name in given.arrays}

    def _converted(self, name: str, given: Given) -> np.ndarray:
        array = given.arrays[name]
        if name == TOKEN_IDS:
            if array.dtype.kind not in "iu":
                raise UserError(
                    f"{given.where(0)}: token ids are integers, and these {array.dtype}"
                )
            return array.astype(np.int32)
        if array.dtype.name not in FLOATS:
            raise UserError(
                f"{given.where(0)}: rows of {name} are {array.dtype}, and activations are "
                f"{', '.join(FLOATS)}: convert them"
            )
        with np.errstate(over="ignore"):  # what becomes infinite is told below
            converted = array.astype(self.dtype)
        bad = np.flatnonzero(~np.isfinite(converted).reshape(len(array), -1).all(axis=1))
        if len(bad):
            raise UserError(
                f"{given.where(int(bad[0]))}: {name} holds NaN or infinity (or a number that "
                f"{self.dtype.name} can't hold): activations must be finite. Mend or leave it out"
            )
        return converted

    def _flush(self) -> None:
        names = list(self.waiting[0])
        arrays = {name: np.concatenate([one[name] for one in self.waiting]) for name in names}
        self.waiting = []
        rows = len(arrays[names[0]])
        part = _Part(
            format_version=FORMAT_VERSION,
            rows=rows,
            inner={name: list(array.shape[1:]) for name, array in arrays.items()},
            sha256={
                name: hashlib.sha256(_bytes(array)).hexdigest() for name, array in arrays.items()
            },
        )
        if self.number < len(self.present):
            self._compare(part)
        else:
            for name, array in arrays.items():
                path = self.folder / f"{name}-{self.number:06d}.bin"
                with replacing(path) as temporary, disk_errors(path, doing="write"):
                    temporary.write_bytes(_bytes(array))
            write_record(self.folder / f"part-{self.number:06d}.json", part)
        self.number += 1

    def _compare(self, part: _Part) -> None:
        if part != self.present[self.number]:
            first = sum(one.rows for one in self.present[: self.number])
            raise UserError(
                f"rows {first} to {first + part.rows} are others than when this import began (or "
                f"come in other batches): give the same rows, or delete {self.folder} to begin anew"
            )


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).data.cast("B")


def _read_parts(folder: Path) -> list[_Part]:
    found: list[_Part] = []
    while (file := folder / f"part-{len(found):06d}.json").exists():
        found.append(read_record(file, _Part))
    return found


def _arrays(folder: Path) -> dict[str, list[RowArray]]:
    found: dict[str, list[RowArray]] = {}
    for number, part in enumerate(_read_parts(folder)):
        for name, inner in part.inner.items():
            path = folder / f"{name}-{number:06d}.bin"
            found.setdefault(name, []).append(_raw(path, (part.rows, *inner), part.sha256[name]))
    return found


def _raw(path: Path, shape: tuple[int, ...], sha256: str) -> RowArray:
    item = path.stat().st_size // int(np.prod(shape, dtype=np.int64))
    dtype = "int32" if path.name.startswith(TOKEN_IDS) else {2: "bfloat16", 4: "float32"}[item]
    own = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def read(first: int, stop: int) -> np.ndarray:
        return np.memmap(path, dtype=np.uint8, mode="r").view(own).reshape(shape)[first:stop]

    return RowArray(path.name, None, shape, dtype, sha256, read)
