"""A training state as arrays where Orbax can't work: written by all processes, committed by one.

Orbax commits a checkpoint by renaming its folder, which a bucket can't do, and it can't write to
s3://. On a disk it needs locks of files, which some network file systems lack. There a checkpoint
is written the way the activation store is (`ArrayLayout`). Each process writes the shards its
devices hold, as objects or files that no other process writes. When all have, the main process
writes the meta. That commits the checkpoint in a bucket; on a disk its folder gets its name then.
What was cut off is deleted by the next run that writes in the folder.

The arrays are plain zarr3, read on any disk and in any bucket.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from activation_cache.runtime import exchange, processes
from activation_cache.runtime.errors import UserError
from activation_cache.storage.arrays import ArrayLayout, array_errors, start_read, write_shards
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.files import (
    StoragePath,
    disk_errors,
    make_folder,
    remove_file,
    remove_tree,
    sync,
    write_bytes,
)
from activation_cache.storage.row_range import Segment
from sae_train.step.state import TrainState

logger = logging.getLogger(__name__)

META = "meta/metadata"
ARRAYS = "arrays"  # the key of the meta that says how the arrays are cut into objects
_OBJECT_BYTES, _CHUNK_BYTES = 64 * 2**20, 4 * 2**20
_CONCURRENT_WRITES = 8
_UNFINISHED = ".unfinished"  # ends the name of a checkpoint on a disk that isn't whole yet

_saves = itertools.count()  # numbers saves; the same in all processes, which save in one order


@dataclass(frozen=True)
class _Shard:
    """Rows of one array, from row `start` of a file on, that this process writes."""

    layout: ArrayLayout
    start: int
    rows: np.ndarray


class ArrayCheckpoints:
    """The checkpoints under one folder, saved in the background."""

    def __init__(self, folder: StoragePath, *, keep: int | None) -> None:
        self.folder, self.keep = make_folder(folder), keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        if processes.is_main():
            self._clear_unfinished()

    def close(self) -> None:
        """Return when the save under way is over. Its failure is raised by `wait`, not here."""
        self._pool.shutdown()

    def wait(self) -> None:
        """Return when the save under way is committed; raises `UserError` if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint."""
        return [
            int(one.name)
            for one in self.folder.iterdir()
            if one.name.isdecimal() and not self._is_unfinished(one)
        ]

    def save(self, step: int, state: TrainState, sealed: Mapping[str, Any]) -> None:
        """Copy this process's part of a state off its devices and begin to write it."""
        self.wait()
        on_disk = isinstance(self.folder, Path)
        target = self.folder / f"{step}{_UNFINISHED if on_disk else ''}"
        exchange.run_on_main_and_broadcast("clear the checkpoint", lambda: self.delete(step))
        shards = list(_own_shards(state, target))  # a copy, as the next step overwrites the state
        name = f"saved/{next(_saves)}"
        self._saving = self._pool.submit(self._write, target, shards, dict(sealed), name)

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""
        delete_checkpoint(self.folder / str(step))

    def _write(
        self, target: StoragePath, shards: list[_Shard], sealed: dict[str, Any], name: str
    ) -> None:
        mistake: str | None = None
        try:
            with ThreadPoolExecutor(_CONCURRENT_WRITES) as pool:
                list(pool.map(_write_shard, shards))
            if processes.is_main():
                for path, cutting in sealed[ARRAYS].items():
                    _layout(target, path, cutting).open(create=True)
        except UserError as error:
            mistake = str(error)
        self._agree(f"{name}/arrays", mistake)
        if processes.is_main():
            try:
                make_folder((target / META).parent)
                write_bytes(target / META, json.dumps(sealed).encode())
                self._name(target)
                self._delete_old()
            except UserError as error:
                mistake = str(error)
        self._agree(f"{name}/meta", mistake)

    def _agree(self, name: str, mistake: str | None) -> None:
        """Return in all processes, or raise in all of them the error that one met."""
        found = [one for one in exchange.gathered_under(name, mistake) if one is not None]
        if found:
            raise UserError(found[0])

    def _delete_old(self) -> None:
        steps = sorted(self.steps())
        for step in steps[: -self.keep] if self.keep else []:
            self.delete(step)

    def _name(self, target: StoragePath) -> None:
        """Give a whole checkpoint on a disk its name."""
        if isinstance(target, Path):
            with disk_errors(target, doing="name a checkpoint"):
                target.rename(target.with_name(target.name.removesuffix(_UNFINISHED)))
                sync(target.parent)

    def _clear_unfinished(self) -> None:
        for one in self.folder.iterdir():
            if self._is_unfinished(one):
                logger.warning("deleting %s: a checkpoint that was only half written", one)
                remove_tree(one)

    def _is_unfinished(self, one: StoragePath) -> bool:
        if isinstance(one, Path):
            return one.name.endswith(_UNFINISHED)
        return one.name.isdecimal() and not (one / META).is_file()


def delete_checkpoint(folder: StoragePath) -> None:
    """Delete a checkpoint, its meta first: killed halfway it is unfinished, not damaged.

    Of one that was moved elsewhere, and linked from here, the link alone is deleted.
    """
    if isinstance(folder, BucketPath):
        (folder / META).unlink(missing_ok=True)
    elif folder.is_symlink():
        remove_file(folder)
        return
    else:
        remove_file(folder / META)
    remove_tree(folder)


def cutting_of(state: TrainState) -> dict[str, Any]:
    """How each array of a state is cut into objects, by name, for the meta that a reader starts at.

    An object holds rows of one device's shard: at most `_OBJECT_BYTES`, if the rows can be halved
    that far.
    """
    return {name: _cut(array) for name, array in _named(state)}


def read_state(folder: StoragePath, abstract: TrainState, meta: Mapping[str, Any]) -> TrainState:
    """The state under a checkpoint's folder, sharded as `abstract` says.

    All reads run concurrently; each process reads what its devices hold.

    Raises:
        UserError: an object is missing or damaged, or the storage fails.
    """
    wanted = {
        name: _start_reads(_layout(folder, name, meta[ARRAYS][name]), array)
        for name, array in _named(abstract)
    }
    leaves = []
    for name, array in _named(abstract):
        with array_errors(folder / "state" / name, doing="read"):
            parts = {span: future.result() for span, future in wanted[name].items()}
        part = functools.partial(_part, parts=parts, shape=array.shape)
        leaves.append(jax.make_array_from_callback(array.shape, array.sharding, part))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _named(tree: TrainState) -> list[tuple[str, Any]]:
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), one) for path, one in named]


def _cut(array: Any) -> dict[str, Any]:
    shape = tuple(array.shape) or (1,)
    rows = (tuple(array.sharding.shard_shape(array.shape)) or (1,))[0]
    row_bytes = array.dtype.itemsize * math.prod(shape[1:])
    file_rows = _halved(rows, row_bytes, _OBJECT_BYTES)
    return {
        "shape": list(shape),
        "dtype": str(array.dtype),
        "shard_rows": file_rows,
        "chunk_rows": _halved(file_rows, row_bytes, _CHUNK_BYTES),
    }


def _halved(rows: int, row_bytes: int, limit: int) -> int:
    while rows * row_bytes > limit and rows % 2 == 0:
        rows //= 2
    return rows


def _layout(folder: StoragePath, name: str, cutting: Mapping[str, Any]) -> ArrayLayout:
    return ArrayLayout(
        path=folder / "state" / name,
        shape=tuple(cutting["shape"]),
        dtype=cutting["dtype"],
        chunk_rows=cutting["chunk_rows"],
        shard_rows=cutting["shard_rows"],
    )


def _span(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """First and last row (exclusive) of a shard's index; a scalar is one row."""
    start, stop, _ = index[0].indices(shape[0]) if shape else (0, 1, 1)
    return start, stop


def _part(
    index: tuple[slice, ...] | None,
    *,
    parts: Mapping[tuple[int, int], np.ndarray],
    shape: tuple[int, ...],
) -> np.ndarray:
    """One device's part of an array of this shape, from the rows read by `_start_reads`."""
    assert index is not None
    rows = parts[_span(index, shape)]
    return rows[(slice(None), *index[1:])] if shape else rows.reshape(())


def _own_shards(state: TrainState, target: StoragePath) -> Iterator[_Shard]:
    """What this process's devices hold, copied off them."""
    for name, array in _named(state):
        layout = _layout(target, name, _cut(array))
        for shard in array.addressable_shards:
            if shard.replica_id:
                continue
            assert shard.data.shape[1:] == array.shape[1:], (name, shard.data.shape)
            start, _ = _span(shard.index, array.shape)
            rows = np.array(shard.data, copy=True).reshape(-1, *layout.shape[1:])
            for first in range(0, len(rows), layout.shard_rows):
                yield _Shard(layout, start + first, rows[first : first + layout.shard_rows])


def _write_shard(shard: _Shard) -> None:
    array = shard.layout.open(assume=True)
    write_shards(array, shard.layout, start=shard.start, rows=shard.rows)


def _start_reads(layout: ArrayLayout, array: Any) -> dict[tuple[int, int], Any]:
    """Reads of all rows that this process's devices hold, each span once."""
    stored = layout.open(assume=True)
    indices = array.sharding.addressable_devices_indices_map(array.shape).values()
    spans = {_span(index, array.shape) for index in indices}
    with array_errors(layout.path, doing="read"):
        return {span: start_read(stored, [Segment(span[0], span[1] - span[0])]) for span in spans}
