"""Every speed benchmark in one go, as JSON and as the tables of docs/performance.md: `make bench`.

    python -m benchmarks.run [--full] [--only step trainers reader harvest begin] [--json FILE]

A few minutes; `--full` takes longer: more widths, more rounds, a larger store.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import begin, harvest, reader, step, trainers
from benchmarks.support.measure import prepare, write_results

logger = logging.getLogger("bench")


def _step(full: bool) -> list[dict[str, Any]]:
    """A step beside its own matrix products."""
    widths = step.WIDTHS if full else step.WIDTHS[:2]
    rows = step.run(repeats=7 if full else 3, full=full, widths=widths)
    return [dataclasses.asdict(row) for row in rows]


def _trainers(full: bool) -> list[dict[str, Any]]:
    """A step beside other libraries'."""
    return [
        trainers.measure(
            trainers.Work(width=width, l0=64, batch=4096, d_model=640), rounds=7 if full else 3
        )
        for width in ((4096, 16_384, 65_536) if full else (16_384,))
    ]


def _reader(full: bool) -> list[dict[str, Any]]:
    """The reader beside the disk."""
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        sizes = {"gigabytes": 8.0 if full else 2.0, "rounds": 7 if full else 3}
        return [reader.measure(Path(scratch) / "store", **sizes)]


def _harvest(full: bool) -> list[dict[str, Any]]:
    """The forward beside transformers, and a whole harvest beside the forward."""
    ways = [("float32", 8, 256, 60_000), ("bfloat16", 8, 256, 60_000)]
    if full:
        # The length of Gemma Scope's sequences.
        ways += [("float32", 2, 1024, 0), ("bfloat16", 2, 1024, 0)]
    return [
        harvest.measure(
            dtype=dtype,
            layer=5,
            batch=batch,
            length=length,
            rounds=9 if full else 5,
            rows=rows,
        )
        for dtype, batch, length, rows in ways
    ]


def _begin(full: bool) -> list[dict[str, Any]]:
    """From the command to the first step."""
    with tempfile.TemporaryDirectory() as scratch:
        return [begin.measure(Path(scratch), rounds=7 if full else 3)]


PARTS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "step": _step,
    "trainers": _trainers,
    "reader": _reader,
    "harvest": _harvest,
    "begin": _begin,
}


def main() -> None:
    """Run the parts asked for; each is logged as it ends, all are kept as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="more sizes, more rounds")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, default=Path("runs/bench/results.json"))
    told = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    results: dict[str, Any] = {}
    for name in told.only:
        results[name] = PARTS[name](told.full)
        write_results(told.json, results)
        for row in results[name]:
            logger.info("%s", name)
            for key, value in row.items():
                _log(key, value)
    logger.info("kept in %s", told.json)


def _log(key: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, own in value.items():
            logger.info("    %-34s %s", name, own)
    else:
        logger.info("  %-36s %s", key, f"{value:.4g}" if isinstance(value, float) else value)


if __name__ == "__main__":
    main()
