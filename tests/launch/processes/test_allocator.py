"""Freed memory is kept by a stage's process, unless somebody has chosen otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.pipeline import ROOT

MIB = 2**20
PROGRAM = """
import resource, numpy as np
from launch.processes.allocator import keep_freed_memory

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()

keep_freed_memory()
before = resident()
array = np.ones(128 * 2**20, np.uint8)
del array
print(resident() - before)
"""


def kept_after_free(**environment: str) -> int:
    """Bytes that a fresh process holds more of after an array of 128 MiB has come and gone."""
    unset = {"GLIBC_TUNABLES", "LD_PRELOAD"}
    own = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("MALLOC_") and key not in unset
    }
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=own | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(told.stdout)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")
def test_freed_memory_is_kept() -> None:
    assert kept_after_free() > 100 * MIB


@pytest.mark.parametrize("chosen", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_somebodys_own_choice_stands(chosen: str) -> None:
    value = "2" if chosen == "MALLOC_ARENA_MAX" else "glibc.malloc.arena_max=2"
    assert kept_after_free(**{chosen: value}) < 100 * MIB
