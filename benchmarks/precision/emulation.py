"""Products as accelerators make them, on a CPU, for benchmarks and tests.

Operands are rounded as an accelerator rounds them, then multiplied and summed in float32. The
product of two numbers of 8 bits, or of 8 and 16, is exact in float32: only the order of a sum can
differ from an accelerator's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from activation_cache import products
from activation_cache.precision import AVAILABLE, Precision


def rounded_to(x: Array, *, bits: int) -> Array:
    """Numbers rounded to nearest with `bits` bits after the point, in float32."""
    return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=bits)


def rounded_product(spec: str, a: Array, b: Array, *, bits: int) -> Array:
    """The float32 product of operands with `bits` bits after the point: bfloat16 has 7, TF32 10."""
    return _float32(spec, rounded_to(a, bits=bits), rounded_to(b, bits=bits))


def product_in_three_passes(spec: str, a: Array, b: Array) -> Array:
    """hi·hi + hi·lo + lo·hi of operands that are sums hi + lo of two bfloat16 numbers.

    As two products: hi has 8 bits and hi + lo 16, so what they multiply to is exact in float32.
    """
    high_a, high_b = rounded_to(a, bits=7), rounded_to(b, bits=7)
    low_a, low_b = rounded_to(a - high_a, bits=7), rounded_to(b - high_b, bits=7)
    return _float32(spec, low_a, high_b) + _float32(spec, high_a, high_b + low_b)


_float32 = products.PRODUCTS["float32"]
EMULATED = {
    "bfloat16": products.with_gradients(partial(rounded_product, bits=7)),
    "tf32": products.with_gradients(partial(rounded_product, bits=10)),
    "bfloat16_3x": products.with_gradients(product_in_three_passes),
}


@contextmanager
def emulation() -> Iterator[None]:
    """Let this CPU compute every precision as an accelerator would."""
    before = dict(products.PRODUCTS), AVAILABLE["cpu"]
    products.PRODUCTS.update(EMULATED)
    AVAILABLE["cpu"] = get_args(Precision)
    try:
        yield
    finally:
        products.PRODUCTS.update(before[0])
        AVAILABLE["cpu"] = before[1]
