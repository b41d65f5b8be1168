"""The devices that JAX is to use: are they there?"""

from __future__ import annotations

import os

from activation_cache.runtime import processes
from activation_cache.runtime.errors import UserError

_BUSY = ("already in use", "busy", "ABORTED", "UNAVAILABLE")


def check_devices() -> None:
    """Let JAX find its devices, after the processes have joined.

    Raises:
        UserError: those that JAX_PLATFORMS names aren't there, or another process holds them.
        RuntimeError: they are held, in one process of several: perhaps by the one before it, which
            is ending, so that the next start may find them free.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        said = str(error).partition("(set JAX_PLATFORMS")[0].strip(" .:")
        if any(word in said for word in _BUSY) and processes.process_count() > 1:
            raise
        platforms = os.environ.get("JAX_PLATFORMS")
        asked = f"JAX_PLATFORMS={platforms} asks for" if platforms else "this installation asks for"
        raise UserError(
            f"{asked} devices that JAX doesn't find{f': {said}' if said else ''}. Install JAX for "
            "them (pip install 'open-gemma-scope[cuda]' or [tpu]), end what else uses them, or set "
            "JAX_PLATFORMS=cpu to compute without"
        ) from error
