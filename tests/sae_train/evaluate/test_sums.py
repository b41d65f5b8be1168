"""The sums of an evaluation and where it splices: masked tokens take no part in either."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_train.evaluate import splice
from sae_train.evaluate import sums as sums_module
from sae_train.evaluate.result import fvus
from sae_train.evaluate.sums import SaeSums, SiteSums, Subsets, reconstruct, sae_batch
from tests.support.oracles import reference
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


def summed(x, counted, groups, *, of=lambda number: True, batch=4) -> tuple[SiteSums, SaeSums]:
    """The sums of the batches whose number is `of` a process; the last batch is filled up."""
    sae, site = make_sae(D=x.shape[-1]), SiteSums()
    sums = SaeSums(error_TS=np.zeros(counted.shape, np.float32))
    for number, first in enumerate(range(0, len(x), batch)):
        filling = ((0, max(0, first + batch - len(x))), (0, 0))
        rows = slice(first, first + batch)
        one = jnp.asarray(np.pad(x[rows], (*filling, (0, 0))))
        where, group = np.pad(counted[rows], filling), np.pad(groups[rows], filling[0])
        site.start(one, where)
        if of(number):
            subsets = Subsets(2, group)
            usual = site.add(one, where, subsets)
            sums.add(sae_batch(sae, one, where), subsets, usual_BS=usual, first=first)
    return site, sums


def test_outlying_tokens_flatter_neither_of_the_other_fvus():
    """Against NumPy; two processes' sums added up give the same median to the last bit."""
    random = np.random.default_rng(0)
    x = random.standard_normal((10, 5, 6)).astype(np.float32) + 0.5
    counted = random.uniform(size=(10, 5)) < 0.7
    groups = np.arange(10) % 2
    x[3, 1], x[8, 2], counted[3, 1], counted[8, 2] = 40.0, -60.0, True, True
    site, sums = summed(x, counted, groups)
    sae, rows = make_sae(D=6), x.astype(np.float64)
    error = np.square(rows - np.asarray(sae(x))).sum(axis=2)
    norm = np.linalg.norm(rows, axis=2)
    usual = counted & (norm < 20)
    assert (counted & ~usual).sum() == 2
    want = reference.fvus(x, error, counted, first=4)
    assert fvus(site=site, sae=sums) == pytest.approx(want, rel=1e-5)
    spread = np.square(rows - rows[counted].mean(axis=0)).sum(axis=2)
    share = spread[counted & ~usual].sum() / spread[counted].sum()
    assert site.outlying_share == pytest.approx(share, rel=1e-5)
    for group in range(2):
        own = usual & (groups == group)[:, None]
        got = sums.usual_error_H[group] / site.usual_spread_H[group]
        variance = np.square(rows[own] - rows[own].mean(axis=0)).sum(axis=1).mean()
        assert got == pytest.approx(error[own].mean() / variance, rel=1e-5)
    parts = [summed(x, counted, groups, of=lambda n, i=i: n % 2 == i) for i in range(2)]
    for name in ("error_TS", "usual_error_H"):
        both = sum(getattr(one, name) for _, one in parts)
        np.testing.assert_allclose(both, getattr(sums, name), rtol=1e-12)
    tokens = int(counted.sum())
    added = SaeSums(error_TS=parts[0][1].error_TS + parts[1][1].error_TS)
    assert added.median_error(tokens) == sums.median_error(tokens)
    assert sum(one.usual_count_H for one, _ in parts).tolist() == site.usual_count_H.tolist()


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
