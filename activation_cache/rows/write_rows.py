"""`import_rows` and `write_rows`: activations that files or a program hold become a store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.config import ModelConfig
from activation_cache.gemma.taps import Tap
from activation_cache.rows.columns import parquet_rows
from activation_cache.rows.row_array import Given, RowArray
from activation_cache.rows.settings import ImportSettings, parse_tap
from activation_cache.rows.source import Address, make_source, open_rows
from activation_cache.rows.store_of_rows import RowImport, check_same_settings
from activation_cache.rows.unpack import TOKEN_IDS, unpack
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import AnyPath, StoragePath, remove_tree, storage_path
from activation_cache.storage.locks import folder_lock
from activation_cache.store.manifest import Manifest
from activation_cache.store.store import MANIFEST_FILE, open_store

UNPACKED = "unpacked"  # folder of rows that came one after the other, while an import lasts
logger = logging.getLogger(__name__)

Batch = Any  # an array, or a mapping of arrays by tap


def import_rows(
    rows: Mapping[Tap, Address],
    *,
    to: AnyPath,
    settings: ImportSettings,
    tokens: Address | None = None,
    tokenizer: str | None = None,
    scratch: AnyPath | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Manifest:
    """Make a store of rows in files, or go on with one that was begun.

    Args:
        rows: the files of each tap.
        tokens: files of the rows' token ids, [sequences, rows].
        tokenizer: `model.weights` of the Gemma whose tokenizer made them: its BOS, EOS and padding
            make no rows, and evaluation may go through that model.
        scratch: a folder on a disk for what Parquet files hold; None: `unpacked` in the store.

    Raises:
        UserError: files that can't be read, rows that don't fit together or aren't finite, an
            import of other rows in the folder, or a full disk. What was committed before stays.
        Interrupted: `stop` turned true; every finished bucket is committed.
    """
    path = storage_path(to)
    with folder_lock(path):
        folder = _scratch(path, scratch)
        unpacks = any(one.is_parquet for one in rows.values())
        if unpacks and (done := _already(path, folder, settings)) is not None:
            return done
        opened: dict[str, list[RowArray]] = {}
        for name, address in _named(rows, tokens).items():
            if address.is_parquet:
                give = parquet_rows(address.paths, column=address.column, name=name)
                own = _need(folder, path) / name
                opened |= _unpacked(give, own, settings, from_start=False, stop=stop)
            else:
                opened[name] = open_rows(address)
        return _store(path, opened, settings, tokenizer=tokenizer, folder=folder, stop=stop)


def _already(path: StoragePath, folder: Path | None, settings: ImportSettings) -> Manifest | None:
    """The manifest of a finished store whose rows came one after the other.

    They can't be compared any more; raises `UserError` for other settings.
    """
    if not (path / MANIFEST_FILE).exists():
        return None
    if folder is not None and folder.exists():  # killed before it was removed
        remove_tree(folder)
    found = open_store(path).manifest
    check_same_settings(path, found, settings)
    logger.info("the store at %s is finished already", path)
    return found


def _named(rows: Mapping[Tap, Address], tokens: Address | None) -> dict[str, Address]:
    named = {tap.name: address for tap, address in rows.items()}
    return named if tokens is None else named | {TOKEN_IDS: tokens}


def write_rows(
    rows: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    *,
    to: AnyPath,
    tap: str = "rows.0",
    tokenizer: str | None = None,
    scratch: AnyPath | None = None,
    stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Manifest:
    """Make a store of rows that a program gives, or go on with one that was begun.

    A batch is an array [rows, width] or [sequences, rows, width], NumPy's or PyTorch's, or a
    mapping of such arrays by tap; `token_ids` in it are integers [sequences, rows]. The rows are
    written to `scratch` first, where they take the disk of the store once more. After a kill the
    same call goes on: rows that come again are compared with those that were kept.

    Args:
        rows: batches, a single one, or a function of a number n that gives all but the first n
            rows (sequences, where they are given so).
        to: folder or bucket of the store.
        tap: what the rows are, where a batch is an array: a site and a layer.
        tokenizer: as of `import_rows`.
        scratch: a folder on a disk; None: `unpacked` in the store.
        settings: keys of `ImportSettings`, such as `dtype` and `held_out`.

    Raises:
        UserError, Interrupted: as `import_rows`.
    """
    chosen, path = check_settings(settings), storage_path(to)
    with folder_lock(path):
        if (done := _already(path, _scratch(path, scratch), chosen)) is not None:
            return done
        folder = _need(_scratch(path, scratch), path)
        if isinstance(rows, Mapping) or hasattr(rows, "shape"):
            rows = [rows]
        again = not callable(rows)
        give = partial(_given, rows, parse_tap(tap).name)
        opened = _unpacked(give, folder, chosen, from_start=again, stop=stop)
        return _store(path, opened, chosen, tokenizer=tokenizer, folder=folder, stop=stop)


def check_settings(settings: Mapping[str, Any]) -> ImportSettings:
    """Settings of an import by name; raises `UserError` for one that isn't, or can't be so."""
    import pydantic

    try:
        return ImportSettings(**settings)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}; the settings of an import are "
            f"{', '.join(ImportSettings.model_fields)}"
        ) from error


def _given(
    rows: Iterable[Batch] | Callable[[int], Iterable[Batch]], tap: str, start: int
) -> Iterator[Given]:
    first = start if callable(rows) else 0
    for batch in rows(start) if callable(rows) else rows:
        arrays = batch if isinstance(batch, Mapping) else {tap: batch}
        named = {
            name if name == TOKEN_IDS else parse_tap(name).name: _array(array)
            for name, array in arrays.items()
        }
        if any(array.ndim < 2 for array in named.values()) or not named:
            raise UserError(
                f"a batch has arrays of shapes {[list(a.shape) for a in named.values()]}: rows are "
                "[rows, width] or [sequences, rows, width], token ids [sequences, rows]"
            )
        yield Given(named, partial(_where, first))
        first += len(next(iter(named.values())))


def _where(first: int, row: int) -> str:
    return f"row or sequence {first + row} of those given"


def _array(values: Any) -> np.ndarray:
    """Any array as NumPy's; one of PyTorch's may need a gradient, be bfloat16 or on a device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if "bfloat16" in str(values.dtype) else values
    return np.asarray(values)


def _unpacked(
    give: Callable[[int], Iterable[Given]],
    folder: Path,
    settings: ImportSettings,
    *,
    from_start: bool,
    stop: Callable[[], bool],
) -> dict[str, list[RowArray]]:
    return unpack(
        give,
        folder=folder,
        from_start=from_start,
        in_bfloat16=settings.dtype == "bfloat16",
        stop=stop,
    )


def _store(
    path: StoragePath,
    opened: Mapping[str, list[RowArray]],
    settings: ImportSettings,
    *,
    tokenizer: str | None,
    folder: Path | None,
    stop: Callable[[], bool],
) -> Manifest:
    """Make the store of opened arrays, and remove what was unpacked for it."""
    named = [parse_tap(name) for name in opened if name != TOKEN_IDS]
    taps = sorted(named, key=lambda tap: (tap.layer, tap.site))  # as a harvest has them
    sources = {tap: make_source(opened[tap.name], settings=settings) for tap in taps}
    tokenizer_hash = ""
    if tokenizer is not None:
        from activation_cache.language_model.tokenizer import load_tokenizer

        loaded = load_tokenizer(ModelConfig(weights=tokenizer))
        ids = [loaded.bos_id, loaded.eos_id, loaded.pad_id]
        settings = settings.model_copy(update={"special_ids": ids})
        tokenizer_hash = loaded.fingerprint
    made = RowImport(
        path=path,
        settings=settings,
        sources=sources,
        tokens=opened.get(TOKEN_IDS, []),
        tokenizer_hash=tokenizer_hash,
        stop=stop,
    ).run()
    if folder is not None and folder.exists():
        remove_tree(folder)
    return made


def _scratch(path: StoragePath, scratch: AnyPath | None) -> Path | None:
    """The folder for what must be unpacked; None where nobody has said which disk to use."""
    if scratch is not None:
        found = storage_path(scratch)
        if not isinstance(found, Path):
            raise UserError(f"scratch is {scratch}: it must be a folder on a disk of this machine")
        return found / UNPACKED
    return path / UNPACKED if isinstance(path, Path) else None


def _need(folder: Path | None, path: StoragePath) -> Path:
    if folder is None:
        raise UserError(
            f"the store {path} is in a bucket, and rows that come one after the other are written "
            "to a disk first: name a folder with scratch (--scratch), where they take the store's "
            "bytes once more"
        )
    return folder
