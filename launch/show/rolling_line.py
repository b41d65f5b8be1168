"""Both sides of a rolling store in a line of `sae status`: where they are, and which is slower."""

from __future__ import annotations

from collections.abc import Sequence

from activation_cache.storage.files import StoragePath, storage_path
from launch.config.job import Job
from sae_train.runs.metrics_file import read_metrics

_ROWS = 20  # of a run's metrics, of which the share of waiting is the mean
# Side by side, a trainer that waits for more than this part of its time has the slower model.
_WAITS = 0.05


def rolling_line(config: Job, folders: Sequence[StoragePath]) -> str | None:
    """The line; None where the store isn't a rolling one.

    Args:
        folders: of the runs that read it.
    """
    rolling = config.cache.rolling
    if rolling is None:
        return None
    # Imported here because it loads TensorStore, which takes a while.
    from activation_cache.store.rolling import buckets_there, read_reading

    store = storage_path(config.cache.path)
    there = buckets_there(store)
    held = f"buckets {there[0] + 1} to {there[-1] + 1} are on the disk" if there else "it is empty"
    reading = read_reading(store)
    if reading is None:
        return f"rolling store: {held}; no trainer has read from it yet"
    if reading.is_over:
        return f"rolling store: {held}; the trainer has read all that it wants"
    return (
        f"rolling store: {held}; the trainer reads buckets {reading.stretch + 1} to "
        f"{reading.through + 1} of {reading.end}{_slower(folders, beside=rolling.beside)}"
    )


def _slower(folders: Sequence[StoragePath], *, beside: bool) -> str:
    """Which side is slower, by how long the trainer waited lately."""
    logs = [rows for folder in folders if (rows := read_metrics(folder))]
    if not logs:
        return ""
    newest = max(logs, key=lambda rows: len(rows))[-_ROWS:]
    waits = sum(row.get("input_wait_fraction", 0.0) for row in newest) / len(newest)
    slower = "the model" if waits > (_WAITS if beside else 0.5) else "the trainer"
    return f"; it waits {waits:.0%} of its time, the slower side is {slower}"
