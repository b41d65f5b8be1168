"""What the device can do at best: products by precision, and copying."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from activation_cache.precision import Precision
from activation_cache.products import einsum
from benchmarks.accelerator.results import Clock, Row, milliseconds, over_peak, precisions, timed


def rows(*, small: bool, clock: Clock) -> Iterator[Row]:
    """Copying first, then each precision: the encoder's product at Gemma 2 2B, and a square one."""
    yield _copy(2**16 if small else 2**28, clock=clock)
    sizes = {"encoder's product": (4096, 2304, 16_384), "square product": (8192,) * 3}
    if small:
        sizes = dict.fromkeys(sizes, (64,) * 3)
    for what, (B, D, F) in sizes.items():
        for precision in precisions():
            yield _product(what, B=B, D=D, F=F, precision=precision, clock=clock)


def _copy(num: int, *, clock: Clock) -> Row:
    """Bytes read and written by adding 1 to an array of float32."""
    array = jnp.zeros(num, jnp.float32)
    times = timed(partial(jax.jit(lambda a: a + 1), array), clock=clock)
    rate = 2 * array.nbytes / times.median / 1e9
    return Row(what="copy", rate=rate, unit="GB/s", **milliseconds(times))


def _product(what: str, *, B: int, D: int, F: int, precision: Precision, clock: Clock) -> Row:
    keys = jax.random.split(jax.random.key(0))
    x_BD, W_FD = (jax.random.normal(key, (n, D)) for key, n in zip(keys, (B, F), strict=True))
    product = jax.jit(partial(einsum, "bd,fd->bf", precision=precision))
    times = timed(partial(product, x_BD, W_FD), clock=clock)
    rate = 2 * B * D * F / times.median
    return Row(
        what=what,
        precision=precision,
        d_model=D,
        width=F,
        rate=rate / 1e12,
        unit="TFLOP/s",
        mfu=over_peak(rate, precision),
        **milliseconds(times),
    )
