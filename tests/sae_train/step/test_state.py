"""The initial state and what is read off it: seeds of 64 bits, dead latents at any count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from activation_cache.store.order import derive_key
from sae_train.model.sharding import make_mesh
from sae_train.step.state import init_state, is_dead
from tests.support.configs import make_config


def test_every_bit_of_a_seed_counts():
    config = make_config(width=8)
    mesh = make_mesh(config.mesh)
    seeds = (1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33 + 1, 2**63 + 1, 2**64 - 1)
    drawn = {}
    for seed in seeds:
        with jax.disable_jit():  # a program for each seed would take a second to compile
            W_dec = init_state(config.sae, d_model=4, seed=seed, mesh=mesh).params["W_dec"]
        drawn[seed] = np.asarray(W_dec).tobytes()
        if seed < 2**32:  # as before the upper bits counted
            rows = jax.random.uniform(jax.random.key(seed), (8, 4), minval=-1.0, maxval=1.0)
            expected = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
            np.testing.assert_allclose(W_dec, expected, rtol=1e-6)
    assert len({*drawn.values()}) == len(seeds)
    assert len({derive_key(seed, 3) for seed in seeds}) == len(seeds), "the order's too"


def test_no_latent_is_dead_before_a_number_of_tokens_that_no_run_has():
    never_F, step = jnp.zeros(3, jnp.int32), jnp.int32(2**31 - 2)
    for tokens, dead in ((2**63 - 1, False), (64 * (2**31 - 2), True)):
        train = make_config(dead_after_tokens=tokens).train
        assert is_dead(never_F, step=step, train=train).all() == dead
