"""Products of each precision, in NumPy's float64 and, for CPUs to show them, in JAX.

Nothing here is ours: bits are cut off float32 numbers, halves rounded to even. `dots` says which
products a program has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

# Bits after the point that an operand keeps.
BITS = {"float32": 23, "tf32": 10, "bfloat16": 7}


def cut(values: np.ndarray, bits: int) -> np.ndarray:
    """Float32 numbers rounded to so many bits after the point, as float64."""
    words = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    drop = 23 - bits
    if drop:
        words = words + (1 << (drop - 1)) - 1 + ((words >> drop) & 1)
        words = (words >> drop) << drop
    return words.astype(np.uint32).view(np.float32).astype(np.float64)


def numpy_product(precision: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The matrix product as hardware of a precision makes it, but for sums in float64."""

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if precision != "bfloat16_3x":
            return cut(a, BITS[precision]) @ cut(b, BITS[precision])
        (high_a, low_a), (high_b, low_b) = (_two(operand) for operand in (a, b))
        return high_a @ high_b + high_a @ low_b + low_a @ high_b

    return product


def _two(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high = cut(values, 7)
    return high, cut(np.asarray(values, np.float32) - high, 7)


def jax_product(precision: str) -> Callable[[str, jax.Array, jax.Array], jax.Array]:
    """The einsum that a GPU makes of a preset that a CPU doesn't have; without gradients."""

    def short(x: jax.Array, bits: int) -> jax.Array:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits)

    def exact(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.numpy.einsum(spec, a, b, precision="highest")

    def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        if precision == "tf32":
            return exact(spec, short(a, 10), short(b, 10))
        high_a, high_b = short(a, 7), short(b, 7)
        low_a, low_b = short(a - high_a, 7), short(b - high_b, 7)
        small = exact(spec, high_a, low_b) + exact(spec, low_a, high_b)
        return exact(spec, high_a, high_b) + small

    return product


def dots(jaxpr: Any) -> list[tuple[str, ...]]:
    """The dtypes of every product's operands and result, also of those in inner programs."""
    found = []
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            arrays = (*equation.invars, *equation.outvars)
            found.append(tuple(array.aval.dtype.name for array in arrays))
        for inner in jaxprs_in_params(equation.params):
            found += dots(inner)
    return found
