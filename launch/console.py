"""What the user sees: log lines on stderr, tables on stdout, quiet libraries."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from rich.console import Console
from rich.table import Table

PACKAGES = ("activation_cache", "sae_train", "launch")
_PLAIN_WIDTH = 140  # columns of a table where there is no terminal to ask


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Looks up `sys.stderr` at every line: rich replaces it while it shows a progress bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure_logging(*, verbosity: int) -> None:
    """Send our log lines to stderr with the time: -1 warnings only, 0 normal, 1 everything.

    Of other libraries only warnings are shown; of absl, through which Orbax logs, only errors.
    """
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    level = {-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG)
    for name in PACKAGES:
        logging.getLogger(name).setLevel(level)
    foreign = logging.INFO if verbosity > 0 else logging.ERROR
    for name in ("absl", "py.warnings"):
        logging.getLogger(name).setLevel(foreign)
    logging.captureWarnings(True)


def set_environment_defaults() -> None:
    """Quiet XLA's own log, unless the user has set its level; before JAX is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def print_table(table: Table) -> None:
    """Print a table on stdout, whole lines even where there is no terminal."""
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=_PLAIN_WIDTH)
    console.print(table)


def print_line(text: str) -> None:
    """Print one line on stdout as it is: a path or a number that a script may read."""
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
