"""The errors that a user can mend, and the one that a signal causes; all others are bugs."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend: the message states the rule, what was found and the remedy.

    The `sae` command prints it without a traceback and exits with 2.
    """


class StorageError(UserError):
    """Object storage refuses or doesn't answer; what is stored there may be in order."""


class Interrupted(Exception):
    """A signal asked the work to stop, and everything finished has been saved (exit 75)."""
