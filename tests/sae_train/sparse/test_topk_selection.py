"""The exact selection by pairs, and that of dead latents, against sorting in NumPy.

The encoder is the identity, so that pre-activations are what the test makes them.

Legend: B rows, F latents, of which there are as many as the model is wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_train.model.sharding import make_mesh
from sae_train.sparse import active_pairs
from sae_train.sparse.topk_step import Chosen, TopKParts
from tests.support.configs import make_config
from tests.support.oracles.reference_topk import largest

B, F, K, TILE = 16, 64, 3, 8
MESHES = [(1, 1), (2, 2), (4, 1), (1, 4)]


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active_pairs, "LARGEST_TILE", TILE)
        yield


def random_values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((B, F)).astype(np.float32)


def one_group() -> np.ndarray:
    """All of a row's large values are of one group, one to a tile: the bound is far too low."""
    values = 0.1 * np.abs(random_values())
    values[:, 5::TILE] += 1.0
    return values


def few_positive() -> np.ndarray:
    values = -np.abs(random_values())
    values[3, 7], values[4, [1, 60]], values[5, [1, 2, 3, 40]] = 0.5, 0.5, 0.25
    return values


CASES: dict[str, Callable[[], np.ndarray]] = {
    "random": random_values,
    "ties": lambda: np.round(2 * random_values()).astype(np.float32),
    "few positive": few_positive,
    "one group": one_group,
    "one tile": lambda: np.where(np.arange(F) // TILE == 6, 2.0, 0.0) + np.abs(random_values()),
    "ascending": lambda: np.sort(random_values(), axis=1),
    "descending": lambda: -np.sort(random_values(), axis=1),
    "nothing": lambda: -np.ones((B, F)),
    "long rows": lambda: random_values() * np.where(np.arange(B) < 2, 50.0, 1.0)[:, None],
}
# A row has places for 2 k + 16 pairs as large as the k-th. One tie of 64, and no more, is above.
ALL_EQUAL = np.ones((B, F), np.float32)


def compiled(architecture: str, mesh: tuple[int, int], **train: Any) -> Callable[..., Any]:
    """(values, dead) -> (chosen, predicted by the dead, W_dec)."""
    config = make_config(
        width=F,
        batch_size=B,
        tokens=B * 10,
        mesh=mesh,
        sparsity={"penalty": "none"},
        sae={"architecture": architecture, "k": K},
        step="sparse",
        **train,
    )
    parts = TopKParts(config, make_mesh(config.mesh))
    W_dec = np.random.default_rng(1).standard_normal((F, F)).astype(np.float32)

    @jax.jit
    def both(values_BF: Any, dead_F: Any) -> tuple[Chosen, Any]:
        weights = jnp.eye(F), jnp.asarray(W_dec), jnp.zeros(F), values_BF
        listed = parts.listed(dead_F)
        return parts.choose(*weights, listed), parts.wake(*weights, listed)[0]

    def call(values: np.ndarray, dead: np.ndarray | None = None) -> Any:
        dead = np.zeros(F, bool) if dead is None else dead
        return (*both(jnp.asarray(values, jnp.float32), jnp.asarray(dead)), W_dec)

    return call


def assert_chosen(chosen: Chosen, values: np.ndarray, W_dec: np.ndarray, *, over_batch: bool):
    f, least = largest(np.maximum(values.astype(np.float32), 0), K, over_batch=over_batch)
    np.testing.assert_array_equal(chosen.l0_B, (f > 0).sum(axis=1))
    np.testing.assert_array_equal(chosen.active_F, (f > 0).sum(axis=0))
    np.testing.assert_array_equal(chosen.least_B, np.broadcast_to(np.ravel(least), B))
    np.testing.assert_allclose(chosen.decoded_BD, f @ W_dec, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_the_largest_are_selected_whatever_the_values(architecture: str, mesh: tuple[int, int]):
    choose = compiled(architecture, mesh)
    for name, make in CASES.items():
        chosen, _, W_dec = choose(make())
        # The pairs of two long rows may all lie on one device of four.
        assert bool(chosen.fits) or name in ("one group", "long rows"), name
        assert_chosen(chosen, make(), W_dec, over_batch=architecture == "batch_topk")


@pytest.mark.parametrize("mesh", MESHES[:2])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_more_than_fit_are_selected_by_products(architecture: str, mesh: tuple[int, int]):
    choose = compiled(architecture, mesh, sparse_capacity=K)
    for values in (random_values(), ALL_EQUAL, one_group()):
        chosen, _, W_dec = choose(values)
        assert not bool(chosen.fits)
        assert float(chosen.per_row) > K
        assert_chosen(chosen, values, W_dec, over_batch=architecture == "batch_topk")


def test_a_tie_too_long_for_a_row_s_places_is_noticed():
    values = random_values()
    values[7] = 5.0
    chosen, _, W_dec = compiled("topk", (1, 1), sparse_capacity=F)(values)
    assert float(chosen.per_row) < F
    assert not bool(chosen.fits)
    assert_chosen(chosen, values, W_dec, over_batch=False)


def test_if_the_largest_come_last_a_second_pass_finds_room():
    """Ascending values pass every bound in force; from the last bound on few are left."""
    first_pass = K * (TILE * 2 - 4)
    chosen, _, W_dec = compiled("topk", (1, 1), sparse_capacity=2 * K)(CASES["ascending"]())
    assert bool(chosen.fits)
    assert float(chosen.per_row) <= 2 * K < first_pass
    assert_chosen(chosen, CASES["ascending"](), W_dec, over_batch=False)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_largest_dead_ones_predict(mesh: tuple[int, int]):
    wake, values = compiled("batch_topk", mesh), random_values()
    tied = np.round(2 * values)
    for num_dead in (0, 1, F // 2 - 1, F // 2, F // 2 + 1, F):
        dead = np.isin(np.arange(F), np.random.default_rng(num_dead).permutation(F)[:num_dead])
        for rows in (values, np.abs(values), np.abs(tied)):
            _, predicted, W_dec = wake(rows, dead)
            z = np.where(dead[None, :], np.maximum(rows, 0), 0.0)
            z = largest(z, F // 2)[0] if num_dead else z
            np.testing.assert_allclose(predicted, z @ W_dec, rtol=1e-5, atol=2e-5)
