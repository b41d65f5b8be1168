"""Arrays of rows in files, read piece by piece: .npy, .safetensors and zarr.

Every array has rows [N, D], or sequences of rows [N, S, D]; its first dim is read in any order, so
that nothing is copied and memory holds what is asked for. Columns of lists are in `columns`.
Legend: N rows or sequences, S rows of a sequence, D width.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from activation_cache.rows.row_array import RowArray, chosen, file_hash
from activation_cache.runtime.errors import UserError
from activation_cache.storage.safetensors_file import open_safetensors

_ZARR = ("zarr.json", ".zarray")


def is_zarr(path: Path) -> bool:
    """Is this the folder of a zarr array or group?"""
    return any((path / name).is_file() for name in _ZARR) or (path / ".zgroup").is_file()


def open_npy(path: Path, column: str | None) -> RowArray:
    """A .npy file, mapped; raises `UserError` if it isn't whole or has no plain numbers."""
    _refuse_column(path, column)
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if header is None:
                raise ValueError(f"version {version} of the format")
            shape, by_columns, dtype = header(file)
            start = file.tell()
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is not a whole .npy file ({error}): write it again") from error
    needed = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    size = path.stat().st_size
    if dtype.hasobject or by_columns:
        what = "Python objects" if dtype.hasobject else "columns one after the other"
        raise UserError(f"{path} holds {what}: save it as np.ascontiguousarray(rows) of floats")
    if size < needed:
        row_bytes = max(1, needed - start) / max(1, shape[0] if shape else 1)
        raise UserError(
            f"{path} has {size} bytes and its header promises {needed}: it ends in row "
            f"{int((size - start) / row_bytes)} of {shape[0] if shape else 1}. Write it again"
        )
    dtype_name = "bfloat16" if dtype == np.dtype("V2") else dtype.name  # ml_dtypes' is saved as V2

    def read(first: int, stop: int) -> np.ndarray:
        rows = np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(needed - start,))
        own = ml_dtypes.bfloat16 if dtype_name == "bfloat16" else dtype
        return rows.view(own).reshape(shape)[first:stop]

    return RowArray(path.name, None, tuple(shape), dtype_name, file_hash(path), read)


def open_tensor(path: Path, column: str | None) -> RowArray:
    """A tensor of a .safetensors file, mapped; raises `UserError` as `open_safetensors` does."""
    file = open_safetensors(path)
    name = chosen(path, column, sorted(file.entries), what="tensor")
    entry = file.entries[name]
    if entry.dtype in _SAFETENSORS_INTEGERS:
        dtype = _SAFETENSORS_INTEGERS[entry.dtype]

        def read(first: int, stop: int) -> np.ndarray:
            data = np.memmap(
                path, dtype=np.uint8, mode="r", offset=entry.offset, shape=(entry.num_bytes,)
            )
            return data.view(dtype).reshape(entry.shape)[first:stop]

        return RowArray(path.name, name, entry.shape, dtype, file_hash(path), read)
    file.check_dtype(name)
    dtype = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[entry.dtype]
    return RowArray(
        path.name,
        name,
        entry.shape,
        dtype,
        file_hash(path),
        lambda first, stop: file.read(name, (slice(first, stop),)),
    )


_SAFETENSORS_INTEGERS = {"I64": "int64", "I32": "int32", "U32": "uint32", "U16": "uint16"}


def open_zarr(path: Path, column: str | None) -> RowArray:
    """A zarr array, version 2 or 3; raises `UserError` for a group, and for a missing chunk."""
    folder = path if column is None else path / column
    driver = "zarr3" if (folder / "zarr.json").is_file() else "zarr"
    if driver == "zarr3" and _json(folder / "zarr.json").get("node_type") == "group":
        names = sorted(p.name for p in folder.iterdir() if is_zarr(p))
        raise UserError(
            f"{folder} is a zarr group, and one array is needed: name one of "
            f"{', '.join(names) or 'its arrays (it has none)'}, as {path}::NAME"
        )
    try:
        # A chunk that isn't there is an error, and not zeros.
        spec = {
            "driver": driver,
            "kvstore": {"driver": "file", "path": f"{folder.resolve()}/"},
            "fill_missing_data_reads": False,
        }
        array = ts.open(spec, open=True, read=True).result()
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{folder} is no zarr array that can be read ({error})") from error

    def read(first: int, stop: int) -> np.ndarray:
        try:
            return array[first:stop].read().result()
        except ValueError as error:
            raise UserError(
                f"{folder} can't be read from row {first} to {stop}: a chunk is missing or damaged "
                f"({str(error).split(' [', 1)[0]}). Write it again"
            ) from error

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        if file.name in (*_ZARR, ".zattrs"):
            digest.update(file.read_bytes())
    return RowArray(
        path.name, column, tuple(array.shape), array.dtype.name, digest.hexdigest(), read
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): write the array again") from error
    return found if isinstance(found, dict) else {}


def _refuse_column(path: Path, column: str | None) -> None:
    if column is not None:
        raise UserError(f"{path}::{column}: a .npy file has one array without a name: leave ::out")
