"""Other libraries' trainers beside ours, each at its best, at equal L0 on three taps and two texts.

    make bench-quality        # or, in an environment with the extra `bench`:
    python -m benchmarks.quality runs/quality
    python -m benchmarks.quality runs/quality --table     # the tables of what is there

Everybody trains on the same rows in the same batches for the same number of steps at one width, and
is measured on the same held-out text. Settings are searched alike (`methods`), on one tap and text,
at L0 50. Then come three L0s on all taps and texts, one seed after the other, so that there is a
table whenever it is stopped; the folder keeps every SAE and goes on. docs/results.md has what it
printed and how long it took.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import Results
from benchmarks.quality.stores import SITES, TAPS, TEXTS
from benchmarks.quality.study import Study
from benchmarks.quality.tables import report
from benchmarks.support.measure import prepare


def main() -> int:
    """Train and measure what isn't there, and print the tables of all that is."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for stores, SAEs and results; they go on")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sites", nargs="+", choices=SITES, default=SITES)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    names = [method.name for method in METHODS]
    parser.add_argument("--trainers", nargs="+", choices=names, default=names)
    told = parser.parse_args()
    prepare()
    logging.getLogger("quality").setLevel(logging.INFO)
    if not told.table:
        taps = [tap for tap in TAPS if tap[0] in told.sites and tap[1] in told.texts]
        methods = [method for method in METHODS if method.name in told.trainers]
        Study(told.folder).run(methods, told.seeds, taps)
    sys.stdout.write(report(Results(told.folder)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
