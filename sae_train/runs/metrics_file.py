"""metrics.jsonl: one JSON object per logged step; TensorBoard files too, on request.

A resumed run cuts the file back to the checkpoint it goes on from, so that the finished file
is the one an uninterrupted run writes, except for the two timings.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from activation_cache.runtime.closing import Closing
from activation_cache.runtime.errors import UserError
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.files import (
    AnyPath,
    disk_errors,
    json_text,
    storage_path,
    sync,
    write_bytes,
)
from activation_cache.storage.guard import guard
from sae_train.runs.recorded import metrics_row

FILE = "metrics.jsonl"
# To a bucket, where no object may be written more than once a second.
_SECONDS_BETWEEN_WRITES = 30.0


def read_metrics(run_folder: AnyPath) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics; a last line cut short by a kill is left out.

    Raises:
        UserError: a line isn't a row of metrics.
    """
    path = storage_path(run_folder) / FILE
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        rows.append(metrics_row(line, where=f"{path} line {number}"))
    return rows


class MetricsLog(Closing):
    """Adds rows to a run's metrics; a context manager."""

    def __init__(self, run_folder: AnyPath, *, from_step: int, tensorboard: bool) -> None:
        path = storage_path(run_folder) / FILE
        kept = [row for row in read_metrics(run_folder) if row["step"] <= from_step]
        text = "".join(json_text(row) + "\n" for row in kept)
        write_bytes(path, text.encode())
        self._file = _Object(path, text) if isinstance(path, BucketPath) else _File(path)
        self._board = _summary_writer(run_folder, from_step) if tensorboard else None

    def close(self) -> None:
        """Return when every row is written; raises `UserError` if they can't be."""
        try:
            self._file.close()
        finally:
            if self._board is not None:
                self._board.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; it must have `step`."""
        self._file.write(json_text(row) + "\n")
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Return when every row is on the disk: before a checkpoint that counts on them."""
        self._file.flush()


class _File:
    """Lines added to a file: each is there for other processes at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path, doing="write"):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, line: str) -> None:
        with disk_errors(self._path, doing="write"):
            self._file.write(line)
            self._file.flush()

    def flush(self) -> None:
        guard(self._path)
        with disk_errors(self._path, doing="write"):
            self._file.flush()
            sync(self._path)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            # What the disk has refused is still in the file's buffer, and closing tries it again.
            stack.enter_context(disk_errors(self._path, doing="write"))
            stack.callback(self._file.close)
            self.flush()


class _Object:
    """Lines of an object in a bucket. Objects can't grow, so all lines are written each time: in
    the background and not too often, and at once when `flush` is called.

    A million steps logged every 100 make 4 MB.
    """

    def __init__(self, path: BucketPath, text: str) -> None:
        self._path, self._text, self._written = path, text, text
        self._last = time.monotonic()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._writing: Future[None] | None = None

    def write(self, line: str) -> None:
        self._text += line
        busy = self._writing is not None and not self._writing.done()
        if not busy and time.monotonic() - self._last >= _SECONDS_BETWEEN_WRITES:
            self._wait()  # raises what the one before met
            self._writing = self._pool.submit(self._put, self._text)

    def flush(self) -> None:
        self._wait()
        if self._text != self._written:
            self._put(self._text)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._pool.shutdown()

    def _put(self, text: str) -> None:
        self._last = time.monotonic()
        write_bytes(self._path, text.encode())
        self._written = text

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _summary_writer(run_folder: AnyPath, from_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "train.tensorboard needs the package tensorboardX: install the extra "
            "'tensorboard' (pip install 'open-gemma-scope[tensorboard]') or set it to false"
        ) from error
    return SummaryWriter(str(storage_path(run_folder) / "tensorboard"), purge_step=from_step + 1)
