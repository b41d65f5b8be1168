"""Writes the Parquet files of a `latents` folder: the same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_cache.storage.files import StoragePath, replacing
from sae_train.latents.schema import VOCABULARY, VOCABULARY_SCHEMA, WINDOWS, Table


def write_table(
    folder: StoragePath, table: Table, parts: Iterable[pa.Table], *, width: int
) -> None:
    """Write one file, atomically, a row group for each `table.group` latents.

    Args:
        parts: rows of the table, rising by latent; each latent's rows are in one part.
        width: the SAE's latents.

    Raises:
        UserError: the disk refuses.
    """
    with (
        replacing(folder / table.name) as temporary,
        pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer,
    ):
        for group in _groups(parts, table, width=width):
            writer.write_table(group, row_group_size=max(1, len(group)))


def _groups(parts: Iterable[pa.Table], table: Table, *, width: int) -> Iterator[pa.Table]:
    """The rows of each group of latents; a group may have no rows."""
    waiting = table.schema.empty_table()
    end = min(table.group, width)
    for part in parts:
        waiting = pa.concat_tables([waiting, part.cast(table.schema)])
        # The last latent of a part is whole, so all groups before its own are.
        while len(waiting) and waiting["latent"][-1].as_py() >= end:
            split = int(np.searchsorted(waiting["latent"].to_numpy(), end))
            yield waiting.slice(0, split).combine_chunks()
            waiting, end = waiting.slice(split), min(end + table.group, width)
    while True:
        split = int(np.searchsorted(waiting["latent"].to_numpy(), end))
        yield waiting.slice(0, split).combine_chunks()
        if end == width:
            return
        waiting, end = waiting.slice(split), min(end + table.group, width)


def write_vocabulary(folder: StoragePath, pieces: Iterable[str]) -> None:
    """Write the string of every token id."""
    pieces = list(pieces)
    columns = [pa.array(np.arange(len(pieces), dtype=np.int32)), pa.array(pieces, pa.string())]
    _write(folder / VOCABULARY, pa.Table.from_arrays(columns, schema=VOCABULARY_SCHEMA))


def write_windows(folder: StoragePath, windows: pa.Table) -> None:
    """Write the windows of the text."""
    _write(folder / WINDOWS, windows)


def _write(path: StoragePath, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
