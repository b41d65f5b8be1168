"""The state of a run before its first step, and a warning about thresholds that can't move far.

Adam changes a parameter by at most about the learning rate in each step. Where log θ is trained, θ
so changes by at most a factor of e in 1 / rate steps: 14,286 at a rate of 7e-5. From 0.001 to 0.05
are 3.9 such factors, 56,000 steps. A shorter run ends with about the L0 it began with. The warning
says so before the run spends its time.

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

from activation_cache.runtime import exchange, processes
from activation_cache.store.centring import gamma_of_moments
from sae_train.config.run import Config
from sae_train.config.sae import SaeConfig
from sae_train.config.sparsity import MatchL0Penalty, TargetL0Penalty
from sae_train.model.forward import Params, pre_activations, whitened
from sae_train.model.sharding import mesh_of, sharding
from sae_train.step.schedule import total_learning_rate
from sae_train.step.state import TrainState
from sae_train.train.warm_start import starting_params
from sae_train.train.whitening import whitening_root

logger = logging.getLogger(__name__)

# The L0 that the warning assumes is wanted where the config names none: that of released SAEs.
TYPICAL_L0 = 100.0

# The warning looks at this many pre-activations: 64 MiB on one device and on the host.
LOOKED_AT = 2**24

# A mean is that of so many rows: its error is a hundredth of a standard deviation.
MEAN_ROWS = 16_384

# `sae.b_dec_init: auto` takes the mean above this γ: it then has more of the mean square.
_FAR_FROM_ZERO = 1.0


# Raw rows [B, D]: one array of what an SAE reads; of a transcoder also one of what it predicts.
HostBatch = tuple[np.ndarray, ...]


def prepare_start(
    config: Config,
    *,
    state: TrainState,
    batch: Callable[[int], HostBatch],
    input_scale: float,
    target_scale: float,
) -> TrainState:
    """The state that training starts from; logs a warning if thresholds can't rise far enough.

    b_dec is set to the mean of the data if the config says so, or leaves it to γ and that is above
    1; so is what a transcoder subtracts from its input. With `sae.start_from` the parameters
    are a released SAE's, and nothing is warned of: its thresholds fit the data.

    Args:
        state: the initialised state.
        batch: gives the whole batch of a step, the same in every process.
        input_scale, target_scale: what rows are divided by before the SAE reads or predicts them.

    Raises:
        UserError: `sae.start_from` names no SAE that fits.
    """
    start: dict[str, np.ndarray] = {}
    if config.sae.b_dec_init != "zeros":
        start |= _b_dec(config, batch, target_scale=target_scale)
    if config.sae.whitening:
        root_DD = _whitening(config, batch)
        start = {name: b_dec_D @ root_DD for name, b_dec_D in start.items()}
        start["whitening"] = root_DD
    state = _with_params(state, start)
    input_mean_D = None
    if config.sae.subtract_mean:
        input_mean_D = (_moments(config, batch, which=0)[0] / input_scale).astype(np.float32)
        state = _with_params(state, {"input_mean": input_mean_D})
    if config.sae.start_from is not None:
        params = starting_params(
            config.sae,
            d_model=state.params["b_dec"].shape[0],
            input_scale=input_scale,
            target_scale=target_scale,
            input_mean_D=input_mean_D,
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


def _whitening(config: Config, batch: Callable[[int], HostBatch]) -> Float[np.ndarray, "D D"]:
    """The root of the metric that `sae.whitening` asks for, the main process's in all of them."""
    D = batch(0)[0].shape[1]
    root_DD = np.zeros((D, D), np.float32)
    if processes.is_main():  # eigenvectors may differ in bits between machines
        steps = range(-(-MEAN_ROWS // config.train.batch_size))
        root_DD = whitening_root((batch(step)[0] for step in steps), power=config.sae.whitening)
    return exchange.sums_of_all({"whitening": root_DD})["whitening"]


def _moments(
    config: Config, batch: Callable[[int], HostBatch], *, which: int
) -> tuple[Float[np.ndarray, " D"], float]:
    """The mean of the first raw rows and of their |x|²; `which`: 0 of inputs, -1 of targets."""
    means, squares = [], []
    for step in range(-(-MEAN_ROWS // config.train.batch_size)):
        x_BD = batch(step)[which].astype(np.float64)
        means.append(x_BD.mean(axis=0))
        squares.append(np.square(x_BD).sum(axis=1).mean())
    return np.mean(means, axis=0), float(np.mean(squares))


def _b_dec(
    config: Config, batch: Callable[[int], HostBatch], *, target_scale: float
) -> dict[str, Float[np.ndarray, " D"]]:
    """Where b_dec starts if not at zero, which of `auto` γ decides."""
    mean_D, mean_square = _moments(config, batch, which=-1)
    if config.sae.b_dec_init == "auto":
        found = gamma_of_moments(mean_D, mean_square=mean_square)
        takes_mean = found > _FAR_FROM_ZERO
        logger.info(
            "%s: b_dec starts at %s, for γ is %.2f and sae.b_dec_init auto takes the mean above %g",
            config.output,
            "the mean of the data" if takes_mean else "zeros",
            found,
            _FAR_FROM_ZERO,
        )
        if not takes_mean:
            return {}
    return {"b_dec": (mean_D / target_scale).astype(np.float32)}


def _with_params(state: TrainState, values: Mapping[str, np.ndarray]) -> TrainState:
    """The state with these parameters in place of its own, on the same devices."""

    def placed(name: str, value: np.ndarray) -> jax.Array:
        here = state.params[name].sharding
        return jax.make_array_from_callback(value.shape, here, lambda index: value[index])

    own = {name: placed(name, value) for name, value in values.items()}
    return dataclasses.replace(state, params=state.params | own)


def reachable_threshold(config: Config) -> float:
    """The highest θ that a gradient of constant sign reaches in the configured steps."""
    threshold = config.sae.threshold
    travel = total_learning_rate(config.train) * threshold.learning_rate_multiplier
    if threshold.parametrisation == "log":
        return threshold.init * math.exp(min(travel, 50.0))
    return threshold.init + travel


def needed_threshold(pre_BF: Float[np.ndarray, "B F"], *, l0: float) -> float:
    """The θ, the same for all latents, above which `l0` pre-activations of a row lie on average."""
    share = min(max(1.0 - l0 / pre_BF.shape[1], 0.0), 1.0)
    return float(np.quantile(np.asarray(pre_BF), share))


def pre_activations_of_all(
    params: Params, x_BD: Float[np.ndarray, "B D"], *, config: SaeConfig
) -> Float[np.ndarray, "B F"]:
    """Pre-activations of all latents on the host, also where the parameters are split up.

    Args:
        x_BD: scaled rows, not yet whitened.
    """
    compute = _gathering(config, mesh_of(params["W_enc"]))
    return np.asarray(compute(params, x_BD, bias=params["b_enc"]))


@functools.lru_cache(maxsize=8)
def _gathering(config: SaeConfig, mesh: Mesh) -> Callable[..., jax.Array]:
    """A compiled `pre_activations` whose result is whole on every device."""

    def compute(params: Params, x_BD: jax.Array, *, bias: jax.Array) -> jax.Array:
        x_BD = whitened(params, x_BD)
        return pre_activations(params, x_BD, bias=bias, config=config, precision="float32")

    return jax.jit(compute, out_shardings=sharding(mesh, ()))


def threshold_warning(
    config: Config, *, params: Params, x_BD: Float[np.ndarray, "B D"]
) -> str | None:
    """A warning if no threshold can rise to where the wanted L0 is, else None.

    Args:
        params: as they were initialised.
        x_BD: scaled rows of the first batch.
    """
    penalty = config.train.sparsity
    l0 = TYPICAL_L0
    if isinstance(penalty, TargetL0Penalty | MatchL0Penalty):
        l0 = penalty.target
    pre_BF = pre_activations_of_all(params, x_BD, config=config.sae)
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
