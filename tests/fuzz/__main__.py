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

from activation_cache.storage.locks import folder_lock
from tests.fuzz.campaign import KINDS, Findings, campaign, described
from tests.fuzz.outcome import run
from tests.fuzz.pipeline import environment, make_world
from tests.fuzz.replay import load
from tests.fuzz.world import World
from tests.support import file_system_faults

logger = logging.getLogger("fuzz")

_FOLDER = Path(tempfile.gettempdir(), f"open-gemma-scope-fuzz-{os.getuid()}")


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
    replay: Path | None = options.replay
    # Inputs have its path in them: it is the same each time, and that of an input run again.
    folder: Path = (options.folder if replay is None else replay.parents[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    given = None if replay is None else load(replay)
    with folder_lock(folder):
        world = _new_world(folder)
        if given is not None:
            outcome = run(given, world)
            logger.info("%s\n%s", outcome.printed, outcome.wrong or f"ends with {outcome.status}")
            return 1 if outcome.wrong else 0
        begun = time.monotonic()
        until = begun + options.minutes * 60
        found = campaign(world, inputs=options.inputs, seed=options.seed, kinds=kinds, until=until)
        for failures in found.failures.values():
            words = described(failures, seed=options.seed, folder=folder / "failures")
            logger.info("%s", words)
    _summary(found, seed=options.seed, seconds=time.monotonic() - begun)
    return 1 if found.failures else 0


def _new_world(folder: Path) -> World:
    """The world in a folder, made anew; this process works in it from now on."""
    for name in ("world", "failures"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "world").mkdir()
    os.environ |= environment(folder / "world")
    world = make_world(folder / "world")
    os.chdir(folder / "world/work/here")
    return world


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
    parser.add_argument("--minutes", type=float, default=60, help="stop after this time")
    parser.add_argument("--replay", type=Path, help="run the input in this folder again")
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="to work in")
    return parser.parse_args()


def _summary(found: Findings, *, seed: int, seconds: float) -> None:
    for kind, count in found.inputs.items():
        logger.info("%-12s %6d inputs %6.0f s", kind, count, found.seconds[kind])
    total = found.inputs.total()
    ends = ", ".join(f"{count} x {status}" for status, count in found.statuses.items())
    failed = sum(len(one) for one in found.failures.values())
    logger.info(
        "seed %d: %d inputs in %.0f s, exit statuses %s; %d failures of %d sorts",
        *(seed, total, seconds, ends, failed, len(found.failures)),
    )


if __name__ == "__main__":
    sys.exit(main())
