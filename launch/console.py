"""What the user sees: log lines on stderr, tables on stdout, quiet libraries."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from activation_cache.runtime.errors import UserError

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

    Of other libraries, absl among them, through which Orbax logs, only warnings are shown.
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
    for name, least in (("absl", logging.WARNING), ("py.warnings", logging.ERROR)):
        logging.getLogger(name).setLevel(logging.INFO if verbosity > 0 else least)
    logging.captureWarnings(True)


class _Unbroken(io.FileIO):
    """Goes on taking text where the terminal is gone: the work is to be saved, not the words."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_process() -> None:
    """Make streams that any text can be written to, and quiet XLA's log unless its level is set.

    What a terminal that isn't UTF-8 can't show becomes `?`. A stream that the process was started
    without is the null device. Call it before JAX is imported.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    stderr = sys.__stderr__
    if stderr is not None and stderr is sys.stderr:
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Unbroken(stderr.fileno(), "w", closefd=False)),
            encoding=stderr.encoding,
            errors="backslashreplace",
            line_buffering=True,
        )


class ClosedOutput(Exception):
    """Nobody reads our standard output any more: `sae plan | head -1`, a closed terminal."""


@contextlib.contextmanager
def output() -> Iterator[None]:
    """For writing to stdout.

    Raises:
        ClosedOutput: nobody reads it any more.
        UserError: it can't be written, to a full disk for instance.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        # What is still buffered goes nowhere, or Python would complain of it as it ends.
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        if error.errno in (errno.EPIPE, errno.EIO):
            raise ClosedOutput from error
        raise UserError(f"standard output can't be written: {error.strerror}") from error


class _Console(Console):
    """rich's console, which would end the process with status 1 where nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def table_console() -> Console:
    """A console on stdout whose lines are whole even where there is no terminal."""
    terminal = _Console()
    return terminal if terminal.is_terminal else _Console(width=_PLAIN_WIDTH)


def print_table(table: Table) -> None:
    """Print a table on stdout."""
    with output():
        table_console().print(table)


def watch(make: Callable[[], Table], *, seconds: float) -> None:
    """Show a table anew every so many seconds, until a signal's exception.

    On a terminal it stays in its place; elsewhere one is printed below the other.
    """
    console = table_console()
    with contextlib.ExitStack() as shown:
        show = print_table
        if console.is_terminal:
            live = shown.enter_context(Live(console=console, auto_refresh=False))
            show = functools.partial(live.update, refresh=True)
        while True:
            show(make())
            time.sleep(seconds)


def print_text(text: str) -> None:
    """Print text on stdout as it is: a path, a number or a file that a script may read."""
    with output():
        sys.stdout.write(f"{text}\n")
