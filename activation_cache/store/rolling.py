"""The window of a rolling store: what the trainer reads from, what is harvested and what deleted.

Files are the only link between the trainer and the harvest. The trainer writes `reading.json`: the
stretch of the order it is in (`order.RollingOrder`). From that the harvest knows which buckets are
wanted: those of the window and one more. It deletes the others and harvests what is missing, in
rising order. A bucket's record in `commits/` says that it is there. Whatever either side has lost
when it was killed is made again, bit for bit: a bucket is a pure function of the store's plan.

A trainer that was killed and goes on from an older checkpoint moves back while the harvest beside
it may be about to delete what the trainer was past. So each says what it is about to do and only
then looks at what the other says (Dekker's protocol): the harvest writes which buckets it keeps
(`kept.json`), and deletes the others if `reading.json` is still the one that it has acted on; the
trainer writes `reading.json`, and reads from buckets that are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from activation_cache.config import Count, Section
from activation_cache.runtime import exchange
from activation_cache.runtime.errors import UserError
from activation_cache.runtime.waiting import Waiting
from activation_cache.storage.files import StoragePath, remove_file
from activation_cache.storage.records import FORMAT_VERSION, read_record, write_record
from activation_cache.store.manifest import Manifest
from activation_cache.store.order import RollingOrder
from activation_cache.store.store import PROVENANCE, Store, provenance_layout, tap_layout
from activation_cache.store.writer import commit_file

READING_FILE = "reading.json"
KEPT_FILE = "kept.json"
_SHARED_DISK_SECONDS = 120.0  # a network file system may hide other machines' files so long


class Reading(Section):
    """Where the trainer is.

    Attributes:
        stretch: of the oldest row that it may still read; the number of its first bucket too.
        through: the last bucket that its next step reads.
        end: the bucket after the last one that it will ever read.
    """

    format_version: int
    stretch: Count
    through: Count
    end: Count

    def wanted(self, window: int) -> range:
        """The buckets that are to be on the disk: the window, and the one after it."""
        return range(self.stretch, min(self.end, max(self.through, self.stretch + window) + 1))

    @property
    def needed(self) -> range:
        """Those that the next step waits for."""
        return range(self.stretch, min(self.end, self.through + 1))

    @property
    def is_over(self) -> bool:
        """Will nothing be read any more?"""
        return self.stretch >= self.end


class Kept(Section):
    """The buckets that a harvest beside the trainer doesn't delete.

    Attributes:
        start: the first of them.
        stop: the one after the last.
    """

    format_version: int
    start: Count
    stop: Count


def read_reading(store: StoragePath) -> Reading | None:
    """Where the trainer of a store is; None before it has begun."""
    file = store / READING_FILE
    return read_record(file, Reading) if file.exists() else None


def write_reading(store: StoragePath, reading: Reading) -> None:
    """Tell the harvest where the trainer is."""
    write_record(store / READING_FILE, reading)


def write_kept(store: StoragePath, buckets: range) -> None:
    """Tell the trainer which buckets stay, before any other is deleted."""
    kept = Kept(format_version=FORMAT_VERSION, start=buckets.start, stop=buckets.stop)
    write_record(store / KEPT_FILE, kept)


def is_kept(store: StoragePath, buckets: range) -> bool:
    """Does the harvest beside the trainer keep these buckets, until the trainer is past them?"""
    file = store / KEPT_FILE
    if not file.exists():
        return False
    kept = read_record(file, Kept)
    return kept.start <= buckets.start and buckets.stop <= kept.stop


def is_there(store: StoragePath, bucket: int) -> bool:
    """Is a bucket on the disk, whole?"""
    return commit_file(store, bucket).exists()


def buckets_there(store: StoragePath) -> list[int]:
    """The buckets on the disk that are whole."""
    commits = commit_file(store, 0).parent
    names = [file.stem for file in commits.iterdir()] if commits.is_dir() else []
    numbers = (name.removeprefix("bucket-") for name in names)
    return sorted(int(number) for number in numbers if number.isdecimal())


def delete_bucket(store: StoragePath, manifest: Manifest, bucket: int) -> None:
    """Delete a bucket: its record first, so that it is never taken for whole.

    Raises:
        UserError: the disk or the bucket of cloud storage refuses.
    """
    commit_file(store, bucket).unlink(missing_ok=True)
    span = manifest.bucket_span(bucket)
    layouts = [tap_layout(store, manifest, entry.tap) for entry in manifest.sites]
    layouts += [provenance_layout(store, manifest, name) for name in PROVENANCE]
    for layout in layouts:
        for row in range(span.start, span.stop, layout.shard_rows * layout.packs):
            file = layout.shard_file(row // layout.packs)
            if isinstance(file, Path):
                remove_file(file)
                if file.parent != layout.path / "c":  # of an array of rows each shard has a folder
                    remove_file(file.parent)
            else:
                file.unlink(missing_ok=True)


def buckets_on_disk(store: StoragePath, manifest: Manifest) -> list[int]:
    """The buckets of which there is anything: a record, or a shard that a kill left behind."""
    found = set(buckets_there(store))
    layouts = [tap_layout(store, manifest, entry.tap) for entry in manifest.sites]
    layouts += [provenance_layout(store, manifest, name) for name in PROVENANCE]
    for layout in layouts:
        folder = layout.path / "c"
        shards = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        for shard in shards:
            if shard.isdecimal():
                first = int(shard) * layout.shard_rows * layout.packs
                found.add(first // manifest.shuffling.bucket_rows)
    return sorted(found)


# Makes the buckets that a reading needs be on the disk; called in the main process alone.
Supply = Callable[[Reading, Callable[[], bool]], None]


class RollingWindow:
    """The trainer's side: tells the harvest where it is, and waits for what the next step reads.

    All processes of a group call `prepare` for the same steps, in the same order.
    """

    def __init__(
        self, store: Store, *, seed: int, batch_size: int, steps: int, supply: Supply
    ) -> None:
        """Nothing is written or waited for yet.

        Args:
            steps: of the longest run that reads from the store.
            supply: makes what a reading needs be there (`harvest.rolling`), or waits until it is.
        """
        order = store.order(seed=seed)
        assert isinstance(order, RollingOrder), "not a rolling store"
        assert steps * batch_size <= order.rows, (steps, batch_size, order.rows)
        self._store, self._order, self._supply = store, order, supply
        self._batch_size, self._steps = batch_size, steps
        self._end = self._through(max(0, steps - 1)) + 1
        self._reading: Reading | None = None
        self._step = -1  # the last that was prepared
        self._seen = -1  # the last of the buckets, from the stretch's first on, known to be there

    def reading(self, step: int) -> Reading:
        """Where the trainer is before a step."""
        stretch, through = self._order.stretch_of(step * self._batch_size), self._through(step)
        return Reading(
            format_version=FORMAT_VERSION,
            stretch=stretch,
            through=through,
            end=max(self._end, through + 1),
        )

    def _through(self, step: int) -> int:
        """The last bucket that a step reads from."""
        last = self._order.stretch_of((step + 1) * self._batch_size - 1)
        return self._order.last_bucket(last)

    @property
    def num_batches(self) -> int:
        """Whole batches in the text."""
        return self._order.rows // self._batch_size

    def prepare(self, step: int, *, stop: Callable[[], bool]) -> None:
        """Return when the rows of a step are on the disk; what lies before them may be deleted.

        Raises:
            UserError: the harvest failed.
            Interrupted: `stop` turned true.
        """
        self._tell(self.reading(step), stop=stop)
        self._step = step

    def finish(self, *, stop: Callable[[], bool]) -> None:
        """No step will read any more: all may be deleted."""
        over = Reading(
            format_version=FORMAT_VERSION, stretch=self._end, through=self._end, end=self._end
        )
        self._tell(over, stop=stop)

    def _tell(self, reading: Reading, *, stop: Callable[[], bool]) -> None:
        before = self._reading
        if reading == before:
            return
        self._reading = None  # until all is there, nothing is read ahead
        if before is None or reading.stretch < before.stretch:
            self._seen = -1  # what is ahead may be deleted until its turn has come again
        # Process 0 may be a step ahead: what the others still read must not be deleted.
        exchange.barrier("read")
        exchange.run_on_main_and_broadcast(
            "buckets", lambda: self._supplied(reading, stop=stop), stop=stop
        )
        self._reading = reading
        self._wait_until_seen(reading)

    def _supplied(self, reading: Reading, *, stop: Callable[[], bool]) -> None:
        write_reading(self._store.path, reading)
        self._supply(reading, lambda: exchange.stop_asked(stop))

    def _wait_until_seen(self, reading: Reading) -> None:
        waiting = Waiting(f"bucket {reading.through}, which another machine wrote")
        while not self._sees(reading.needed):
            if waiting.seconds > _SHARED_DISK_SECONDS:
                raise UserError(
                    f"process 0 finds the buckets {reading.stretch} to {reading.through} of "
                    f"{self._store.path} and this process doesn't: put cache.path on a disk that "
                    "all processes share"
                )
            waiting.tell()
            time.sleep(0.2)

    def _sees(self, buckets: range) -> bool:
        for bucket in range(max(buckets.start, self._seen + 1), buckets.stop):
            if not is_there(self._store.path, bucket):
                return False
            self._seen = bucket
        return True

    def may_read(self, step: int) -> bool:
        """Are a step's rows on the disk, and will stay there until it is read?"""
        if self._reading is None or step >= max(self._steps, self._step + 1):
            return False
        reading = self.reading(step)
        wanted = self._reading.wanted(self._order.window)
        kept = reading.stretch >= wanted.start and reading.through < wanted.stop
        return kept and self._sees(reading.needed)
