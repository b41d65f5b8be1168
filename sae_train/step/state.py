"""The training state: what it holds, how it is created sharded, and its abstract shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from activation_cache.config import LARGEST_INT32
from sae_train.config.run import TrainConfig
from sae_train.config.sae import SaeConfig
from sae_train.model.sharding import LAST_FIRED, Tensor, shape_of, sharding, table_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a resume needs besides the step number's own consequences.

    Attributes:
        params: the trained parameters, see `sharding.params_table`.
        first_moment: Adam's m for each of them where β₁ isn't 0; else empty.
        second_moment: Adam's v for each of them; of a latent, as it was in the step `last_touched`.
        last_fired: for each latent the step (counted from 1) in which it last fired, 0 for never.
        last_touched: for each latent the step in which its parameters and second moments were last
            updated. In every step since, its gradient was 0 and its v has yet to decay.
        step: optimiser steps done.
        log_gain: what `match_l0` has added to the logarithm of its coefficient.
        selection_threshold: of BatchTopK the mean of the smallest latents selected, its threshold
            at inference; 0 of others.
        candidates: pairs of row and latent that had a gradient in the last step, per row; 0 where
            the sparse path isn't taken into account.
        sparse: 1 if the last step took the sparse path, 0 if the dense one.
        overflows: steps so far that tried the sparse path and had too many pairs.

    Its leaves are arrays; the same class also holds their shardings or abstract shapes.
    """

    params: dict[str, Any]
    first_moment: dict[str, Any]
    second_moment: dict[str, Any]
    last_fired: Any
    last_touched: Any
    step: Any
    log_gain: Any
    selection_threshold: Any
    candidates: Any
    sparse: Any
    overflows: Any


def is_dead(
    last_fired_F: Int[Array, " F"], *, step: Int[Array, ""], train: TrainConfig
) -> Bool[Array, " F"]:
    """Latents that haven't fired for `dead_after_tokens`."""
    steps = -(-train.dead_after_tokens // train.batch_size)
    return step - last_fired_F >= min(steps, LARGEST_INT32)  # no run has more steps


def _map_table(leaf, scalar, *, config: SaeConfig, momentum: bool) -> TrainState:
    """Build a state: `leaf(name, tensor)` for each row of the table and `scalar(dtype)`."""
    table = table_of(config)
    params = {name: leaf(name, tensor) for name, tensor in table.items()}
    return TrainState(
        params=params,
        first_moment={name: leaf(f"first_moment.{name}", table[name]) for name in table}
        if momentum
        else {},
        second_moment={name: leaf(f"second_moment.{name}", table[name]) for name in table},
        last_fired=leaf("last_fired", LAST_FIRED),
        last_touched=leaf("last_touched", LAST_FIRED),
        step=scalar(jnp.int32),
        log_gain=scalar(jnp.float32),
        selection_threshold=scalar(jnp.float32),
        candidates=scalar(jnp.float32),
        sparse=scalar(jnp.int32),
        overflows=scalar(jnp.int32),
    )


def state_shardings(mesh: Mesh, *, config: SaeConfig, momentum: bool = False) -> TrainState:
    """The NamedSharding of every leaf."""
    return _map_table(
        lambda _, tensor: sharding(mesh, tensor.dims),
        lambda _: sharding(mesh, ()),
        config=config,
        momentum=momentum,
    )


def abstract_state(
    config: SaeConfig, *, d_model: int, mesh: Mesh, momentum: bool = False
) -> TrainState:
    """Shape, dtype and sharding of every leaf, nothing allocated."""

    def leaf(_: str, tensor: Tensor) -> jax.ShapeDtypeStruct:
        shape = shape_of(tensor, width=config.width, d_model=d_model)
        return jax.ShapeDtypeStruct(shape, tensor.dtype, sharding=sharding(mesh, tensor.dims))

    return _map_table(
        leaf,
        lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=sharding(mesh, ())),
        config=config,
        momentum=momentum,
    )


def init_state(
    config: SaeConfig, *, d_model: int, seed: int, mesh: Mesh, momentum: bool = False
) -> TrainState:
    """Gemma Scope's initialisation, each shard made on its own device; `seed` has 64 bits.

    W_dec and W_enc are drawn from one key, so W_enc starts as W_dec's transpose; of a transcoder
    they are drawn apart.
    """
    return _initialiser(config, d_model, seed, mesh, momentum)()


# The members of a cohort start from the same state, and share its compiled initialiser.
@functools.lru_cache(maxsize=8)
def _initialiser(
    config: SaeConfig, d_model: int, seed: int, mesh: Mesh, momentum: bool
) -> Callable[[], TrainState]:
    table = table_of(config)

    def init() -> TrainState:
        # JAX takes the lower 32 bits of a seed and forgets the others.
        high, low = divmod(seed, 2**32)
        key = jax.random.key(low)
        key = jax.random.fold_in(key, high) if high else key

        def leaf(name: str, tensor: Tensor) -> Array:
            shape = shape_of(tensor, width=config.width, d_model=d_model)
            if name in table:
                return tensor.init(key, shape, config).astype(tensor.dtype)
            return jnp.zeros(shape, tensor.dtype)

        state = _map_table(
            leaf, lambda dtype: jnp.zeros((), dtype), config=config, momentum=momentum
        )
        # Half of all latents are active at first (docs/numerics.md): too many for the sparse path.
        return dataclasses.replace(state, candidates=jnp.float32(config.width))

    return jax.jit(init, out_shardings=state_shardings(mesh, config=config, momentum=momentum))
