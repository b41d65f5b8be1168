"""What an accelerator makes of products, steps, kernels and harvesting, in one table and as JSON.

    benchmarks/accelerator.sh [--out accelerator.json] [--small]       each part in its own process
    python -m benchmarks.accelerator [--only ceilings steps ...]       the parts in this process

It needs JAX, Flax, Optax and what those bring along, rich and jaxtyping; no pydantic, no network
and no weights. The script takes less than 8 minutes: a part that has used its time leaves the rest
out, and says so. `--small` is for a machine without an accelerator, to see that it runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

# Behind all that is installed: for a machine without pydantic.
sys.path.append(str(Path(__file__).parent / "stand_ins"))

# In the order of the script, with the seconds after which each leaves the rest out. The script ends
# a part that is still there some seconds later.
PARTS = {"ceilings": 30.0, "correctness": 48.0, "steps": 222.0, "kernels": 72.0, "harvest": 26.0}


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts asked for, and print what the file knows of all."""
    parser = argparse.ArgumentParser(prog="accelerator", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"), help="JSON")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that it runs")
    told = parser.parse_args(arguments)
    # Not before the path has the stand-in.
    from benchmarks.accelerator.results import Clock, Results
    from benchmarks.support.measure import prepare

    prepare()
    results = Results(told.out)
    for name in told.only:
        results.begin(name)
        part: Any = importlib.import_module(f"benchmarks.accelerator.{name}")
        once = {"group": 0.0, "groups": 1} if told.small else {}
        for row in part.rows(small=told.small, clock=Clock(PARTS[name], **once)):
            results.add(name, row)
            sys.stderr.write(f"{name}: {row.what} {row.precision} {row.note}\n")
    sys.stdout.write(f"{results.versions}\n\n{results.table()}\n\nkept in {told.out}\n")


if __name__ == "__main__":
    main()
