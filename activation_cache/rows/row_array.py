"""One array of rows in a file, whatever the file's kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from activation_cache.language_model.locate import sampled_fingerprint
from activation_cache.runtime.errors import UserError

FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class RowArray:
    """One array of one file. `read(start, stop)` is that part of its first dim, as stored.

    `sha256` covers samples of the file, by which an import that goes on knows it again.
    """

    name: str
    column: str | None
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    read: Callable[[int, int], np.ndarray]

    def __str__(self) -> str:
        return self.name if self.column is None else f"{self.name}::{self.column}"


@dataclass(frozen=True)
class Given:
    """Some rows that have come: arrays by the name of their tap, or `TOKEN_IDS`.

    `where` says in words where row n of them is.
    """

    arrays: Mapping[str, np.ndarray]
    where: Callable[[int], str]

    @property
    def count(self) -> int:
        """N, of each array."""
        return len(next(iter(self.arrays.values())))


def chosen(
    path: Path, column: str | None, names: Sequence[str], *, what: str, among: Any = None
) -> str:
    """The one to read: that named, or the only one there is."""
    every = list(names) if among is None else list(among.names)
    if column is not None:
        if column not in every:
            raise UserError(
                f"{path} has no {what} {column}: it has {', '.join(every) or 'none'}. Name one of "
                f"them, as {path}::NAME"
            )
        return column
    if len(names) != 1:
        raise UserError(
            f"{path} has {len(names)} {what}s with rows ({', '.join(names) or 'none of floats'}): "
            f"name the one to read, as {path}::NAME"
        )
    return names[0]


def file_hash(path: Path) -> str:
    """A hash of a file's samples."""
    return sampled_fingerprint([(path, b"")])
