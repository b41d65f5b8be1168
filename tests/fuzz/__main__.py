"""Break files and words at random and see how the command ends.

python -m tests.fuzz [--inputs N] [--seed S] [--kinds config,run] [--first K]      (make fuzz)
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from tests.fuzz.campaign import KINDS, Findings, campaign, described
from tests.fuzz.pipeline import environment, make_world
from tests.support import file_system_faults

logger = logging.getLogger("fuzz")


def main() -> int:
    """1 if an input ended wrongly."""
    options = _options()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the commands' own handler has the rest
    kinds = options.kinds.split(",") if options.kinds else list(KINDS)
    if "fault" in kinds and file_system_faults.loaded() is None:
        if file_system_faults.compiler() is not None:
            _start_again_with_faults()
        logger.info("no C compiler: file systems don't fail")
        kinds.remove("fault")
    # One folder for all, so that an input is the same bytes each time.
    folder = Path(tempfile.gettempdir(), f"open-gemma-scope-fuzz-{os.getuid()}")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "world").mkdir(parents=True)
    os.environ |= environment(folder / "world")
    begun = time.monotonic()
    world = make_world(folder / "world")
    os.chdir(folder / "world/work/here")
    found = campaign(
        world, inputs=options.inputs, seed=options.seed, kinds=kinds, first=options.first,
        until=begun + options.minutes * 60,
    )  # fmt: skip
    for failures in found.failures.values():
        words = described(failures[0], seed=options.seed, folder=folder / "failures")
        logger.info("%d x %s", len(failures), words)
        if options.inputs == 1:
            logger.info("%s", failures[0].outcome.printed)
    _summary(found, seed=options.seed, seconds=time.monotonic() - begun)
    return 1 if found.failures else 0


def _start_again_with_faults() -> NoReturn:
    """This command anew, with the library that makes calls fail before all others."""
    library = file_system_faults.build(Path(tempfile.mkdtemp(prefix="open-gemma-scope-fuzz-")))
    command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]]
    os.execve(sys.executable, command, os.environ | {"LD_PRELOAD": str(library)})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help=f"some of {','.join(KINDS)}")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of a kind")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this time")
    return parser.parse_args()


def _summary(found: Findings, *, seed: int, seconds: float) -> None:
    for kind, count in found.inputs.items():
        logger.info("%-12s %6d inputs %6.0f s", kind, count, found.seconds[kind])
    ends = ", ".join(f"{count} x {status}" for status, count in found.statuses.items())
    failed = sum(len(one) for one in found.failures.values())
    logger.info("seed %d: %d inputs in %.0f s, exit statuses %s; %d failures of %d sorts", seed,
                sum(found.inputs.values()), seconds, ends, failed, len(found.failures))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
