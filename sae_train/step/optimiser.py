"""The optimiser: an optax chain, and the unit-norm decoder.

    gradient -> decoder projected -> clipped -> divided by its root mean square -> times the rate

Gemma Scope (arXiv 2408.05147, section 3.2): Adam with β₁ = 0, β₂ = 0.999, ε = 1e-8; the part of
each decoder row's gradient that is parallel to the row is removed before Adam, and rows are
renormalised after every update. With β₁ = 0 there is no first moment, which leaves `scale_by_rms`.
Short runs need high rates, and a β₁ above 0 to bear them (docs/recipes.md): then every parameter
moves in every step, and `update_all` updates them.

**Lazy updates.** With β₁ = 0 a parameter without a gradient stays where it is, and its second
moment v only decays. So v may wait, and is multiplied by β₂ once for each step it has waited when
the next gradient comes (`waited_decay`): the sparse path pays for touched latents only, and every
path continues exactly what another began. docs/numerics.md.

Legend: D model width, F latents.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sae_train.config.run import Config, TrainConfig
from sae_train.config.sae import has_unit_decoder
from sae_train.model.forward import Params
from sae_train.model.sharding import table_of
from sae_train.step.compiler_hints import written_once
from sae_train.step.schedule import Scheduled
from sae_train.step.state import TrainState


def tree_norm(arrays: Params) -> Float[Array, ""]:
    """The Euclidean norm of all entries of all arrays together."""
    return optax.tree.norm(arrays)


def remove_parallel(
    gradient_FD: Float[Array, "F D"], *, rows_FD: Float[Array, "F D"]
) -> Float[Array, "F D"]:
    """The gradient less its component along each (unit-norm) row."""
    along_F1 = (gradient_FD * rows_FD).sum(axis=1, keepdims=True)
    return gradient_FD - along_F1 * rows_FD


def unit_rows(rows_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """Each row divided by its norm."""
    return rows_FD / jnp.linalg.norm(rows_FD, axis=1, keepdims=True)


def project_decoder() -> optax.GradientTransformation:
    """Remove what of W_dec's gradient would change the norms of its rows."""

    def project(updates: Params, params: Params) -> Params:
        if "W_dec" not in updates:
            return updates
        return updates | {"W_dec": remove_parallel(updates["W_dec"], rows_FD=params["W_dec"])}

    return optax.stateless(project)


class _Moments(NamedTuple):
    """The state of Adam with a first moment."""

    mu: Params
    nu: Params


def _scale_by_adam(
    *, beta1: float, beta2: float, epsilon: Any, correction: Any
) -> optax.GradientTransformation:
    """m / (c₁ (√v + ε)): optax's `scale_by_adam` with corrections that the host has computed."""

    def init(params: Params) -> _Moments:
        return _Moments(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(
        gradients: Params, moments: _Moments, params: Params | None = None
    ) -> tuple[Params, _Moments]:
        mu = optax.tree.update_moment(gradients, moments.mu, beta1, 1)
        nu = optax.tree.update_moment(gradients, moments.nu, beta2, 2)
        scaled = jax.tree.map(lambda m, v: m / (correction * (jnp.sqrt(v) + epsilon)), mu, nu)
        return scaled, _Moments(mu, nu)

    return optax.GradientTransformation(init, update)


def transformation(
    scalars: Scheduled, *, config: Config, clip: bool = False, momentum: bool = False
) -> optax.GradientTransformation:
    """The chain for one step, of any of the parameters; its state is the moments.

    Args:
        scalars: this step's.
        clip: clip to `train.gradient_clip`; all parameters must then be updated at once.
        momentum: with the first moment too.
    """
    # Adam's g / (√(v / c) + ε) with the bias correction c = 1 - β₂ᵗ is √c g / (√v + ε √c). The
    # host computes c in float64; optax's own, in float32, is off by 1e-5 in the first steps.
    root = jnp.sqrt(jnp.asarray(scalars.bias_correction))
    sae, train = config.sae, config.train
    return optax.chain(
        project_decoder() if has_unit_decoder(sae.architecture) else optax.identity(),
        optax.clip_by_global_norm(train.gradient_clip)
        if clip and train.gradient_clip is not None
        else optax.identity(),
        _scale_by_adam(
            beta1=train.adam.beta1,
            beta2=train.adam.beta2,
            epsilon=train.adam.epsilon * root,
            correction=jnp.asarray(scalars.momentum_correction),
        )
        if momentum
        else optax.scale_by_rms(
            decay=train.adam.beta2, eps=train.adam.epsilon * root, eps_in_sqrt=False
        ),
        optax.masked(optax.scale(sae.threshold.learning_rate_multiplier), _is_threshold),
        optax.masked(optax.scale(train.learning_rate.bias_multiplier), _is_bias),
        optax.scale_by_learning_rate(jnp.asarray(scalars.learning_rate) * root),
    )


def _is_threshold(params: Params) -> dict[str, bool]:
    return {name: name == "threshold" for name in params}


def _is_bias(params: Params) -> dict[str, bool]:
    return {name: name.startswith("b_") for name in params}


def update(
    params: Params,
    gradients: Params,
    *,
    second_moment: Params,
    decay_F: Float[Array, " F"],
    scalars: Scheduled,
    config: Config,
    clip: bool = False,
) -> tuple[Params, Params]:
    """New parameters and second moments, without a first: of all or some of them, and of latents.

    Args:
        gradients: of the same names as `params`; the decoder's not yet projected.
        second_moment: as they were when each latent last had a gradient.
        decay_F: what has become of them since (`waited_decay`).
        clip: as for `transformation`.
    """
    table = table_of(config.sae)
    second_moment = {
        name: second_moment[name] * _per_row(decay_F, like=param)
        if table[name].dims[0] == "F"
        else second_moment[name]
        for name, param in params.items()
    }
    chain = transformation(scalars, config=config, clip=clip)
    new, moments = applied(chain, params, gradients, {"nu": second_moment}, config=config)
    return new, moments["nu"]


def applied(
    chain: optax.GradientTransformation,
    params: Params,
    gradients: Params,
    moments: dict[str, Params],
    *,
    config: Config,
) -> tuple[Params, dict[str, Params]]:
    """New parameters and moments, these by their names in the chain's state."""
    sae = config.sae
    state = optax.tree.set(chain.init(params), **moments)
    updates, state = chain.update(gradients, state, params)
    new = dict(optax.apply_updates(params, updates))
    if "W_dec" in new and has_unit_decoder(sae.architecture):
        # A GPU's compiler else makes the new rows twice, and copies them to their place.
        rows_FD = written_once(new["W_dec"], tpus=False)
        new["W_dec"] = unit_rows(rows_FD)
    if "threshold" in new and sae.threshold.parametrisation == "direct":
        # Released latents are relu(pre) where pre > θ: below 0 the two forms would differ.
        new["threshold"] = jnp.maximum(new["threshold"], 0.0)
    return new, {name: optax.tree.get(state, name) for name in moments}


def update_all(
    state: TrainState, gradients: Params, *, scalars: Scheduled, config: Config
) -> tuple[Params, Params, Params]:
    """New parameters, first and second moments of all there are, clipped if the config says so.

    With a first moment no latent has waited: no step leaves one out.
    """
    if config.train.has_momentum:
        chain = transformation(scalars, config=config, clip=True, momentum=True)
        moments = {"mu": state.first_moment, "nu": state.second_moment}
        new, moments = applied(chain, state.params, gradients, moments, config=config)
        return new, moments["mu"], moments["nu"]
    new, second_moment = update(
        state.params,
        gradients,
        second_moment=state.second_moment,
        decay_F=waited_decay(state.step - state.last_touched, train=config.train),
        scalars=scalars,
        config=config,
        clip=True,
    )
    return new, state.first_moment, second_moment


def _per_row(decay_F: Array, *, like: Array) -> Array:
    return decay_F[:, None] if like.ndim == 2 else decay_F


def waited_decay(steps_F: Int[Array, " F"], *, train: TrainConfig) -> Float[Array, " F"]:
    """β₂ⁿ: what is left of second moments after n steps without a gradient.

    As exp(n log β₂): its error grows with n log β₂, which is small where what is left isn't. The
    β₂ is float32's, as in every update.
    """
    beta2 = float(np.float32(train.adam.beta2))
    if beta2 == 0:
        return (steps_F == 0).astype(jnp.float32)
    return jnp.exp(steps_F.astype(jnp.float32) * math.log(beta2))
