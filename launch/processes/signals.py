"""Signals that end a process as a request: finish the step, save, and exit with 75.

SIGTERM comes from schedulers, SIGINT from Ctrl-C, SIGHUP from a terminal that is closed or a lost
ssh, SIGUSR1 and SIGUSR2 from batch systems that announce a time limit.

A stage that saves its state as it runs polls the flag and leaves when it is set. A stage that
writes its result at the end has nothing to save, so there the signal interrupts at once.
A second SIGINT kills the process; what was committed before stays complete.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from activation_cache.runtime.errors import Interrupted

_ALWAYS = (signal.SIGTERM, signal.SIGINT)
_UNLESS_IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # nohup ignores SIGHUP


class StopFlag:
    """Callable: has a signal asked the work to stop?"""

    def __init__(self) -> None:
        self._asked = False
        self._at_once = False

    def __call__(self) -> bool:
        return self._asked

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a signal raises `Interrupted` on the spot.

        Raises:
            Interrupted: on a signal, also on one that came just before the block.
        """
        before, self._at_once = self._at_once, True
        try:
            if self._asked:
                raise Interrupted(_MESSAGE)
            yield
        finally:
            self._at_once = before

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Writes past `logging`: a handler may run inside a log call."""
        if self._asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
            return
        self._asked = True
        name = signal.Signals(number).name
        if self._at_once:
            raise Interrupted(_MESSAGE)
        note = f"\n{name}: saving and stopping (Ctrl-C again ends at once)\n"
        with contextlib.suppress(OSError):
            os.write(2, note.encode())


_MESSAGE = "stopped by a signal; what was finished before is saved"


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Catch the signals for the duration of the block.

    Those besides SIGTERM and SIGINT stay ignored if the process was started so. Outside the main
    thread, where Python can't catch signals, the flag is never set.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    asked = [one for one in _UNLESS_IGNORED if signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, flag.handle) for number in (*_ALWAYS, *asked)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
