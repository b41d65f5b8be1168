"""Columns of lists: Arrow files, which are mapped, and Parquet, which is read from the start.

The package `datasets`, and with it SAELens, writes Arrow's stream format. Legend: N rows or
sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.rows.row_array import Given, RowArray, chosen, file_hash
from activation_cache.runtime.amounts import bytes_text
from activation_cache.runtime.errors import UserError

logger = logging.getLogger(__name__)

_BATCH_BYTES = 64 * 2**20


def open_column(path: Path, column: str | None) -> RowArray:
    """A column of lists of an Arrow file, mapped; raises `UserError` if it is damaged."""
    table = _arrow(path)
    name = chosen(path, column, float_columns(table.schema), what="column", among=table.schema)
    chunks = [chunk for chunk in table.column(name).chunks if len(chunk)]
    inner, dtype = list_shape(chunks[0] if chunks else None, path=path, column=name)
    ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
    total = int(ends[-1]) if chunks else 0

    def read(first: int, stop: int) -> np.ndarray:
        parts = []
        while first < stop:
            number = int(np.searchsorted(ends, first, side="right"))
            begin = int(ends[number]) - len(chunks[number])
            part = chunks[number].slice(first - begin, min(stop, int(ends[number])) - first)
            parts.append(values_of(part, inner, path=path, column=name, start=first))
            first += len(part)
        return np.concatenate(parts) if parts else np.zeros((0, *inner), dtype)

    return RowArray(path.name, name, (total, *inner), dtype, file_hash(path), read)


def _arrow(path: Path) -> Any:
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            f"{path} is not a whole file of Arrow's stream format ({error}): write it again"
        ) from error


def schema_of(path: Path) -> Any:
    """The Arrow schema of a file of either kind; raises `UserError` if it is damaged."""
    return _arrow(path).schema if path.suffix == ".arrow" else _parquet(path).schema_arrow


def float_columns(schema: Any) -> list[str]:
    """The columns of an Arrow schema that are lists of floats, or lists of such."""
    return [field.name for field in schema if "float" in str(_leaf(field.type))]


def _leaf(kind: Any) -> Any:
    import pyarrow.types as types

    kind = getattr(kind, "storage_type", kind)
    deep = 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, deep = kind.value_type, deep + 1
    return kind if deep else "a number"


def list_shape(chunk: Any, *, path: Path, column: str) -> tuple[tuple[int, ...], str]:
    """The shape below the first dim of a column of lists, by its first entry, and its dtype."""
    if chunk is None:
        raise UserError(f"{path} has no rows in column {column}: leave the file out")
    first = np.asarray(chunk[0].as_py())
    leaf = _leaf(chunk.type)
    dtype = {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(leaf))
    return first.shape, dtype or str(leaf)


def values_of(
    part: Any, inner: tuple[int, ...], *, path: Path, column: str, start: int
) -> np.ndarray:
    """Lists as an array [N, *inner].

    Args:
        start: number of the first list in the file, for messages.

    Raises:
        UserError: a list of another length, or a missing one; names file and row.
    """
    flat = getattr(part, "storage", part)
    for _ in inner:
        flat = flat.flatten()
    wanted = len(part) * int(np.prod(inner, dtype=np.int64))
    if len(flat) != wanted or flat.null_count:
        for number, one in enumerate(part):
            found = np.shape(one.as_py()) if one.is_valid else ()
            if found != inner:
                raise UserError(
                    f"{path}, row {start + number} of column {column} has shape {list(found)} and "
                    f"the first has {list(inner)}: all must have one shape. Mend or remove it"
                )
        raise UserError(f"{path} has empty values in column {column} from row {start} on: mend it")
    return flat.to_numpy(zero_copy_only=False).reshape(len(part), *inner)


def parquet_rows(
    paths: Iterable[Path], *, column: str | None, name: str
) -> Callable[[int], Iterator[Given]]:
    """The rows of Parquet files as `unpack` takes them.

    Raises:
        UserError: while they are read: damaged, no such column, lists of other shapes.
    """

    def rows(start: int) -> Iterator[Given]:
        for path in paths:
            yield from _of_parquet(path, column, name, start)
            start = max(0, start - _num_rows(path))

    return rows


def _num_rows(path: Path) -> int:
    return _parquet(path).metadata.num_rows


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not readable Parquet ({error}): write it again") from error


def _of_parquet(path: Path, column: str | None, name: str, skipped: int) -> Iterator[Given]:
    import pyarrow

    file = _parquet(path)
    total = file.metadata.num_rows
    if skipped >= total:
        return
    schema = file.schema_arrow
    name_of = chosen(path, column, float_columns(schema), what="column", among=schema)
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    logger.info("unpacking %s::%s, about %s", path, name_of, bytes_text(size))
    batch_size = int(min(65536, max(1, _BATCH_BYTES * total // max(1, size))))
    inner: tuple[int, ...] | None = None
    start = 0
    try:
        for batch in file.iter_batches(batch_size=batch_size, columns=[name_of]):
            lists = batch.column(0)
            if inner is None:
                inner, _ = list_shape(lists, path=path, column=name_of)
            if start + len(lists) > skipped:
                offset = max(0, skipped - start)
                first = start + offset
                values = values_of(
                    lists.slice(offset), inner, path=path, column=name_of, start=first
                )

                def where(row: int, first: int = first) -> str:
                    return f"{path}, row {first + row} of column {name_of}"

                yield Given({name: values}, where)
            start += len(lists)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} can't be read from row {start} on ({error}): it is damaged. Write it again"
        ) from error
