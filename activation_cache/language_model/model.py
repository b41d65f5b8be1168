"""A loaded language model: its activations at taps and its losses, with or without a splice."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from activation_cache.config import Dtype, ModelConfig
from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.forward import Gemma
from activation_cache.gemma.params import check_model_axis, on_all
from activation_cache.gemma.sampling import Continuation, Sampling, sample
from activation_cache.gemma.scores import centred_logit, cross_entropy
from activation_cache.gemma.taps import Splice, Tap, check_tap, stream_before, tap_width
from activation_cache.language_model.checkpoint import (
    Checkpoint,
    GgufCheckpoint,
    Params,
    load_parameters,
    open_checkpoint,
)
from activation_cache.language_model.gguf_conversion import converted_checkpoint
from activation_cache.language_model.tokenizer import Tokenizer, load_tokenizer
from activation_cache.mesh import make_mesh
from activation_cache.precision import Precision, resolve
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import AnyPath, storage_path, user_cache

Kept = Mapping[Tap, Array]  # activations [B, S, _] of one forward


@dataclass(frozen=True)
class LanguageModel:
    """A Gemma with its weights and tokenizer.

    Attributes:
        params: the tree that `gemma.params.parameter_table` describes, on the devices of `mesh`.
        fingerprint: of the released files (`locate.sampled_fingerprint`).
        dtype: the forward computes in it.
        source: `model.weights` of the config.
        precision: of the products, if the dtype is float32.
    """

    config: GemmaConfig
    params: Params
    tokenizer: Tokenizer
    fingerprint: str
    dtype: Dtype
    source: str
    mesh: Mesh
    precision: Precision = "float32"

    def activations(
        self, tokens: Int[Array | np.ndarray, "B S"], taps: Sequence[Tap]
    ) -> dict[Tap, Float[Array, "B S D"]]:
        """Activations at each tap, in the model's dtype; nothing past the deepest is computed.

        Compiled once per shape of `tokens` and set of taps. On a mesh with devices of several
        processes all of them call it with the same, and each gets the whole result.

        Raises:
            UserError: a layer the model doesn't have.
        """
        for tap in taps:
            check_tap(tap, self.config)
        forward = _activations_on(self.mesh)
        static = self.config, self.precision, tuple(sorted(set(taps)))
        return forward(*static, self.params, self._placed(tokens))

    def losses(
        self,
        tokens: Int[Array | np.ndarray, "B S"],
        splice: Splice | None = None,
        *,
        kept: Kept | None = None,
        counted: Bool[np.ndarray, "B S-1"] | None = None,
    ) -> Float[Array, "B S-1"]:
        """Next-token cross-entropy in nats, float32; entry s is the loss of token s + 1.

        Compiled once per shape of `tokens`, layer it starts from and `(splice.tap, splice.replace,
        splice.reads)`.

        Args:
            splice: activations to replace.
            kept: activations of `tokens`. The forward starts at the last residual stream among them
                that `splice` leaves as it is, and gives what a forward from the tokens would.
            counted: the predictions whose loss is computed, the others being 0; None means all.

        Raises:
            UserError: a splice at a layer the model doesn't have.
        """
        if splice is not None:
            check_tap(splice.tap, self.config)
        layer, stream = _start(kept, splice)
        static, arguments = None, None
        if splice is not None and layer == splice.tap.layer:
            # It replaces the stream itself: the program of the layers above is that without splice.
            stream = _replace(splice.replace, stream, splice.arguments)
        elif splice is not None:
            static, arguments = (splice.tap, splice.replace, splice.reads), splice.arguments
        placed = self._placed(tokens)
        if counted is None:
            counted = np.ones((placed.shape[0], placed.shape[1] - 1), bool)
        dynamic = self.params, arguments, placed, stream, jnp.asarray(counted)
        return _losses(self.config, self.mesh, self.precision, layer, static, *dynamic)

    def gradient(
        self,
        tokens: Int[Array | np.ndarray, "B S"],
        tap: Tap,
        counted: Bool[np.ndarray, "B S-1"],
        *,
        kept: Kept | None = None,
    ) -> Float[Array, "B S D"]:
        """The gradient of the target tokens' mean-centred logits with respect to a tap, float32.

        The logits are summed over the `counted` predictions. The gradient at a position comes from
        its own prediction and from all later ones, which attend to it. `kept` as in `losses`.

        Raises:
            UserError: a layer the model doesn't have.
        """
        check_tap(tap, self.config)
        layer, stream = _start(kept, Splice(tap, _add))
        dynamic = self.params, self._placed(tokens), stream, jnp.asarray(counted)
        return _gradient(self.config, self.mesh, self.precision, layer, tap, *dynamic)

    def next_logits(
        self, tokens: Int[np.ndarray, "B S"], last_B: Int[np.ndarray, " B"]
    ) -> Float[Array, "B V"]:
        """Logits, float32, of the token after `last_B` of each row; what comes later is ignored."""
        static = self.config, self.mesh, self.precision
        return _next_logits(*static, self.params, self._placed(tokens), jnp.asarray(last_B))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        how: Sampling,
        *,
        splices: Sequence[Splice] = (),
        listener: Callable[[list[Continuation]], None] = lambda so_far: None,
    ) -> list[Continuation]:
        """Continuations of prompts (ids, BOS included): see `gemma.sampling.sample`."""
        return sample(
            self.config,
            self.params,
            prompts,
            how=how,
            mesh=self.mesh,
            precision=self.precision,
            splices=splices,
            listener=listener,
        )

    def _placed(self, tokens: Int[Array | np.ndarray, "B S"]) -> Int[Array, "B S"]:
        if isinstance(tokens, jax.Array):
            return tokens
        # JAX would read the last row for an id past them, without a word.
        rows = self.config.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < rows:
            raise UserError(
                f"token ids are {tokens.min()} to {tokens.max()} and the model embeds 0 to "
                f"{rows - 1}: tokenise the text with the model's own tokenizer"
            )
        # Not `device_put`, which in a group of processes would wait for all of them to compare.
        return jax.make_array_from_callback(
            tokens.shape, on_all(self.mesh), lambda index: tokens[index]
        )


@functools.cache
def _activations_on(mesh: Mesh) -> Callable[..., dict[Tap, Array]]:
    """The forward to the deepest tap, compiled for a mesh: one program for all of its size."""

    def activations(
        config: GemmaConfig,
        precision: Precision,
        taps: tuple[Tap, ...],
        params: Params,
        tokens: Array,
    ) -> dict[Tap, Array]:
        model = Gemma(config, mesh, precision=precision)
        output: Any = model.apply({"params": params}, tokens, taps=taps, logits=False)
        return output.taps

    return jax.jit(activations, static_argnums=(0, 1, 2), out_shardings=on_all(mesh))


def _start(kept: Kept | None, splice: Splice | None) -> tuple[int | None, Array | None]:
    """The layer after which a forward may start, and the residual stream there."""
    streams = {tap.layer: acts for tap, acts in (kept or {}).items() if tap.site == "resid_post"}
    if splice is not None:
        last = stream_before(splice)
        streams = {n: acts for n, acts in streams.items() if last is not None and n <= last.layer}
    if not streams:
        return None, None
    layer = max(streams)
    return layer, streams[layer]


@functools.partial(jax.jit, static_argnums=0)
def _replace(replace: Callable[..., Array], acts_BSD: Array, arguments: Any) -> Array:
    return replace(acts_BSD, arguments).astype(acts_BSD.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _losses(
    config: GemmaConfig,
    mesh: Mesh,
    precision: Precision,
    layer: int | None,
    static: tuple[Tap, Callable[..., Array], Tap | None] | None,
    params: Params,
    arguments: Any,
    tokens: Array,
    stream: Array | None,
    counted: Array,
) -> Array:
    splice = None
    if static is not None:
        tap, replace, reads = static
        splice = Splice(tap, replace, arguments, reads)
    losses: Any = Gemma(config, mesh, precision=precision).apply(
        {"params": params},
        tokens,
        score=cross_entropy,
        counted_BP=counted,
        splice=splice,
        kept=None if layer is None else (layer, stream),
        method=Gemma.scores,
    )
    return losses


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _next_logits(
    config: GemmaConfig,
    mesh: Mesh,
    precision: Precision,
    params: Params,
    tokens: Array,
    last_B: Array,
) -> Array:
    model = Gemma(config, mesh, precision=precision)
    logits: Any = model.apply({"params": params}, tokens, last_B, method=Gemma.next_logits)
    return logits


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _gradient(
    config: GemmaConfig,
    mesh: Mesh,
    precision: Precision,
    layer: int | None,
    tap: Tap,
    params: Params,
    tokens: Array,
    stream: Array | None,
    counted: Array,
) -> Array:
    model = Gemma(config, mesh, recompute=True, precision=precision)

    def total(added_BSD: Array) -> Array:
        scores: Any = model.apply(
            {"params": params},
            tokens,
            score=centred_logit,
            counted_BP=counted,
            splice=Splice(tap, _add, added_BSD),
            kept=None if layer is None else (layer, stream),
            method=Gemma.scores,
        )
        return scores.sum()

    return jax.grad(total)(jnp.zeros((*tokens.shape, tap_width(config, tap.site)), jnp.float32))


def _add(acts_BSD: Array, added_BSD: Array) -> Array:
    return acts_BSD + added_BSD.astype(acts_BSD.dtype)


def conversion_folder(store: AnyPath) -> Path:
    """The folder of GGUF conversions: `weights/` beside the activation store.

    They are mapped into memory. If the store is in a bucket, they are kept in the user's cache
    folder on this machine, or among its temporary files if the user has no home.
    """
    folder = storage_path(store)
    if isinstance(folder, Path):
        return folder.parent / "weights"
    cache = user_cache() or Path(tempfile.gettempdir(), f"open-gemma-scope-{os.getuid()}")
    return cache / "weights"


def convert_once(model: ModelConfig, *, folder: Path) -> None:
    """Convert a GGUF file unless that is done, before several processes load it.

    Raises:
        UserError: as `load_model`.
    """
    checkpoint = open_checkpoint(model)
    if isinstance(checkpoint, GgufCheckpoint):
        converted_checkpoint(checkpoint, load_tokenizer(model), folder=folder)


def precision_on(model: ModelConfig, mesh: Mesh) -> Precision:
    """How the model's products are made on the devices of a mesh.

    Raises:
        UserError: these devices have no such products.
    """
    if model.dtype == "bfloat16":
        return "float32"  # of bfloat16 operands it is the same product
    platform = mesh.devices.flat[0].platform
    return resolve(model.precision, platform=platform, key="model.precision")


def load_model(
    model: ModelConfig, *, converted: Path | None = None, mesh: Mesh | None = None
) -> LanguageModel:
    """Load weights and tokenizer.

    Args:
        model: what to load, the dtype to compute in and the precision of products.
        converted: folder under which a GGUF file's float32 copy is kept and found again; None
            dequantises each time.
        mesh: over whose axis `model` the weights are cut; None is one device of this process.

    Raises:
        UserError: missing, truncated or wrong weights, a tokenizer that doesn't match, a model
            that can't be cut over the mesh, or products that the devices don't have.
    """
    meshes = [mesh or make_mesh(jax.local_devices()[:1])]
    return load_replicas(model, converted=converted, meshes=meshes)[0]


def load_replicas(
    model: ModelConfig,
    *,
    converted: Path | None = None,
    meshes: Sequence[Mesh],
    embedding_only: bool = False,
) -> list[LanguageModel]:
    """Load a replica of the model for each mesh, reading each weight once; see `load_model`.

    With `embedding_only` the replicas compute the activations of that site and nothing else.
    """
    precision = precision_on(model, meshes[0])
    checkpoint: Checkpoint = open_checkpoint(model)
    for mesh in meshes:
        check_model_axis(checkpoint.config, mesh.shape["model"])
    fingerprint = checkpoint.fingerprint()
    tokenizer = load_tokenizer(model)
    if converted is not None and isinstance(checkpoint, GgufCheckpoint):
        checkpoint = converted_checkpoint(checkpoint, tokenizer, folder=converted)
    replicas = load_parameters(
        checkpoint,
        dtype=jnp.dtype(model.dtype),
        meshes=meshes,
        only="embedding" if embedding_only else None,
    )
    return [
        LanguageModel(
            config=checkpoint.config,
            params=params,
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            dtype=model.dtype,
            source=model.weights,
            mesh=mesh,
            precision=precision,
        )
        for mesh, params in zip(meshes, replicas, strict=True)
    ]
