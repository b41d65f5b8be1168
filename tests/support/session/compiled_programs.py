"""XLA compiles a program once for all tests of a process, and without optimising its machine code.

Most of the tests' processor time was XLA's: each test makes its own step, whose program another
test has compiled before. JAX's own caches ask which Python function it was; here the program's
text decides, so that nothing is taken for another's. The executable is the one that XLA made:
unlike with JAX's cache on disk, nothing is written and loaded again (what that does to several CPU
devices, launch/processes/compile_cache.py says).

JAX has no public place for this: `compile_or_get_cached` is private, and only tests replace it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from jax._src import compiler

# Machine code made quickly; what is fused, sharded and kept in memory is settled before it. As
# XLA_FLAGS, so that the processes that tests start compute the same bits.
QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
_FULL = [("xla_backend_optimization_level", 3), ("xla_cpu_use_fusion_emitters", True)]

overrides: list[tuple[str, Any]] = []  # of XLA_FLAGS, for what is compiled from now on


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """Programs compiled meanwhile are those that users have: XLA's defaults, and slow to make."""
    overrides[:] = _FULL
    try:
        yield
    finally:
        overrides.clear()


def share_compiled_programs() -> None:
    """From now on a program that was compiled in this process isn't compiled again."""
    compile_program = compiler.compile_or_get_cached
    compiled: dict[bytes, Any] = {}

    def compile_once(
        backend: Any, program: Any, devices: Any, options: Any, callbacks: Any, *rest: Any
    ) -> Any:
        options.env_option_overrides = [*options.env_option_overrides, *overrides]
        if callbacks:  # a program that calls into Python holds the address of what it calls
            return compile_program(backend, program, devices, options, callbacks, *rest)
        found = hashlib.sha256(f"{backend.platform} {devices}".encode())
        found.update(options.SerializeAsString())
        found.update(program.operation.get_asm(binary=False, enable_debug_info=False).encode())
        key = found.digest()
        if key not in compiled:
            compiled[key] = compile_program(backend, program, devices, options, callbacks, *rest)
        return compiled[key]

    compiler.compile_or_get_cached = compile_once
