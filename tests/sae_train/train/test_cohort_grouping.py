"""Which runs make a cohort, and which members share one compiled step."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache.runtime.errors import UserError
from sae_train.config.file import with_values
from sae_train.config.run import Config
from sae_train.model.sharding import make_mesh
from sae_train.step.schedule import scheduled
from sae_train.step.state import abstract_state
from sae_train.train import cohort_step
from sae_train.train.cohort import batch_key, check_cohort, group_cohorts, step_key
from sae_train.train.progress import label, steps_to_read
from tests.support.configs import make_config

pytestmark = pytest.mark.slow


def test_what_a_cohort_shares() -> None:
    config = make_config()
    same = [
        make_config(width=64),
        make_config(seed=5, data_seed=0),
        make_config(tokens=64 * 99, sparsity={"coefficient": 9.0}, bandwidth=0.5),
    ]
    assert {batch_key(one) for one in same} == {batch_key(config)}
    check_cohort([one.model_copy(update={"output": f"{id(one)}"}) for one in [config, *same]])
    # All in one cache: what differs is that alone.
    taps = [{"site": site, "layers": [1, 2]} for site in ("resid_post", "mlp_out")]
    wide = with_values(config, {"cache.sites": taps}, source="test")
    for key, values in {
        "train.batch_size": {"train.batch_size": 32},
        "train.data_seed": {"train.seed": 1},
        "mesh": {"mesh.model": 2},
        "sae.layer": {"sae.layer": 3 - wide.sae.layer},
        "sae.site": {"sae.site": "mlp_out"},
        "cache": {"cache.path": "elsewhere"},
    }.items():
        other = with_values(wide, values, source="test")
        assert batch_key(other) != batch_key(wide), key
        with pytest.raises(UserError, match=f"can't train together: {re.escape(key)} is"):
            check_cohort([wide, other])
    with pytest.raises(UserError, match=r"train\.batch_size is 64 in the one and 32 in the other"):
        check_cohort([config, make_config(batch_size=32)])
    with pytest.raises(UserError, match="have the same output run"):
        check_cohort([config, make_config(width=64)])


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["x", "y", "z"]), max_size=30),
    st.integers(min_value=1, max_value=9),
)
def test_every_run_is_in_one_cohort_in_order(caches: list[str], most: int) -> None:
    configs = {name: make_config(cache_path=name) for name in "xyz"}
    runs = [((number, name), configs[name]) for number, name in enumerate(caches)]
    cohorts = group_cohorts(runs, max_members=most)
    assert sorted(run for one in cohorts for run in one) == [run for run, _ in runs]
    for one in cohorts:
        assert 1 <= len(one) <= most
        assert len({name for _, name in one}) == 1
        assert list(one) == sorted(one)
    for name in set(caches):
        sizes = [len(one) for one in cohorts if one[0][1] == name]
        assert len(sizes) == -(-caches.count(name) // most)
        assert max(sizes) - min(sizes) <= 1


PENALTIES: list[dict[str, Any]] = [
    {"coefficient": 0.01},
    {"penalty": "target_l0", "target": 3.0, "coefficient": 0.01},
    {"penalty": "match_l0", "target": 3.0, "frequency": {"scale": 0.2}},
]


def lowered(config: Config) -> str:
    """The program of a config's step, before compilation."""
    mesh = make_mesh(config.mesh)
    step = cohort_step.make_train_step(config, input_scale=1.0, mesh=mesh)
    state = abstract_state(config.sae, d_model=8, mesh=mesh)
    rows = jax.ShapeDtypeStruct((config.train.batch_size, 8), jnp.float32)
    return step.lower(state, rows, scheduled(config.train, step=0)).as_text()


@pytest.mark.parametrize("sparsity", PENALTIES, ids=["l0", "target_l0", "match_l0"])
def test_one_key_is_one_program(sparsity: dict[str, Any]) -> None:
    """What `step_key` leaves out changes nothing; what it keeps may."""
    config = make_config(sparsity=sparsity)
    program = lowered(config)
    others: dict[str, Any] = {
        "sae.layer": 2,
        "sae.b_dec_init": "mean",
        "sae.threshold.init": 0.5,
        "train.seed": 4,
        "train.data_seed": 4,
        "train.learning_rate": {"peak": 1.0, "decay_steps": 3},
        "train.sparsity.coefficient": 5.0,
        "train.sparsity.warmup_steps": 77,
        "train.log_every_steps": 9,
        "train.tensorboard": True,
        "train.wandb": {"project": "saes"},
        "cache.sites": [{"site": "resid_post", "layers": [1, 2]}],
        "checkpoint.every_steps": 3,
    }
    for key, value in others.items():
        first = {"cache.sites": others["cache.sites"]}
        other = with_values(config, first | {key: value}, source="test")
        assert step_key(other) == step_key(config), key
        assert lowered(other) == program, key
    for key, value in {
        "sae.width": 64,
        "sae.bandwidth": 0.5,
        "sae.threshold.parametrisation": "direct",
        "sae.threshold.learning_rate_multiplier": 2.0,
        "sae.pre_encoder_bias": False,
        "train.tokens": 64 * 1000,
        "train.adam.beta2": 0.9,
        "train.gradient_clip": 1.0,
        "train.dead_after_tokens": 1000,
        "train.sparsity": PENALTIES[0] if "target" in sparsity else PENALTIES[1],
    }.items():
        assert step_key(with_values(config, {key: value}, source="test")) != step_key(config), key


def test_labels_and_spans() -> None:
    assert label(["demo"]) == "demo"
    assert label(["demo-coefficient_0.001", "demo-coefficient_0.01"]) == "demo-coefficient"
    assert label(["x", "y"]) == "x"
    assert steps_to_read([(0, 10), (5, 20), (30, 40)]) == 30
    assert steps_to_read([(3, 40), (0, 2)]) == 39
    assert steps_to_read([(7, 9)]) == 2
