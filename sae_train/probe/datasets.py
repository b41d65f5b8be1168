"""The data sets: CSV files of prompts with one of two targets, and their splits.

sae-probes' package holds 113 of them (`.csv.zst`), with a list that says which are binary. A user's
folder holds `.csv` or `.csv.zst` files with the columns `prompt` and `target`.

Legend: N rows.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib.util
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from jaxtyping import Int

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, disk_errors, storage_path
from sae_train.config.evaluation import ProbeConfig

TEST_ROWS = 100  # at least so many are kept for the test
MOST_TRAINING_ROWS = 1024

_ENDINGS = (".csv", ".csv.zst")
_LIST = "probing_datasets_MASTER.csv.zst"  # sae-probes' list, beside the folder of its files
# Of different kinds, with at most 328 letters a prompt.
_SHORT = (
    "5_hist_fig_ismale",
    "21_headline_istrump",
    "36_sciq_tf",
    "42_temp_sense",
    "65_high-school",
    "87_glue_cola",
    "96_spam_is",
    "105_click_bait",
    "125_world_country_Italy",
    "154_athlete_sport_football",
)


@dataclass(frozen=True)
class DataSet:
    """Prompts with their labels.

    Attributes:
        label_N: 0 or 1, in the order of the two targets.
        digest: SHA-256 of the file.
    """

    name: str
    prompts: Sequence[str]
    label_N: Int[np.ndarray, " N"]
    digest: str


@dataclass(frozen=True)
class Split:
    """The rows that a probe is trained on and those that it is tested on, each in mixed order."""

    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]


def data_files(settings: ProbeConfig) -> dict[str, StoragePath]:
    """The files of the data sets that are asked for, by name.

    Raises:
        UserError: sae-probes isn't installed and no folder is given, the folder holds none, or it
            lacks one that is asked for.
    """
    folder = _installed() if settings.data is None else storage_path(settings.data)
    with disk_errors(folder, doing="read"):
        if not folder.is_dir():
            raise UserError(f"probe.data {folder} is no folder: name one with .csv files")
        files = _files_in(folder)
    if not files:
        raise UserError(
            f"probe.data {folder} holds no data sets: put .csv or .csv.zst files there, with the "
            "columns prompt and target"
        )
    wanted = settings.datasets
    if wanted is None and settings.data is None:
        wanted = list(_SHORT)
    if wanted is None or wanted == "all":
        return files
    for name in wanted:
        if name not in files:
            near = difflib.get_close_matches(name, files, cutoff=0.3) or sorted(files)[:3]
            raise UserError(
                f"probe.datasets names {name!r}, and {folder} has no such data set; near it are "
                f"{', '.join(near)}"
            )
    return {name: files[name] for name in dict.fromkeys(wanted)}


def _installed() -> StoragePath:
    """Where the package sae-probes keeps its data; nothing of it is imported."""
    found = importlib.util.find_spec("sae_probes")
    if found is None or found.origin is None:
        raise UserError(
            "sae probe needs data sets: `pip install --no-deps sae-probes` brings 113 of them "
            "(45 MB), or set probe.data to a folder of .csv files with the columns prompt and "
            "target"
        )
    return storage_path(Path(found.origin).parent / "data")


def _files_in(folder: StoragePath) -> dict[str, StoragePath]:
    if (folder / _LIST).is_file():
        rows = _rows_of(folder / _LIST, columns=("Data type", "Dataset save name"))
        paths = [
            folder / f"{row['Dataset save name']}.zst"
            for row in rows
            if row["Data type"] == "Binary Classification"
        ]
    else:
        paths = sorted(
            (path for path in folder.iterdir() if path.name.endswith(_ENDINGS)),
            key=lambda path: path.name,
        )
    return {path.name.partition(".csv")[0]: path for path in paths}


def read_data_set(path: StoragePath, *, name: str, rows: int) -> DataSet:
    """The first rows of a file.

    Raises:
        UserError: it can't be read, or isn't a data set with two targets; names file and line.
    """
    content = _bytes_of(path)
    table = _rows_of(path, columns=("prompt", "target"), content=content)[:rows]
    for number, row in enumerate(table, 2):
        if not row["prompt"] or not row["target"]:
            raise UserError(
                f"{path}: record {number} has no prompt or no target: fill it or drop it"
            )
    targets = sorted({row["target"] for row in table}, key=_order)
    if len(targets) != 2:
        some = ", ".join(targets[:4])
        raise UserError(
            f"{path} has {len(targets)} different targets in its first {rows} rows ({some}), and a "
            "probe tells two apart: make it a file of two"
        )
    label_N = np.array([targets.index(row["target"]) for row in table])
    try:
        num_train_and_test(label_N)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    return DataSet(name, [row["prompt"] for row in table], label_N, digest)


def _order(target: str) -> tuple[int, float, str]:
    """Numbers by their value, before words, as their labels are numbered by sae-probes."""
    try:
        return (0, float(target), "")
    except ValueError:
        return (1, 0.0, target)


def _bytes_of(path: StoragePath) -> bytes:
    with disk_errors(path, doing="read"):
        if not path.is_file():
            raise UserError(f"{path} is missing: install sae-probes again, or mend probe.data")
        return path.read_bytes()


def _rows_of(
    path: StoragePath, *, columns: Sequence[str], content: bytes | None = None
) -> list[dict[str, str]]:
    content = _bytes_of(path) if content is None else content
    try:
        if path.name.endswith(".zst"):
            content = zstandard.ZstdDecompressor().stream_reader(content).read()
        csv.field_size_limit(sys.maxsize)
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        table = list(reader)
    except (zstandard.ZstdError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} can't be read as CSV in UTF-8 ({error}): fetch it again"
        ) from error
    missing = [name for name in columns if name not in (reader.fieldnames or [])]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r} (it has {', '.join(reader.fieldnames or [])}): "
            f"a data set has {' and '.join(columns)}"
        )
    return table


def num_train_and_test(label_N: Int[np.ndarray, " N"]) -> tuple[int, int]:
    """How many rows are for training and for the test, half of them of each label.

    Of N rows min(N - 100, 1024) and all others but one, as sae-probes has it; where labels aren't
    equally many, N is twice the fewer.

    Raises:
        UserError: too few rows of a label; the message goes on after the file's name.
    """
    ones = int(label_N.sum())
    fewer = min(ones, len(label_N) - ones)
    rows = min(len(label_N), 2 * fewer)
    if rows < 2 * TEST_ROWS:
        raise UserError(
            f"has {fewer} rows of one of its targets, and a probe needs {TEST_ROWS} of each: add "
            "some, or leave the file out"
        )
    train = min(rows - TEST_ROWS, MOST_TRAINING_ROWS)
    return train, rows - train - 1


def split_of(label_N: Int[np.ndarray, " N"], *, seed: int) -> Split:
    """Rows drawn without replacement, the same as sae-probes draws for the same seed."""
    random = np.random.RandomState(seed)
    num_train, num_test = num_train_and_test(label_N)
    rest = {label: np.flatnonzero(label_N == label) for label in (1, 0)}
    parts = []
    for count in (num_train, num_test):
        ones = -(-count // 2)
        drawn = [
            random.choice(rest[label], size=size, replace=False)
            for label, size in ((1, ones), (0, count - ones))
        ]
        rest = {label: np.setdiff1d(rest[label], np.concatenate(drawn)) for label in rest}
        parts.append(np.concatenate(drawn))
    return Split(*(random.permutation(part) for part in parts))
