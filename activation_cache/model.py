"""A loaded language model: its activations at taps and its losses, with or without a splice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from activation_cache.config import CacheConfig, Dtype, ModelConfig
from activation_cache.conversion import converted_checkpoint
from activation_cache.gemma import Gemma
from activation_cache.gemma_config import GemmaConfig
from activation_cache.taps import Splice, Tap, check_tap
from activation_cache.tokenizer import Tokenizer, load_tokenizer
from activation_cache.weights import (
    Checkpoint,
    GgufCheckpoint,
    load_parameters,
    open_checkpoint,
)

Params = dict[str, Any]


@dataclass(frozen=True)
class LanguageModel:
    """A Gemma with its weights and tokenizer.

    Attributes:
        params: the tree that `gemma_params.parameter_table` describes.
        fingerprint: of the weights as they came (`weight_source.sampled_fingerprint`).
        dtype: the forward computes in it.
        source: `model.weights` of the config.
    """

    config: GemmaConfig
    params: Params
    tokenizer: Tokenizer
    fingerprint: str
    dtype: Dtype
    source: str

    def activations(
        self, tokens: Int[Array | np.ndarray, "B S"], taps: Sequence[Tap]
    ) -> dict[Tap, Float[Array, "B S D"]]:
        """Activations at each tap, in the model's dtype; nothing past the deepest is computed.

        Compiled once per shape of `tokens` and set of taps.

        Raises:
            UserError: a layer the model doesn't have.
        """
        for tap in taps:
            check_tap(tap, self.config)
        return _activations(self.config, tuple(sorted(set(taps))), self.params, jnp.asarray(tokens))

    def losses(
        self, tokens: Int[Array | np.ndarray, "B S"], splice: Splice | None = None
    ) -> Float[Array, "B S-1"]:
        """Next-token cross-entropy in nats, float32; entry s is the loss of token s + 1.

        Compiled once per shape of `tokens` and `(splice.tap, splice.replace)`.

        Raises:
            UserError: a splice at a layer the model doesn't have.
        """
        tokens = jnp.asarray(tokens)
        if splice is None:
            return _losses(self.config, None, None, self.params, None, tokens)
        check_tap(splice.tap, self.config)
        return _losses(
            self.config, splice.tap, splice.replace, self.params, splice.arguments, tokens
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _activations(
    config: GemmaConfig, taps: tuple[Tap, ...], params: Params, tokens: Array
) -> dict[Tap, Array]:
    output: Any = Gemma(config).apply({"params": params}, tokens, taps=taps, logits=False)
    return output.taps


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _losses(
    config: GemmaConfig,
    tap: Tap | None,
    replace: Callable[[Array, Any], Array] | None,
    params: Params,
    arguments: Any,
    tokens: Array,
) -> Array:
    splice = None
    if tap is not None and replace is not None:
        splice = Splice(tap, replace, arguments)
    losses: Any = Gemma(config).apply(
        {"params": params}, tokens, splice=splice, method=Gemma.losses
    )
    return losses


def conversion_folder(cache: CacheConfig) -> Path:
    """Where GGUF conversions are kept: `weights/` beside the activation store."""
    return Path(cache.path).parent / "weights"


def load_model(model: ModelConfig, *, converted: Path | None = None) -> LanguageModel:
    """Load weights and tokenizer.

    Args:
        model: what to load, and the dtype to compute in.
        converted: folder under which a GGUF file's float32 copy is kept and found again; None
            dequantises anew each time.

    Raises:
        UserError: missing, truncated or wrong weights, or a tokenizer that doesn't match.
    """
    checkpoint: Checkpoint = open_checkpoint(model)
    fingerprint = checkpoint.fingerprint()
    tokenizer = load_tokenizer(model)
    if converted is not None and isinstance(checkpoint, GgufCheckpoint):
        checkpoint = converted_checkpoint(checkpoint, tokenizer, folder=converted)
    return LanguageModel(
        config=checkpoint.config,
        params=load_parameters(checkpoint, dtype=jnp.dtype(model.dtype)),
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        dtype=model.dtype,
        source=model.weights,
    )
