"""Make glibc's allocator keep freed memory, because every step allocates the same large arrays.

By default it returns each freed block above 32 MiB to the kernel, which clears every page again at
the next step. docs/performance.md has what keeping them is worth.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys

logger = logging.getLogger(__name__)

# malloc.h's numbers for mallopt, and what is asked for.
_ONE_ARENA = -8, 1  # only the first heap can grow without bound
_NO_MAPPED_BLOCKS = -4, 0
_NO_TRIMMING = -1, -1


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for this process; where it isn't glibc, do nothing.

    Where somebody has chosen already (a variable MALLOC_..., GLIBC_TUNABLES, or another library
    preloaded) nothing is changed. A process then keeps the largest sum of arrays it ever had.
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_")]
    if chosen or {"GLIBC_TUNABLES", "LD_PRELOAD"} & set(os.environ):
        return
    if not sys.platform.startswith("linux") or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return
    library = ctypes.CDLL(None)
    taken = [library.mallopt(*option) for option in (_ONE_ARENA, _NO_MAPPED_BLOCKS, _NO_TRIMMING)]
    logger.debug("mallopt answered %s: freed memory is kept", taken)
