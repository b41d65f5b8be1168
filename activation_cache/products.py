"""How products of float32 arrays are made: the one place that decides.

Sums are float32 always, and so are the results. Whoever makes a product is told its `Precision` by
whoever called, and the first of them asked `activation_cache.precision.resolve`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from activation_cache.precision import Precision

# Of the einsum of a specification and two operands: a float32 array.
Product = Callable[[str, Array, Array], Array]


def einsum(
    spec: str, a: Float[Array, "..."], b: Float[Array, "..."], *, precision: Precision
) -> Float[Array, "..."]:
    """`jnp.einsum` of two operands, in float32; its gradients are products of the same precision.

    Args:
        spec: names both operands' dims and the result's; each dim of an operand is the other's or
            the result's too.
    """
    return PRODUCTS[precision](spec, a, b)


def einsum_in_kernel(
    spec: str, a: Float[Array, "..."], b: Float[Array, "..."], *, precision: Precision
) -> Float[Array, "..."]:
    """`einsum` for use in Pallas kernels, which Triton's lowering knows: it has no gradients."""
    product = _of_bfloat16 if precision == "bfloat16" else PRODUCTS[precision]
    return product(spec, a, b)


def rounded(x: Float[Array, "*dims"], *, precision: Precision) -> Float[Array, "*dims"]:
    """What a product at this precision sees of an operand, for sums that are written out.

    In float32. Sums that are written out make no use of tensor cores, so only bfloat16, whose
    rounding is the same everywhere, rounds them like the products that they stand for.
    """
    return ROUNDED[precision](x)


def rounded_in_kernel(x: Float[Array, "*dims"], *, precision: Precision) -> Float[Array, "*dims"]:
    """`rounded` for use in Pallas kernels."""
    return operand(x, precision=precision).astype(jnp.float32)


def operand(x: Float[Array, "*dims"], *, precision: Precision) -> Float[Array, "*dims"]:
    """An operand as it is best kept for several products: in half the bytes at bfloat16."""
    return x.astype(jnp.bfloat16) if precision == "bfloat16" else x


def with_gradients(product: Product) -> Product:
    """The same product, whose gradients are made by it too.

    JAX's own gradient of a rounded operand rounds what comes out of a product and not what goes in.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def differentiable(spec: str, a: Array, b: Array) -> Array:
        return product(spec, a, b)

    def forwards(spec: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
        return product(spec, a, b), (a, b)

    def backwards(spec: str, operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
        a, b = operands
        dims_a, dims_b, dims = _dims(spec)
        g_a = differentiable(f"{dims},{dims_b}->{dims_a}", g, b)
        g_b = differentiable(f"{dims},{dims_a}->{dims_b}", g, a)
        return g_a.astype(a.dtype), g_b.astype(b.dtype)

    differentiable.defvjp(forwards, backwards)
    return differentiable


def _dims(spec: str) -> tuple[str, str, str]:
    operands, result = spec.replace(" ", "").split("->")
    a, b = operands.split(",")
    return a, b, result


def _of_bfloat16(spec: str, a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _at(precision: jax.lax.Precision | jax.lax.DotAlgorithmPreset) -> Product:
    def product(spec: str, a: Array, b: Array) -> Array:
        # Tests take the same steps in float64, whose products stay that.
        wide = jnp.float32 if a.dtype == jnp.bfloat16 else None
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=wide)

    return product


def _unchanged(x: Array) -> Array:
    return x


# These tables are read when a program is traced: a benchmark that shows on a CPU what an
# accelerator would compute replaces entries, here and in
# `activation_cache.precision.AVAILABLE`.
PRODUCTS: dict[Precision, Product] = {
    "float32": _at(jax.lax.Precision.HIGHEST),
    "bfloat16_3x": _at(jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3),
    "tf32": _at(jax.lax.DotAlgorithmPreset.TF32_TF32_F32),
    "bfloat16": with_gradients(_of_bfloat16),
}
ROUNDED: dict[Precision, Callable[[Array], Array]] = {
    "float32": _unchanged,
    "bfloat16_3x": _unchanged,
    "tf32": _unchanged,
    # Not two casts, which XLA may leave out.
    "bfloat16": partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7),
}
