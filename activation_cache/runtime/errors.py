"""The errors a user can cause, and the one a signal causes; everything else is a bug."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend: the message states the rule, what was found and the remedy.

    The `sae` command prints it without a traceback and exits with 2.
    """


class StorageError(UserError):
    """Object storage refuses or doesn't answer: it says nothing about what is stored there."""


class Interrupted(Exception):
    """A signal asked the work to stop and all that was finished has been saved (exit 75)."""
