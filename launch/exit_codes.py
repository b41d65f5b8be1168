"""The exit statuses of `sae`, on which supervisors, batch scripts and manifests act."""

from __future__ import annotations

DONE = 0
BUG = 1  # any other status means a bug or a lost machine, too
MISTAKE = 2  # the user's, reported in one message: the same command would fail again
STOPPED = 75  # by a signal, everything saved: the same command goes on (sysexits.h, EX_TEMPFAIL)
