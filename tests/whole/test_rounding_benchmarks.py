"""The benchmarks that round on a CPU what an accelerator rounds: products, their error's bound.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from activation_cache import products
from activation_cache.precision import AVAILABLE, Precision, resolve
from benchmarks.precision.candidates import coarse_margin, counts, operand, proven_margin
from benchmarks.precision.emulation import EMULATED, emulation
from benchmarks.precision.quality import TARGETS, Cell, Measured, Row, curve_at, table

D = 96
SPEC = "bd,fd->bf"


def _random(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, D)).astype(np.float32)


def _in_float64(x_BD: np.ndarray, W_FD: np.ndarray) -> np.ndarray:
    return x_BD.astype(np.float64) @ W_FD.astype(np.float64).T


def _emulated(precision: Precision, x_BD: np.ndarray, W_FD: np.ndarray) -> np.ndarray:
    product_BF = EMULATED[precision](SPEC, jnp.asarray(x_BD), jnp.asarray(W_FD))
    return np.asarray(product_BF, np.float64)


def test_the_emulated_bfloat16_product_is_that_of_operands_cast_to_bfloat16():
    x_BD, W_FD = _random(0, 8), _random(1, 16)
    expected = _in_float64(x_BD.astype(ml_dtypes.bfloat16), W_FD.astype(ml_dtypes.bfloat16))
    emulated = _emulated("bfloat16", x_BD, W_FD)
    np.testing.assert_allclose(emulated, expected, atol=1e-5)
    cast = products.PRODUCTS["bfloat16"](SPEC, jnp.asarray(x_BD), jnp.asarray(W_FD))
    np.testing.assert_allclose(cast, emulated, atol=1e-5)
    assert np.abs(expected - _in_float64(x_BD, W_FD)).max() > 1e-2


def test_the_emulated_three_passes_leave_out_the_product_of_the_low_parts():
    x_BD, W_FD = _random(0, 8), _random(1, 16)
    high_x, high_W = (a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (x_BD, W_FD))
    low_x, low_W = (
        (a - high).astype(ml_dtypes.bfloat16) for a, high in ((x_BD, high_x), (W_FD, high_W))
    )
    three = _in_float64(high_x, high_W) + _in_float64(high_x, low_W) + _in_float64(low_x, high_W)
    emulated = _emulated("bfloat16_3x", x_BD, W_FD)
    np.testing.assert_allclose(emulated, three, atol=1e-5)
    np.testing.assert_allclose(emulated, _in_float64(x_BD, W_FD), atol=3e-4)


def test_the_emulated_tf32_has_ten_bits_after_the_point():
    x = np.float32([[1 + 2.0**-10, 1 + 2.0**-12]])
    assert _emulated("tf32", x, np.ones_like(x)).item() == 2 + 2.0**-10


def test_the_emulation_ends_with_its_context():
    before = dict(products.PRODUCTS), dict(AVAILABLE)
    with emulation():
        assert resolve("tf32", platform="cpu") == "tf32"
        assert products.PRODUCTS["tf32"] is EMULATED["tf32"]
    assert before == (products.PRODUCTS, AVAILABLE)


def _adversarial() -> tuple[np.ndarray, np.ndarray]:
    """Rows along each other whose every number is rounded as far as can be, all down or all up."""
    down, up = 1 + 2.0**-8, 1 + 3 * 2.0**-8  # half-way between two bfloat16; the even one is taken
    scale = 2.0 ** np.random.default_rng(2).integers(-3, 4, 16)
    return np.float32([down * scale, up * scale]), np.float32([down * scale, up * scale])


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("rows", ["random", "adversarial", "of very different size"])
def test_no_cheap_product_is_further_from_the_exact_one_than_the_margin(passes, rows):
    if rows == "adversarial":
        x_BD, W_FD = _adversarial()
    else:
        x_BD, W_FD = _random(3, 64), _random(4, 64)
        if rows == "of very different size":
            x_BD, W_FD = x_BD**5, W_FD * np.logspace(-6, 3, D, dtype=np.float32)
    precision: Precision = "bfloat16" if passes == 1 else "bfloat16_3x"
    cheap_BF = _emulated(precision, x_BD, W_FD)
    x, W = (operand(jnp.asarray(rows), passes=passes) for rows in (x_BD, W_FD))
    sizes: Any = {"bias_L": jnp.zeros(len(W_FD)), "d_model": x_BD.shape[1]}
    error_BF = np.abs(cheap_BF - _in_float64(x_BD, W_FD))
    bound_BF = np.asarray(proven_margin(x, W, **sizes), np.float64)
    assert (error_BF <= bound_BF).all()
    if passes == 1:
        coarse_BF = np.asarray(coarse_margin(x, W, **sizes))
        assert (bound_BF <= coarse_BF * (1 + 1e-3)).all()
        if rows == "adversarial":  # and the bound is no larger than it must be
            assert (error_BF / coarse_BF).max() > 0.98


def test_with_the_margin_no_pair_is_lost_and_without_it_some_would_be():
    x_BD, W_FD = _random(5, 256), _random(6, 512) / np.float32(np.sqrt(D))
    theta_F = np.full(512, 2.0, np.float32)
    operands = (jnp.asarray(a) for a in (W_FD, np.zeros_like(theta_F), theta_F, x_BD))
    found = counts(*operands, 0.01)
    exact_BF = _in_float64(x_BD, W_FD) > 2.0 - 0.005
    cheap_BF = _emulated("bfloat16", x_BD, W_FD) > 2.0 - 0.005
    assert (exact_BF & ~cheap_BF).sum() > 0
    assert found["pairs"] == exact_BF.sum()
    for margins in ("proven_1", "coarse_1", "proven_3"):
        assert found[f"{margins}_lost"] == 0
    assert found["pairs"] <= found["proven_3"] < found["proven_1"] < found["coarse_1"]


def test_a_curve_is_read_between_its_two_nearest_saes():
    def row(l0: float, fvu: float, delta_loss: float) -> Row:
        return Row(Cell("demo", "float32", 0, 20), l0, fvu, delta_loss, 1.0)

    rows = [row(100, 0.01, 1.0), row(10, 0.04, 3.0), row(1000, 0.005, 0.0)]
    assert curve_at(rows, 100) == pytest.approx((0.01, 1.0))
    assert curve_at(rows, 10**1.5) == pytest.approx((0.02, 2.0))
    assert curve_at(rows, 10**0.5) == pytest.approx((0.08, 4.0))  # on beyond its end


def test_a_precision_is_compared_with_float32_at_its_own_l0_and_seed():
    def row(precision: Precision, seed: int, l0: float, factor: float) -> Row:
        target = min(TARGETS, key=lambda one: abs(one - l0))
        return Row(Cell("demo", precision, seed, target), l0, factor * l0**-0.5, factor, 1.0)

    exact = [row("float32", seed, l0, 1.0 + seed) for seed in (0, 1) for l0 in (20, 50, 100)]
    rounded = [row("bfloat16", 0, 55, 1.1), row("bfloat16", 1, 45, 2.0)]
    measured = Measured([*exact, *rounded])
    found = measured.changes("bfloat16", 50)
    assert (found.fvu, found.delta_loss) == pytest.approx((0.05, 0.05))
    spread = measured.spread
    assert (spread.fvu, spread.delta_loss) == pytest.approx((0.5**0.5, 0.5**0.5))
    assert [line.split(" | ")[-2] for line in table(measured.rows).splitlines()[2:]] == [
        "spread 70.71%",
        "spread 70.71%",
        "+5.00%",
        "spread 70.71%",
    ]
