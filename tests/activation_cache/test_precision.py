"""What each platform has, and products as `activation_cache.precision` says they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache import products
from activation_cache.precision import Precision, PrecisionChoice, resolve
from activation_cache.products import einsum
from activation_cache.runtime.errors import UserError
from tests.support.oracles.rounded_products import dots, numpy_product

B, D, F = 24, 40, 56


@pytest.mark.parametrize(
    ("platform", "auto", "others"),
    [
        ("cpu", "float32", ("bfloat16",)),
        ("gpu", "bfloat16", ("float32", "bfloat16_3x", "tf32")),
        ("cuda", "bfloat16", ("float32", "bfloat16_3x", "tf32")),
        ("rocm", "bfloat16", ("float32", "bfloat16_3x", "tf32")),
        ("tpu", "bfloat16", ("float32", "bfloat16_3x")),
        ("METAL", "float32", ()),
    ],
)
def test_what_a_platform_has(platform: str, auto: Precision, others: tuple[Precision, ...]):
    assert resolve("auto", platform=platform) == auto
    for chosen in (auto, *others):
        assert resolve(chosen, platform=platform) == chosen
    for missing in {"float32", "bfloat16_3x", "tf32", "bfloat16"} - {auto, *others}:
        found = rf"^some.key is {missing}, and .* {platform} .*float32.*: set some.key"
        with pytest.raises(UserError, match=found) as raised:
            resolve(missing, platform=platform, key="some.key")
        assert all(f"{other}" in str(raised.value) for other in (auto, *others))


def operands(*, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = ((B, D), (F, D), (B, F))
    a, b, g = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return a, b, g


def with_gradients(precision: Precision, a: Any, b: Any, g: Any) -> list[jax.Array]:
    """The encoder's product, and what `g` sends back to both operands."""
    found, back = jax.vjp(partial(einsum, "bd,fd->bf", precision=precision), a, b)
    return [found, *back(g)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_product_and_its_gradients_see_rounded_operands(precision: Precision):
    a, b, g = operands()
    product = numpy_product(precision)
    expected = product(a, b.T), product(g, b), product(g.T, a)
    found = jax.jit(partial(with_gradients, precision))(a, b, g)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.float32
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * largest, rtol=0)


@pytest.mark.parametrize("kind", ["bd,fd->bf", "bf,fd->bd", "sb,bd->sd", "gbd,gde->gbe"])
def test_gradients_of_other_specifications(kind: str):
    """Beside JAX's own of the same product in float32, on numbers that rounding leaves alone."""
    rng, sizes = np.random.default_rng(1), {"b": 3, "d": 4, "f": 5, "s": 6, "g": 2, "e": 7}
    ours = partial(einsum, kind, precision="bfloat16")
    theirs = partial(einsum, kind, precision="float32")
    dims = kind.replace("->", ",").split(",")
    shapes = ([sizes[d] for d in dim] for dim in dims)
    a, b, g = (jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in shapes)
    np.testing.assert_array_equal(ours(a, b), theirs(a, b))
    gradients = (jax.vjp(one, a, b)[1](g) for one in (ours, theirs))
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_no_product_of_bfloat16_mixes_types():
    a, b, g = operands()
    traced = jax.jit(partial(with_gradients, "bfloat16")).trace(a, b, g)
    assert dots(traced.jaxpr) == [("bfloat16", "bfloat16", "float32")] * 3


@pytest.mark.parametrize(
    ("precision", "platform", "asked"),
    [
        ("float32", "cuda", "precision = [HIGHEST, HIGHEST]"),
        ("tf32", "cuda", "lhs_precision_type = tf32"),
        ("bfloat16_3x", "cuda", "num_primitive_operations = 3"),
        ("bfloat16_3x", "tpu", "num_primitive_operations = 3"),
        ("bfloat16", "cuda", "(tensor<24x40xbf16>, tensor<56x40xbf16>) -> tensor<24x56xf32>"),
        ("bfloat16", "tpu", "(tensor<24x40xbf16>, tensor<56x40xbf16>) -> tensor<24x56xf32>"),
    ],
)
def test_what_the_compilers_are_asked_for(precision: Precision, platform: str, asked: str):
    """Three products, and each of them so: the gradients of a preset ask for it too."""
    traced = jax.jit(partial(with_gradients, precision)).trace(*operands())
    lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
    products_ = [line for line in lines if "dot_general" in line]
    assert len(products_) == 3
    assert asked in products_[0]
    if precision != "bfloat16":
        assert all(asked in line for line in products_)
    assert all("bf16" in line for line in products_) == (precision.startswith("bfloat16"))


def test_float32_is_what_it_was():
    """The program of JAX's own einsum at the highest precision, to the last equation."""
    a, b, _ = map(jnp.asarray, operands())
    ours = jax.make_jaxpr(partial(einsum, "bd,fd->bf", precision="float32"))(a, b)
    theirs = jax.make_jaxpr(partial(jnp.einsum, "bd,fd->bf", precision="highest"))(a, b)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("choice", PrecisionChoice.__args__)
def test_sums_that_are_written_out_see_what_a_product_sees(choice: PrecisionChoice):
    precision = resolve(choice, platform="gpu")
    a, _, _ = operands()
    seen = jax.jit(partial(products.rounded, precision=precision))(a)
    kept = products.operand(jnp.asarray(a), precision=precision)
    in_kernel = products.rounded_in_kernel(jnp.asarray(a), precision=precision)
    np.testing.assert_array_equal(in_kernel, seen)
    np.testing.assert_array_equal(kept.astype(jnp.float32), seen)
    assert kept.dtype == (jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    assert (np.asarray(seen) != a).any() == (precision == "bfloat16")
