"""JAX's persistent compilation cache: what was compiled once on a machine isn't compiled again.

A run that was preempted, the members of a sweep and the commands of a day compile the same
programs. JAX keys each by its operations, its shapes, its devices and its own version.

Programs for several CPU devices are never kept. A compiled program runs its sums over devices in
the same order on all of them; one loaded from the cache may not (seen with jaxlib 0.10.2, where
sums are in different loops). Then devices wait for each other until XLA aborts the process, or add
up values that don't belong together.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import tempfile
from pathlib import Path
from typing import Any

from activation_cache.storage.files import user_cache

logger = logging.getLogger(__name__)

_WORTH_KEEPING_SECONDS = 0.2  # of compiling; JAX's own default is 1


def keep_programs() -> None:
    """Let JAX keep compiled programs in the user's cache folder, one folder per kind of processor.

    The user's own choice (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE=false`) wins,
    and started processes inherit it. If the folder can't be made nothing is kept. With several CPU
    devices nothing is kept or loaded, whatever the user chose.

    Call it after the processes have joined, because it looks at all devices.
    """
    import jax

    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        logger.debug("compiled programs aren't kept: several CPU devices compute together")
        return
    chosen: Any = jax.config  # whose attributes no type checker knows
    if chosen.jax_compilation_cache_dir or not chosen.jax_enable_compilation_cache:
        return
    cache = user_cache()
    if cache is None:
        logger.info("compiled programs aren't kept, as this user has no home: set XDG_CACHE_HOME")
        return
    folder = cache / "compiled" / _processor_key()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a folder may be there and not be writable
    except OSError as error:
        logger.info("compiled programs aren't kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_SECONDS)


def _processor_key() -> str:
    """A name that differs between processors with different instructions.

    Machines share home folders, and a program for one CPU may use instructions another lacks.
    """
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:16]
