"""The aux loss that revives dead latents of a JumpReLU, against float64, on meshes and by turns.

Legend: B rows, D model width, F latents.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from sae_train.config.run import Config
from sae_train.model.sharding import make_mesh
from sae_train.step import revive
from sae_train.step.schedule import scheduled
from sae_train.step.state import TrainState
from sae_train.train.train_step import make_train_step
from tests.sae_train.step.test_step import biased_rows, biased_state, plain_threshold
from tests.support.configs import make_config
from tests.support.oracles import reference
from tests.support.oracles.rows_off_edges import off_edges

B, D, F, STEPS, K = 64, 24, 128, 8, 12


def config_of(coefficient: float = 0.5, *, dead_after: int = 2, **options: Any) -> Config:
    """A run whose latents are mostly silent from the first step on."""
    return make_config(
        width=F,
        bandwidth=0.05,
        threshold_init=0.45,
        sparsity={"coefficient": 0.01, "warmup_steps": 0},
        sae={"revive_coefficient": coefficient},
        batch_size=B,
        tokens=B * STEPS,
        dead_after_tokens=B * dead_after,
        learning_rate={"peak": 1e-3, "warmup_steps": 0},
        **options,
    )


def oracle_of(config: Config, state: TrainState) -> reference.Trainer:
    return reference.Trainer(
        params=plain_threshold(state, "log"),
        bandwidth=0.05,
        log_threshold=True,
        revive=config.sae.revive_coefficient,
        revive_k=K,
        dead_after=2,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "mesh"), [("dense", (1, 1)), ("dense", (2, 4)), ("sparse", (2, 4))]
)
def test_steps_follow_the_float64_reference(
    step: str, mesh: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(revive, "BLOCK", 16)
    monkeypatch.setattr(revive, "SELECTED", K)
    config = config_of(step=step, sparse_capacity=F, mesh=mesh)
    state = biased_state(config, d_model=D)
    oracle, rng, revived = oracle_of(config, state), np.random.default_rng(0), []
    take_step = make_train_step(config, input_scale=3.5, mesh=make_mesh(config.mesh))
    for number in range(STEPS):
        rows = off_edges(lambda: biased_rows(rng), oracle.params, scale=3.5, bandwidth=0.05)
        state, metrics = take_step(state, rows, scheduled(config.train, step=number))
        expected = oracle.step(rows / 3.5, rate=1e-3, sparsity=reference.Sparsity("l0", 0.01))
        revived.append(expected["revived"])
        np.testing.assert_allclose(metrics.loss, expected["loss"], rtol=1e-5)
        np.testing.assert_array_equal(state.last_fired, oracle.last_fired)
    assert revived[:2] == [0, 0]
    assert K < max(revived) < F, "some are dead, more than are selected in a row"
    for name, value in plain_threshold(state, "log").items():
        # Adam divides by |g|: a gradient near 0 turns float32 noise into a visible step.
        np.testing.assert_allclose(value, oracle.params[name], rtol=1e-4, atol=2e-5, err_msg=name)
    late_F = STEPS - np.asarray(state.last_touched)
    for name in ("W_enc", "W_dec"):
        expected = oracle.moments[name] / oracle.moments[name].max()
        found = np.asarray(state.second_moment[name]) * 0.999 ** late_F[:, None]
        found = found / oracle.moments[name].max()
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_where_nothing_is_dead_nothing_changes():
    """To rounding: it is another program, in which XLA may add up in another order."""
    found = []
    for coefficient in (0.0, 0.5):
        config = config_of(coefficient, dead_after=STEPS - 1)
        state = biased_state(config, d_model=D)
        take_step = make_train_step(config, input_scale=3.5, mesh=make_mesh(config.mesh))
        rng = np.random.default_rng(0)
        for number in range(3):
            state, _ = take_step(state, biased_rows(rng), scheduled(config.train, step=number))
        found.append(jax.device_get(state))
    for name, value in found[0].params.items():
        np.testing.assert_allclose(found[1].params[name], value, atol=1e-7, err_msg=name)


def test_of_many_dead_latents_each_has_its_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(revive, "MOST", 16)
    config = config_of()
    fired_F = np.arange(F) % 3 == 0
    state = biased_state(config, d_model=D)
    taught = np.zeros(F, int)
    turns = -(-int((~fired_F).sum()) // 16)
    for step in range(2, 2 + turns):
        now = jax.tree.map(lambda leaf: leaf, state)
        object.__setattr__(now, "step", jnp.int32(step))
        chosen_F, num = revive.takes_part(now, jnp.asarray(fired_F, jnp.float32), config=config)
        assert int(num) == (~fired_F).sum()
        assert int(chosen_F.sum()) <= 16
        taught += np.asarray(chosen_F)
    np.testing.assert_array_equal(taught, ~fired_F)


def test_a_run_too_short_for_a_latent_to_die_is_refused():
    with pytest.raises(pydantic.ValidationError, match="and the run has 8"):
        config_of(dead_after=STEPS)
    config_of(dead_after=STEPS - 1)
    with pytest.raises(pydantic.ValidationError, match=r"set sae\.aux_k_coefficient"):
        make_config(
            sparsity={"penalty": "none"},
            sae={"architecture": "topk", "k": 4, "revive_coefficient": 0.1},
        )
