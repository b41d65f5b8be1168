"""The code broken on purpose, a line at a time, and the test that must turn red for each.

    python -m tests.mutations [--only WORDS ...]      (or: make mutations)

A test of exactness is worth what it catches. Each mutation is made in a copy of the tree, where its
test is run; it must fail, and not because the broken code doesn't run at all. docs/exactness.md
has the table; `tests/whole/test_mutations.py` sees to it that each mutation still finds its line.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutations.mutation import Mutation
from tests.mutations.table import MUTATIONS
from tests.support.paths import ROOT

logger = logging.getLogger("mutations")

_LEFT_OUT = shutil.ignore_patterns(".*", "demo-data", "runs", "build", "*.egg-info", "__pycache__")
# What a line that merely doesn't work raises.
_NOT_RUN = re.compile(r"^E +(NameError|SyntaxError|ImportError|AttributeError|TypeError)", re.M)


def in_copy(mutation: Mutation, copy: Path) -> str:
    """The verdict on a mutation: "red", or what happened instead; the copy is restored."""
    path = copy / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.right, mutation.wrong))
    try:
        code, printed = _pytest(copy, mutation.test)
    finally:
        path.write_text(text)
    if code != 1:
        return "GREEN" if code == 0 else f"pytest ended with {code}"
    return "doesn't run" if _NOT_RUN.search(printed) else "red"


def _pytest(copy: Path, *tests: str) -> tuple[int, str]:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    return found.returncode, found.stdout


def main() -> int:
    """Log a line for each mutation; 1 if one wasn't caught."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", help="those with one of these words in their names")
    words = parser.parse_args().only or [""]
    chosen = [one for one in MUTATIONS if any(word in one.what for word in words)]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "copy")
        shutil.copytree(ROOT, copy, ignore=_LEFT_OUT)
        code, printed = _pytest(copy, *sorted({one.test for one in chosen}))
        if code:
            logger.error("The tests fail as the code is:\n%s", printed)
            return 1
        verdicts = []
        for one in chosen:
            verdicts.append(in_copy(one, copy))
            logger.info("%-12s %s (%s)", verdicts[-1], one.what, one.test)
    logger.info("%d of %d caught", verdicts.count("red"), len(verdicts))
    return 0 if set(verdicts) == {"red"} else 1


if __name__ == "__main__":
    sys.exit(main())
