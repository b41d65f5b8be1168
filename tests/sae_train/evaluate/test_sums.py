"""The sums of an evaluation and where it splices: masked tokens take no part in either."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_train.evaluate import splice
from sae_train.evaluate import sums as sums_module
from sae_train.evaluate.sums import SiteSums, reconstruct, sae_batch
from tests.support.saes import make_sae, reference_latents


def test_splices_leave_masked_positions_alone():
    sae = make_sae(D=6)
    acts = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6)), jnp.bfloat16)
    where = jnp.asarray(np.random.default_rng(1).uniform(size=(2, 5)) < 0.5)
    spliced = splice.splice_sae(acts, (sae, where))
    zeroed = splice.splice_zero(acts, where)
    assert spliced.dtype == zeroed.dtype == jnp.bfloat16
    for out, inside in ((spliced, sae(acts).astype(jnp.bfloat16)), (zeroed, 0 * acts)):
        assert np.array_equal(out[~where], acts[~where])
        np.testing.assert_allclose(
            out[where].astype(np.float32), inside[where].astype(np.float32), rtol=1e-2
        )  # one unit in the last place of bfloat16


def test_what_is_masked_has_no_influence():
    """NaN at every position that isn't counted: any leak would show."""
    sae = make_sae(D=6)
    x = np.random.default_rng(0).standard_normal((3, 5, 6)).astype(np.float32)
    counted = np.random.default_rng(1).uniform(size=(3, 5)) < 0.6
    poisoned = np.where(counted[..., None], x, np.nan)
    clean, leaky = sae_batch(sae, x, counted), sae_batch(sae, poisoned, counted)
    for name in ("squared_error_BS", "active_BS", "fired_F"):
        assert np.array_equal(getattr(clean, name), getattr(leaky, name)), name
    sums = SiteSums()
    sums.add(jnp.asarray(poisoned), counted)
    rows = x[counted].astype(np.float64)
    spread = ((rows - rows.mean(axis=0)) ** 2).sum()
    assert sums.spread_S.sum() == pytest.approx(spread, rel=1e-5)


def test_spread_survives_a_mean_a_thousand_times_larger():
    random = np.random.default_rng(0)
    x = random.standard_normal((40, 4, 8)) * 0.3 + 1000 * random.standard_normal(8)
    x = x.astype(np.float32)
    sums = SiteSums()
    for part in np.split(x, 8):
        sums.add(jnp.asarray(part), np.ones(part.shape[:2], bool))
    rows = x.reshape(-1, 8).astype(np.float64)
    spread = ((rows - rows.mean(axis=0)) ** 2).sum()
    assert sums.spread_S.sum() == pytest.approx(spread, rel=1e-4)


@pytest.mark.parametrize("elements", [1, 24, 100, 10**9])
def test_chunks_of_rows_change_nothing(monkeypatch, elements):
    sae = make_sae(D=6)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((13, 6)), jnp.float32)
    counted = jnp.arange(13) % 3 > 0
    monkeypatch.setattr(sums_module, "MAX_LATENT_ELEMENTS", elements)
    decoded, l0, fired = reconstruct(sae, x, counted)
    latents = reference_latents(sae, np.asarray(x))
    np.testing.assert_allclose(decoded, sae(x), rtol=1e-5, atol=1e-5)
    assert np.array_equal(l0, (latents > 0).sum(axis=1))
    assert np.array_equal(fired, (latents > 0)[np.asarray(counted)].sum(axis=0))


def test_saes_are_arguments_not_constants():
    sae = make_sae(D=36, F=40)
    x, counted = jnp.ones((1, 16, 36)), jnp.ones((1, 16), bool)
    lowered = jax.make_jaxpr(lambda s: sae_batch.__wrapped__(s, x, counted))(sae)
    assert len(lowered.in_avals) == 5
