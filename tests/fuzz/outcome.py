"""One input run through `launch.cli.main`, and what must be true of how it ends."""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tests.fuzz.world import World
from tests.support import file_system_faults
from tests.support.paths import ROOT

STATUSES = (0, 2, 75)  # done, the user's mistake, stopped with everything saved
ASK_SECONDS, MOST_SECONDS = 60.0, 300.0
END_SECONDS = 60.0
# An error may quote what it found, and a config may have many mistakes; nobody reads more.
_MOST_LINES, _MOST_CHARACTERS = 120, 40_000


class Hang(BaseException):
    """Raised by the alarm; not an `Exception`, which a command may catch."""


@dataclass(frozen=True)
class Fault:
    """The `nth` call below the world's folder fails with `error`, and if `lasting` all after it."""

    call: str
    nth: int
    error: int
    lasting: bool

    def __str__(self) -> str:
        rest = " and all after it" if self.lasting else ""
        return f"{self.call} number {self.nth}{rest}: {errno.errorcode[self.error]}"


@dataclass(frozen=True)
class Input:
    """Words of a command, and the files it finds changed.

    Attributes:
        changes: by name in the world; None deletes one.
        fault: of the file system, while the command runs.
        then: a second command, which mustn't end with 2.
    """

    words: tuple[str, ...]
    changes: Mapping[str, bytes | None] = field(default_factory=dict)
    fault: Fault | None = None
    then: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How an input ended.

    Attributes:
        wrong: what was wrong, in words; empty if nothing was.
        place: the innermost line of ours that an exception came through: failures of one place
            are most likely one fault.
    """

    status: int | None
    wrong: str = ""
    place: str = ""
    printed: str = ""


def run(given: Input, world: World) -> Outcome:
    """Change the world's files, run the command, judge it, and restore the world."""
    try:
        world.change(given.changes)
        with _failing(given.fault, world.folder):
            outcome = _run(given.words)
        if given.then and not outcome.wrong:
            after = _run(given.then)
            if after.wrong or after.status == 2:
                wrong = after.wrong or f"without the fault `sae {given.then[0]}` ends with 2"
                return Outcome(after.status, wrong, after.place, outcome.printed + after.printed)
        return outcome
    finally:
        world.restore()


@contextlib.contextmanager
def _failing(fault: Fault | None, folder: Path) -> Iterator[None]:
    if fault is not None:
        file_system_faults.arm(**vars(fault), below=folder)
    try:
        yield
    finally:
        if fault is not None:
            file_system_faults.disarm()


def _run(words: tuple[str, ...]) -> Outcome:
    from launch.cli import main

    out, err = io.StringIO(), io.StringIO()
    status: int | None = None
    wrong = place = ""
    threads = set(threading.enumerate())
    try:
        with _time_limit(), _as_a_user_runs_it(out, err):
            status = main(list(words))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        wrong, place = f"{type(error).__name__}: {str(error)[:300]}", _place(error)
        err.write("".join(traceback.format_exception(error))[-6000:])
    printed = err.getvalue()
    wrong = wrong or _wrong(status, printed, words) or _lingering(threads)
    return Outcome(status, wrong, place, printed)


def _lingering(before: set[threading.Thread]) -> str:
    """Threads for which Python would wait at its end; idle ones of a pool are told to end."""
    for thread in set(threading.enumerate()) - before:
        if thread.daemon:
            continue
        until = time.monotonic() + END_SECONDS
        while thread.is_alive() and not _is_idle(thread):
            # Orbax's threads raise in their own `join` what ended them; the command said its word.
            threading.Thread.join(thread, 0.01)
            if time.monotonic() > until:
                return f"the process can't end: thread {thread.name} is at work"
    return ""


def _is_idle(thread: threading.Thread) -> bool:
    """Is it a pool's, waiting for work? What still works would write into the next input's files.

    Waiting is a call into C, so that the innermost frame of Python is the pool's own.
    """
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code is concurrent.futures.thread._worker.__code__


def _wrong(status: int | None, printed: str, words: tuple[str, ...]) -> str:
    if status not in STATUSES:
        return f"exit status {status}"
    if "Traceback (most recent call last)" in printed:
        return f"a traceback is printed, exit status {status}"
    if printed.count("\n") > _MOST_LINES or len(printed) > _MOST_CHARACTERS:
        return f"{printed.count(chr(10))} lines, {len(printed)} characters are printed"
    reason = printed.rpartition(f"sae {words[0]}:")[2] if status == 2 else "-"
    if not reason.strip() or re.fullmatch(r"\s*(error:)?\s*", reason):
        return "exit status 2 without a reason"
    return ""


def _place(error: BaseException) -> str:
    """The innermost frame in our packages, as `file:line function`."""
    own = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(str(ROOT)) and "/tests/" not in frame.filename
        and ".venv" not in frame.filename
    ]  # fmt: skip
    return own[-1] if own else "?"


@contextlib.contextmanager
def _as_a_user_runs_it(out: io.StringIO, err: io.StringIO) -> Iterator[None]:
    """Output is kept; warnings, which the command doesn't show, are no errors."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """A command that is still at work is asked to stop (75), and later is taken to hang."""
    begun = time.monotonic()

    def ring(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - begun >= MOST_SECONDS:
            raise Hang(f"still at work after {MOST_SECONDS:.0f} s, asked to stop long before")
        if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, ASK_SECONDS, MOST_SECONDS - ASK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
