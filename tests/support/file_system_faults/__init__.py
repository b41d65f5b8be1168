"""File systems that fail: a library for LD_PRELOAD, compiled on first use (`faults.c`)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

CALLS = ("open", "create", "read", "write", "rename", "fsync", "flock", "rmdir", "unlink", "mkdir")


def compiler() -> str | None:
    """The C compiler of this machine."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> Path:
    """Compile the library into `folder`; returns its path."""
    library, found = folder / "file_system_faults.so", compiler()
    assert found is not None, "a C compiler is needed"
    source = Path(__file__).with_name("faults.c")
    command = [found, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return library


def loaded() -> ctypes.CDLL | None:
    """The library in this process, if it was started with it (LD_PRELOAD)."""
    program = ctypes.CDLL(None)
    return program if hasattr(program, "fault_arm") else None


def arm(*, call: str, nth: int, error: int, lasting: bool, below: Path) -> None:
    """From now on the n-th `call` below a folder fails, and if `lasting` all after it."""
    library = loaded()
    assert library is not None
    library.fault_arm(call.encode(), ctypes.c_long(nth), error, int(lasting), str(below).encode())


def disarm() -> int:
    """Nothing fails any more; returns how many such calls there were since `arm`."""
    library = loaded()
    assert library is not None
    library.fault_disarm.restype = ctypes.c_long
    return int(library.fault_disarm())
