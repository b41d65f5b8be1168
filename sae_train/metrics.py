"""metrics.jsonl: one JSON object per logged step; TensorBoard files beside it on request.

A resumed run cuts the file back to the checkpoint it goes on from, so that the finished file
is the one an undisturbed run writes, but for the two timings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from activation_cache.errors import UserError
from activation_cache.storage import disk_errors, write_bytes

FILE = "metrics.jsonl"


def read_metrics(run_folder: str | Path) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics; a last line cut short by a kill is left out."""
    path = Path(run_folder) / FILE
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path} line {number} is not JSON ({error}): mend or delete the line"
            ) from error
    return rows


class MetricsLog:
    """Appends rows to a run's metrics; a context manager."""

    def __init__(self, run_folder: str | Path, *, from_step: int, tensorboard: bool) -> None:
        self._path = Path(run_folder) / FILE
        kept = [row for row in read_metrics(run_folder) if row["step"] <= from_step]
        write_bytes(self._path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        with disk_errors(self._path, doing="write"):
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = _summary_writer(run_folder, from_step) if tensorboard else None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        finally:
            self._file.close()
            if self._board is not None:
                self._board.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it must have `step`, and its numbers must be finite."""
        with disk_errors(self._path, doing="write"):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Return when every row is on the disk: before a checkpoint that counts on them."""
        with disk_errors(self._path, doing="write"):
            self._file.flush()
            os.fsync(self._file.fileno())


def _summary_writer(run_folder: str | Path, from_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "train.tensorboard needs the package tensorboardX: install the extra "
            "'tensorboard' (pip install 'open-gemma-scope[tensorboard]') or set it to false"
        ) from error
    return SummaryWriter(str(Path(run_folder) / "tensorboard"), purge_step=from_step + 1)
