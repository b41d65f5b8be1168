"""XLA compiles a program once for all tests of a process.

Most of the tests' processor time was XLA's: each test makes its own step, whose program another
test has compiled before. JAX's own caches ask which Python function it was; here the program's
text decides, so that nothing is taken for another's. The executable is the one that XLA made:
unlike with JAX's cache on disk, nothing is written and loaded again (what that does to several CPU
devices, launch/processes/compile_cache.py says).

JAX has no public place for this: `compile_or_get_cached` is private, and only tests replace it.
"""

from __future__ import annotations

import hashlib
from typing import Any

from jax._src import compiler


def share_compiled_programs() -> None:
    """From now on a program that was compiled in this process isn't compiled again."""
    compile_program = compiler.compile_or_get_cached
    compiled: dict[bytes, Any] = {}

    def compile_once(
        backend: Any, program: Any, devices: Any, options: Any, callbacks: Any, *rest: Any
    ) -> Any:
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
