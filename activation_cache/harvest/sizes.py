"""The memory and disk that a harvest needs, logged and checked before it starts."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Sequence

from activation_cache.runtime.amounts import bytes_text
from activation_cache.runtime.errors import UserError
from activation_cache.storage.bucket import BucketPath
from activation_cache.storage.files import StoragePath
from activation_cache.store.manifest import Manifest
from activation_cache.store.store import PROVENANCE, provenance_layout, tap_layout
from activation_cache.store.tap_array import host_dtype
from activation_cache.store.writer import BUCKETS_IN_MEMORY

logger = logging.getLogger(__name__)


def bucket_bytes(plan: Manifest) -> int:
    """Bytes in memory of one bucket of a store, all taps and the provenance together."""
    item = 2 if host_dtype(plan.dtype) == "bfloat16" else 4
    row_bytes = item * sum(entry.width for entry in plan.sites) + 8  # 8: provenance
    return len(plan.bucket_span(0)) * row_bytes


def memory_here() -> tuple[str, int]:
    """This machine's name and bytes of memory."""
    return socket.gethostname(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(plan: Manifest, machines: Sequence[tuple[str, int]]) -> None:
    """Check that the buckets in flight fit the memory of the machines they are on.

    Args:
        machines: for every process its machine's name and memory.

    Raises:
        UserError: on some machine they don't fit.
    """
    for name, present in dict(machines).items():
        processes = [machine for machine, _ in machines].count(name)
        needed = processes * BUCKETS_IN_MEMORY * bucket_bytes(plan)
        if needed > present:
            fitting = plan.shuffling.bucket_rows * present // needed // 2
            each = f" in each of {processes} processes" if processes > 1 else ""
            raise UserError(
                f"buckets of {plan.shuffling.bucket_rows} rows at {len(plan.sites)} taps need "
                f"{bytes_text(needed)} of memory ({BUCKETS_IN_MEMORY} at once{each}) and "
                f"{name} has {bytes_text(present)}: lower cache.shuffle_rows to about {fitting}, "
                "or harvest fewer sites and layers into each store."
            )


def log_sizes(path: StoragePath, plan: Manifest, *, rows_left: int) -> None:
    """Log the memory and disk that a harvest needs; warn if the disk looks too small."""
    per_bucket = bucket_bytes(plan)
    arrays = [tap_layout(path, plan, entry.tap) for entry in plan.sites]
    arrays += [provenance_layout(path, plan, name) for name in PROVENANCE]
    to_write = sum(array.stored_bytes for array in arrays) * rows_left // plan.rows
    logger.info(
        "%d buckets of %d rows: %s of memory for %d at once, %s to write",
        plan.num_buckets,
        len(plan.bucket_span(0)),
        bytes_text(BUCKETS_IN_MEMORY * per_bucket),
        BUCKETS_IN_MEMORY,
        bytes_text(to_write),
    )
    if isinstance(path, BucketPath):
        return
    free = shutil.disk_usage(path).free
    if to_write > free:
        logger.warning(
            "%s has %s free and the rest of the store takes %s: it will not fit",
            path,
            bytes_text(free),
            bytes_text(to_write),
        )
