"""Do harvest and training of a rolling store overlap? Wall time beside that of the slower side.

    python -m benchmarks.rolling.overlap

trains on a tiny model's rolling store while a thread harvests it, as processes side by side do.
Either side sleeps for each bucket, as if it computed on a device of its own. A side's work is what
it sleeps and what it computes, without what it waits for the other. docs/results.md has what it
printed.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

from activation_cache.harvest.rolling import RollingHarvest
from launch.config.job import Job, load_job
from sae_train.train import loop
from sae_train.train.opened_store import OpenedStore
from tests.support.pipeline import write_pipeline

BUCKET_ROWS, WINDOW, BATCH = 64, 4, 4
STEPS = BUCKET_ROWS // BATCH  # in a bucket; in Gemma Scope's of a million rows are 248


def job_in(config: Path, folder: Path, *, buckets: int, beside: bool) -> Job:
    """A run on a small store of so many buckets."""
    return load_job(
        config,
        [
            f"cache.path={folder}/store",
            f"output={folder}/run",
            f"cache.tokens={buckets * BUCKET_ROWS}",
            f"cache.shuffle_rows={BUCKET_ROWS}",
            "cache.block_rows=8",
            f"cache.rolling={{buckets: {WINDOW}, beside: {str(beside).lower()}}}",
            f"train.tokens={buckets * BUCKET_ROWS}",
            f"train.batch_size={BATCH}",
            "train.log_every_steps=1000",
        ],
    )


def timed(
    config: Path, *, buckets: int, harvest: float, training: float, beside: bool
) -> tuple[float, float]:
    """Wall seconds from the second step to the last, and those that the slower side worked."""
    steps: list[float] = []
    made, waited = [0.0], [0.0]
    fill, place, prepare = RollingHarvest._fill, loop.place_batch, OpenedStore.prepare

    def slow_fill(*arguments: Any, **options: Any) -> None:
        began = time.monotonic()
        fill(*arguments, **options)
        time.sleep(harvest if steps else 0)
        made.append(time.monotonic() - began if len(steps) > 1 else 0.0)

    def slow_place(*arguments: Any, **options: Any) -> Any:
        time.sleep(training / STEPS if steps else 0)
        steps.append(time.monotonic())
        return place(*arguments, **options)

    def timed_prepare(*arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        found = prepare(*arguments, **options)
        waited.append(time.monotonic() - began if len(steps) > 1 else 0.0)
        return found

    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.object(RollingHarvest, "_fill", slow_fill),
        mock.patch.object(loop, "place_batch", slow_place),
        mock.patch.object(OpenedStore, "prepare", timed_prepare),
    ):
        job = job_in(config, Path(scratch), buckets=buckets, beside=beside)
        if beside:
            thread = threading.Thread(target=_follow, args=(job,))
            thread.start()
            loop.train(job)
            thread.join()
        else:
            loop.train(job)
    wall = steps[-1] - steps[1]  # after the second nothing is compiled
    return wall, max(sum(made), wall - sum(waited))


def _follow(job: Job) -> None:
    with RollingHarvest(model=job.model, text=job.text, cache=job.cache) as harvest:
        harvest.follow()


def main() -> None:
    """Print a row for each pair of speeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of the slower side, a bucket")
    parser.add_argument("--buckets", type=int, default=40)
    chosen = parser.parse_args()
    slower, time_run = chosen.seconds, functools.partial(timed, buckets=chosen.buckets)
    sys.stdout.write(
        "| a bucket's harvest | its steps | sides | wall | over the slower side's work |\n"
    )
    sys.stdout.write("| --- | --- | --- | --- | --- |\n")
    with tempfile.TemporaryDirectory() as scratch:
        config = write_pipeline(Path(scratch))
        time_run(config, harvest=0, training=0, beside=True)  # compiles
        for harvest, training in ((slower, slower / 2), (slower, slower), (slower / 2, slower)):
            for beside in (True, False):
                wall, alone = time_run(config, harvest=harvest, training=training, beside=beside)
                words = "side by side" if beside else "in turns"
                sys.stdout.write(
                    f"| {harvest:g} s | {training:g} s | {words} | {wall:.1f} s | "
                    f"{wall / alone:.2f} |\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
