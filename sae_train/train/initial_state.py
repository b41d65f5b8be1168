"""Before a run's first step: b_dec at the data's mean if asked, and a look at the thresholds.

Can they get to where the data is in the steps configured? With log θ and Adam, θ moves by at
most the learning rate in relative terms per step: one e-fold per 14,286 steps at 7e-5. From
0.001 to 0.05 is 3.9 of them, 56,000 steps. A short run with that parametrisation ends with the
L0 it started with.

Legend: B rows of a batch, D model width, F latents.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from sae_train.config.run import Config, MatchL0Penalty, TargetL0Penalty
from sae_train.config.sae import SaeConfig
from sae_train.model.forward import Params, pre_activations
from sae_train.model.sharding import mesh_of, sharding
from sae_train.step.schedule import total_learning_rate
from sae_train.step.state import TrainState
from sae_train.train.warm_start import starting_params

logger = logging.getLogger(__name__)

# What an L0 penalty is after when it names no target: the released SAEs' canonical L0.
TYPICAL_L0 = 100.0

# Pre-activations looked at for the warning: 64 MiB of them, on one device and on the host.
LOOKED_AT = 2**24

# Rows that b_dec's mean is taken over: its error is then a hundredth of a standard deviation.
MEAN_ROWS = 16_384


# Raw rows [B, D]: what is read, and of a transcoder what it predicts.
HostBatch = tuple[np.ndarray, ...]


def prepare_start(
    config: Config,
    *,
    state: TrainState,
    batch: Callable[[int], HostBatch],
    input_scale: float,
    target_scale: float,
) -> TrainState:
    """The state a run starts from, and a warning where its thresholds can't reach the data.

    With `sae.start_from` that of a released SAE, whose thresholds are where they belong.

    Args:
        batch: `batch(step)` of readers of whole batches, the same in every process; the first of
            the stream are looked at.
    """
    if config.sae.b_dec_init == "mean":
        count = -(-MEAN_ROWS // config.train.batch_size)
        means = [batch(step)[-1].astype(np.float64).mean(axis=0) for step in range(count)]
        b_dec_D = (np.mean(means, axis=0) / target_scale).astype(np.float32)
        state = _with_params(state, {"b_dec": b_dec_D})
    if config.sae.start_from is not None:
        D = state.params["b_dec"].shape[0]
        params = starting_params(
            config.sae, d_model=D, input_scale=input_scale, target_scale=target_scale
        )
        return _with_params(state, params)
    if config.sae.architecture != "jumprelu":
        return state
    count = max(1, min(256, LOOKED_AT // config.sae.width))
    x_BD = batch(0)[0][:count].astype(np.float32) / np.float32(input_scale)
    warning = threshold_warning(config, params=state.params, x_BD=x_BD)
    if warning:
        logger.warning("%s", warning)
    return state


def _with_params(state: TrainState, values: Mapping[str, np.ndarray]) -> TrainState:
    """The state with these parameters, placed as those before them were."""

    def placed(name: str, value: np.ndarray) -> jax.Array:
        here = state.params[name].sharding
        return jax.make_array_from_callback(value.shape, here, lambda index: value[index])

    own = {name: placed(name, value) for name, value in values.items()}
    return dataclasses.replace(state, params=state.params | own)


def reachable_threshold(config: Config) -> float:
    """The highest θ a steady gradient can reach within the configured steps."""
    threshold = config.sae.threshold
    travel = total_learning_rate(config.train) * threshold.learning_rate_multiplier
    if threshold.parametrisation == "log":
        return threshold.init * math.exp(min(travel, 50.0))
    return threshold.init + travel


def needed_threshold(pre_BF: Float[np.ndarray, "B F"], *, l0: float) -> float:
    """The common θ that would leave `l0` latents active per row."""
    share = min(max(1.0 - l0 / pre_BF.shape[1], 0.0), 1.0)
    return float(np.quantile(np.asarray(pre_BF), share))


def _pre_activations_of_all(
    params: Params, x_BD: Float[np.ndarray, "B D"], *, config: SaeConfig
) -> Float[np.ndarray, "B F"]:
    """Pre-activations on the host, whatever the mesh the parameters lie on."""
    compute = _gathering(config, mesh_of(params["W_enc"]))
    return np.asarray(compute(params, x_BD, bias=params["b_enc"]))


@functools.lru_cache(maxsize=8)
def _gathering(config: SaeConfig, mesh: Mesh) -> Callable[..., jax.Array]:
    """`pre_activations`, whole on every device of the mesh."""
    compute = functools.partial(pre_activations, config=config)
    return jax.jit(compute, out_shardings=sharding(mesh, ()))


def threshold_warning(
    config: Config, *, params: Params, x_BD: Float[np.ndarray, "B D"]
) -> str | None:
    """A warning when `reachable_threshold` falls short of what the first batch asks for.

    Args:
        params: parameters at initialisation.
        x_BD: scaled rows.
    """
    penalty = config.train.sparsity
    l0 = TYPICAL_L0
    if isinstance(penalty, TargetL0Penalty | MatchL0Penalty):
        l0 = penalty.target
    pre_BF = _pre_activations_of_all(params, x_BD, config=config.sae)
    needed, reachable = needed_threshold(pre_BF, l0=l0), reachable_threshold(config)
    if reachable >= needed:
        return None
    return (
        f"the thresholds can rise from {config.sae.threshold.init:.3g} to at most {reachable:.3g} "
        f"in {config.train.steps} steps, and at initialisation an L0 of {l0:.0f} needs "
        f"{needed:.3g}: sparsity will hardly train. Train longer, raise "
        "sae.threshold.learning_rate_multiplier, train.learning_rate.peak or sae.threshold.init, "
        "or set sae.threshold.parametrisation to direct (docs/numerics.md)."
    )
