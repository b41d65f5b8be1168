"""`match_l0` ends at its target on small data, wherever its coefficient starts."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.gemma.taps import Tap
from activation_cache.store.store import open_store
from sae_train.checkpoint.trained import load_trained
from sae_train.runs.metrics_file import read_metrics
from sae_train.step.schedule import Scheduled
from sae_train.step.sparsity_penalty import Penalty, penalty_of
from sae_train.train.loop import train
from tests.support.configs import make_config
from tests.support.training import ROWS, make_run

pytestmark = pytest.mark.slow


def l0_over_the_store(run: Path, store: Path) -> float:
    """Mean active latents of the trained SAE over every row it was trained on."""
    trained = load_trained(run)
    params = trained.params
    rows = open_store(store).read(Tap("resid_post", 1), start=0, stop=ROWS)
    centred = rows.astype(np.float64) / trained.input_scale - params["b_dec"]
    pre = centred @ params["W_enc"].T + params["b_enc"]
    return float((pre > params["threshold"]).sum(axis=1).mean())


@pytest.mark.parametrize(("target", "start"), [(6.0, 1e-4), (6.0, 0.03), (15.0, 0.01)])
def test_the_trained_sae_has_the_l0_asked_for(tmp_path: Path, target: float, start: float):
    config = make_run(
        tmp_path,
        steps=600,
        parametrisation="direct",
        sparsity={
            "penalty": "match_l0",
            "target": target,
            "coefficient": start,
            "warmup_steps": 50,
        },
        checkpoint={"every_steps": 1000, "keep": 1},
        learning_rate={"peak": 2e-3, "warmup_steps": 20, "decay_steps": 100},
        log_every_steps=10,
    )
    train(config)
    found = l0_over_the_store(tmp_path / "run", tmp_path / "store")
    trail = [(row["l0"], row["sparsity_coefficient"]) for row in read_metrics(tmp_path / "run")]
    assert found == pytest.approx(target, rel=0.05), trail


def penalty_at(l0: float, *, warmup: float, log_gain: float = 0.5, **penalty: object) -> Penalty:
    """The penalty of two rows with this L0 and one latent of frequency 1/2."""
    config = make_config(
        tokens=64 * 1000,
        sparsity={"penalty": "match_l0", "target": 10.0, "coefficient": 0.02} | penalty,
    )
    scalars = Scheduled(
        learning_rate=np.float32(1e-3),
        sparsity_coefficient=np.float32(0.02 * warmup),
        sparsity_warmup=np.float32(warmup),
        bias_correction=np.float32(1.0),
        momentum_correction=np.float32(1.0),
    )
    return penalty_of(
        jnp.full(2, l0),
        jnp.array([0.5, 0.0, 0.0, 0.0]),
        scalars=scalars,
        log_gain=jnp.float32(log_gain),
        train=config.train,
    )


def test_steering_sums_nothing_before_the_full_coefficient_is_in_force():
    young, grown = penalty_at(20.0, warmup=0.5), penalty_at(20.0, warmup=1.0)
    assert float(young.log_gain) == 0.5
    # A fiftieth of 1,000 steps to settle in, log 2 away from the target.
    assert float(grown.log_gain) == pytest.approx(0.5 + np.log(2) / 20, rel=1e-6)
    assert float(grown.coefficient) == pytest.approx(0.02 * np.exp(0.5) * 2, rel=1e-6)
    assert float(young.coefficient) == pytest.approx(float(grown.coefficient) / 2, rel=1e-6)


def test_steering_is_bounded_whatever_the_l0():
    for l0, distance in ((1e6, 1.0), (0.0, -1.0)):
        far = penalty_at(l0, warmup=1.0, log_gain=0.0)
        assert float(far.log_gain) == pytest.approx(distance / 20, rel=1e-6)
    assert float(penalty_at(1e6, warmup=1.0, log_gain=12.0).log_gain) == 12.0
    assert np.isfinite(float(penalty_at(1e6, warmup=1.0, log_gain=12.0).loss))


def test_a_frequency_penalty_of_its_own_warms_up_with_the_penalty():
    for warmup in (0.0, 0.25, 1.0):
        without = penalty_at(10.0, warmup=warmup)
        own = penalty_at(10.0, warmup=warmup, frequency={"scale": 0.1, "coefficient": 0.3})
        assert float(own.loss - without.loss) == pytest.approx(warmup * 0.3 * 0.25 / 0.1, rel=1e-5)
        shared = penalty_at(10.0, warmup=warmup, frequency={"scale": 0.1})
        added = float(without.coefficient) * 0.25 / 0.1
        assert float(shared.loss - without.loss) == pytest.approx(added, rel=1e-5)
