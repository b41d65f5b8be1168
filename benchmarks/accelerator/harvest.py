"""Tokens a second that Gemma 2 2B's forward to a tap makes, with random weights in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from activation_cache.gemma.config import GemmaConfig, config_from_hf
from activation_cache.gemma.forward import Gemma
from activation_cache.gemma.params import parameter_table
from activation_cache.gemma.taps import Tap
from benchmarks.accelerator.results import (
    Clock,
    Row,
    milliseconds,
    most_held,
    over_peak,
    reason,
    timed,
)

LENGTH, BATCHES = 1024, (8, 32)  # Gemma Scope's sequences; how many at once
# The defaults of `config.json` are Gemma 2 2B's.
SIZES: dict[str, Any] = {}
SMALL_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
}


def rows(*, small: bool, clock: Clock) -> Iterator[Row]:
    """To the middle layer, as many harvests do, and to the last."""
    sizes = SMALL_SIZES if small else SIZES
    config = config_from_hf({"model_type": "gemma2", **sizes}, source="the benchmark")
    params = random_params(config)
    batches, length = ((1,), 16) if small else (BATCHES, LENGTH)
    for batch in batches:
        for layer in (config.num_layers // 2 - 1, config.num_layers - 1):
            tap = Tap("resid_post", layer)
            what = f"{batch} x {length} tokens to {tap.name}"
            if clock.left <= 0:
                yield Row(what=what, note="left out: no time")
                continue
            try:
                yield _measured(config, params, tap, batch=batch, length=length, clock=clock)
            except Exception as error:  # the next may need less memory
                yield Row(what=what, note=reason(error))


def random_params(config: GemmaConfig) -> dict[str, Any]:
    """The tree of `parameter_table`, made on the device: bfloat16, norms in float32."""
    tree: dict[str, Any] = {}
    for number, parameter in enumerate(parameter_table(config)):
        shape = parameter.tree_shape
        if parameter.is_norm:
            value = jnp.zeros(shape, jnp.float32)
        else:
            value = _normal(jax.random.fold_in(jax.random.key(0), number), shape)
        *folders, name = parameter.path
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02)


def _measured(
    config: GemmaConfig, params: Any, tap: Tap, *, batch: int, length: int, clock: Clock
) -> Row:
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)

    def activations(params: Any, tokens: jax.Array) -> jax.Array:
        output: Any = Gemma(config).apply({"params": params}, tokens, taps=(tap,), logits=False)
        return output.taps[tap]

    forward = jax.jit(activations).lower(params, tokens).compile()
    memory: Any = forward.memory_analysis()
    times = timed(lambda: forward(params, tokens), clock=clock)
    num_tokens = batch * length
    return Row(
        what=f"{batch} x {length} tokens to {tap.name}",
        precision="bfloat16",
        d_model=config.d_model,
        rate=num_tokens / times.median,
        unit="tokens/s",
        mfu=over_peak(num_tokens * flops_of_token(config, tap.layer) / times.median, "bfloat16"),
        gigabytes=(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        peak_gigabytes=most_held(),
        **milliseconds(times),
    )


def flops_of_token(config: GemmaConfig, layer: int) -> int:
    """Twice the projections of the layers that run; attention's products are left out."""
    run = {f"layers_{number}" for number in range(layer + 1)}
    return sum(
        2 * parameter.shape[0] * parameter.shape[1]
        for parameter in parameter_table(config)
        if parameter.is_projection and parameter.path[0] in run
    )
