"""The parts of the sparse step, each against NumPy: pairs, sums over them, lazy second moments.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_train.model.sharding import make_mesh
from sae_train.sparse import active_pairs, segment_sums
from sae_train.sparse.kernels.backend import Parts, parts_of
from sae_train.sparse.kernels.mode import without_gpu
from sae_train.step import optimiser
from sae_train.step.schedule import learning_rate_schedule, scheduled
from tests.support.configs import make_config

DECAYING = {"peak": 1e-3, "warmup_steps": 0, "decay_steps": 4000, "decay_to": 0.2}


@pytest.fixture(params=["xla", "pallas"])
def parts(request: pytest.FixtureRequest) -> Iterator[Parts]:
    """The parts of a step as XLA compiles them, and as interpreted kernels."""
    config = make_config(step="sparse", kernels=request.param)
    with without_gpu("interpret"):
        yield parts_of(config, make_mesh(config.mesh))


def select(parts: Parts, *operands: jax.Array, capacity: int) -> active_pairs.Pairs:
    options: dict[str, Any] = {"bandwidth": 0.5, "capacity": capacity, "precision": "float32"}
    return jax.jit(partial(parts.select, **options))(*operands)


def random_case(*, B: int, F: int, D: int = 8, seed: int = 0):
    rng = np.random.default_rng(seed)
    W_enc, x = rng.standard_normal((F, D)), rng.standard_normal((B, D))
    x[: B // 8] *= 20  # rows of a far larger L0
    bias, theta = 0.1 * rng.standard_normal(F), np.abs(rng.standard_normal(F))
    theta[: F // 4] = 1e6  # latents that never fire
    return tuple(jnp.asarray(a, jnp.float32) for a in (W_enc, bias, theta, x))


@pytest.mark.parametrize(
    ("B", "F"), [(64, 96), (63, 96), (1, 8), (300, 70), (100, 2560), (4, 1031)]
)
def test_pairs_are_all_that_are_active_or_in_the_window(B: int, F: int, parts: Parts):
    W_enc, bias, theta, x = random_case(B=B, F=F)
    found = select(parts, W_enc, bias, theta, x, capacity=B * F)
    pre = np.asarray(x) @ np.asarray(W_enc).T + np.asarray(bias)[None, :]
    wanted = (pre > np.asarray(theta)[None, :]) | (np.abs(pre - np.asarray(theta)[None, :]) < 0.25)
    assert (wanted & ~(pre > np.asarray(theta)[None, :])).any() or B == 1
    latent, row = np.nonzero(wanted.T)
    total = int(found.total)
    assert total == len(row)
    np.testing.assert_array_equal(found.counts_F, wanted.sum(axis=0))
    order = np.lexsort((found.row_P[:total], found.latent_P[:total]))
    np.testing.assert_array_equal(found.latent_P[:total], latent)
    np.testing.assert_array_equal(np.asarray(found.row_P)[order], row)
    np.testing.assert_allclose(np.asarray(found.pre_P)[order], pre[row, latent], atol=1e-4)
    assert set(np.asarray(found.latent_P[total:]).tolist()) <= {F}


def test_a_bfloat16_product_finds_all_of_float32_s_pairs_and_few_more():
    B, F = 100, 200
    W_enc, bias, theta, x = random_case(B=B, F=F, D=64)
    theta = 10 * theta
    options: dict[str, Any] = {"bandwidth": 2.0, "capacity": B * F, "precision": "float32"}

    def searched(rounded: bool) -> np.ndarray:
        """Pre-activations [B, F] of what was found, NaN elsewhere."""
        select = partial(active_pairs.select_pairs, **options, searched_rounded=rounded)
        found = jax.device_get(jax.jit(select)(W_enc, bias, theta, x))
        assert int(found.total) == found.counts_F.sum()
        pre_BF = np.full((B, F + 1), np.nan)  # the last column takes what holds no pair
        pre_BF[found.row_P, found.latent_P] = found.pre_P
        return pre_BF[:, :F]

    plain_BF, found_BF = searched(False), searched(True)
    pairs_BF = np.isfinite(plain_BF)
    np.testing.assert_allclose(found_BF[pairs_BF], plain_BF[pairs_BF], atol=1e-4)
    in_vain_BF = np.isfinite(found_BF) & ~pairs_BF
    assert 0.01 < in_vain_BF.sum() / pairs_BF.sum() < 0.2
    edge_BF = np.broadcast_to(np.asarray(theta) - 1.0, (B, F))
    assert (found_BF[in_vain_BF] <= edge_BF[in_vain_BF] + 1e-4).all()  # so without a gradient


def test_pairs_without_a_place_are_counted(parts: Parts):
    case = random_case(B=64, F=96)
    whole, few = (select(parts, *case, capacity=capacity) for capacity in (64 * 96, 100))
    assert float(few.total) == float(whole.total) > 100
    np.testing.assert_array_equal(few.counts_F, whole.counts_F)
    if parts.select is active_pairs.select_pairs:
        np.testing.assert_array_equal(few.row_P, whole.row_P[:100])
    else:  # a kernel keeps none of too many
        assert set(np.asarray(few.latent_P).tolist()) == {96}


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 2**32 - 1), st.data())
def test_the_nth_set_bit(word: int, data: st.DataObject):
    places = [place for place in range(32) if word >> place & 1]
    rank = data.draw(st.integers(0, len(places) - 1))
    words = jnp.asarray([word], jnp.uint32)
    assert int(active_pairs.nth_set_bit(words, jnp.asarray([rank], jnp.int32))[0]) == places[rank]


@pytest.mark.parametrize("block", [4, 1024])
def test_decoding_pairs_is_the_product(block: int, monkeypatch: pytest.MonkeyPatch, parts: Parts):
    monkeypatch.setattr(segment_sums, "BLOCK", block)
    W_enc, bias, theta, x = random_case(B=63, F=96)
    found = select(parts, W_enc, bias, theta, x, capacity=63 * 96)
    theta_P = np.append(theta, np.inf)[np.asarray(found.latent_P)]
    latents_P = jnp.where(found.pre_P > theta_P, found.pre_P, 0.0)
    W_dec = np.random.default_rng(1).standard_normal((96, 8))
    W_dec = jnp.asarray(W_dec, jnp.float32)
    decode = jax.jit(partial(parts.decode, num_rows=63, precision="float32"))
    decoded, l0 = decode(found, latents_P, W_dec)
    pre = np.asarray(x) @ np.asarray(W_enc).T + np.asarray(bias)[None, :]
    np.testing.assert_array_equal(l0, (pre > np.asarray(theta)[None, :]).sum(axis=1))
    expected = np.where(pre > np.asarray(theta)[None, :], pre, 0.0).astype(np.float64) @ W_dec
    np.testing.assert_allclose(decoded, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("largest", [100, 1 << 29])
def test_keys_sort_with_their_places_in_one_word_or_in_two(largest: int):
    keys = np.random.default_rng(0).integers(0, largest, 200).astype(np.int32)
    keys[::3] = 7  # equal keys keep their order
    found, places = segment_sums._sort_keys(jnp.asarray(keys), largest=largest)
    expected = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(found, keys[expected])


def test_lazy_updates_are_optax_s_adam_over_four_thousand_steps():
    """A gradient in one step of a hundred; rows that rest wait, and catch up when touched.

    Optax's own chain, step by step, is the reference.
    """
    steps, width = 4000, 64
    config = make_config(width=width, tokens=64 * steps, learning_rate=DECAYING)

    schedule = learning_rate_schedule(config.train.learning_rate, steps=steps)
    adam = optax.chain(
        optax.scale_by_rms(decay=0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.scale_by_learning_rate(lambda step: 1e-3 * schedule(step)),
    )
    rng = np.random.default_rng(0)
    lazy, v_lazy = {"b_enc": jnp.ones(width)}, {"b_enc": jnp.zeros(width)}
    dense, state = lazy, adam.init(lazy)
    touched_in = jnp.zeros(width, jnp.int32)

    @jax.jit
    def both(dense, state, lazy, v_lazy, touched_in, gradient_F, t, scalars):
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to a whole power
            updates, state = adam.update({"b_enc": gradient_F}, state)
        new, v_new = optimiser.update(
            lazy,
            {"b_enc": gradient_F},
            second_moment=v_lazy,
            decay_F=optimiser.waited_decay(t - 1 - touched_in, train=config.train),
            scalars=scalars,
            config=config,
        )
        touched_F = gradient_F != 0
        keep = partial(jax.tree.map, lambda new, old: jnp.where(touched_F, new, old))
        touched_in = jnp.where(touched_F, t, touched_in)
        return (
            optax.apply_updates(dense, updates),
            state,
            keep(new, lazy),
            keep(v_new, v_lazy),
            touched_in,
        )

    for t in range(1, steps + 1):
        touched_F = rng.random(width) < 0.01
        gradient_F = np.where(touched_F, rng.standard_normal(width), 0.0).astype(np.float32)
        scalars = scheduled(config.train, step=t - 1)
        dense, state, lazy, v_lazy, touched_in = both(
            dense, state, lazy, v_lazy, touched_in, gradient_F, jnp.int32(t), scalars
        )
    np.testing.assert_allclose(lazy["b_enc"], dense["b_enc"], rtol=1e-6, atol=1e-6)
    assert np.median(np.abs(np.asarray(lazy["b_enc"]) - 1)) > 1e-2
    waited = optimiser.waited_decay(steps - touched_in, train=config.train)
    np.testing.assert_allclose(
        v_lazy["b_enc"] * waited, optax.tree.get(state, "nu")["b_enc"], rtol=1e-4
    )  # float32 rounds once a step in the one, and once a touch in the other
