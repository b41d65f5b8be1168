"""The language model of a phase that trains through it: frozen, on the mesh of the training.

    read         once a step for all runs of a cohort: the sequences go through the model as it is,
                 which gives what SAEs read and predict, and the original predictions
    divergence   once for each run: from the layer at which its reconstruction replaces the
                 activations, the sequences go on to the end; KL(original || with the SAE)

Weights are cut over mesh axis `model` as for harvesting; each index of axis `data` has its own
sequences. A gradient recomputes the layers one by one, and logits exist for some predictions at a
time.

Legend: B sequences of a step, S position, R = S - 1 rows of a sequence, P = S - 1 predictions,
D width of a tap, M of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.forward import Gemma
from activation_cache.gemma.scores import divergence
from activation_cache.gemma.taps import Splice, Tap, stream_before
from activation_cache.precision import Precision
from sae_train.end_to_end.sequences import Text
from sae_train.model.sharding import sharding

ModelParams = Any  # the tree that `gemma.params.parameter_table` describes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Original:
    """The model as it is on the sequences of a step, perhaps in groups of them.

    Attributes:
        inputs_BRD: rows of the tap that the SAE reads, raw.
        targets_BRD: of what a transcoder predicts; None of an SAE.
        stream_BSM: the residual stream from which a forward with the SAE goes on; None where that
            is the tokens.
        final_BPM: what the final norm gives for each prediction.
    """

    text: Text
    inputs_BRD: Float[Array, "... B R D"]
    targets_BRD: Float[Array, "... B R D"] | None
    stream_BSM: Float[Array, "... B S M"] | None
    final_BPM: Float[Array, "... B P M"]


# Of a step: the weights, and the sequences through the model as it is.
SequenceBatch = tuple[ModelParams, Original]


@dataclass(frozen=True)
class FrozenModel:
    """How the model of a run computes; hashable, its weights are given to each call."""

    config: GemmaConfig
    mesh: Mesh
    precision: Precision
    tap: Tap
    target: Tap

    @functools.cached_property
    def _start(self) -> Tap | None:
        """The residual stream from which a forward with the reconstruction goes on."""
        return stream_before(Splice(self.target, _replaced))

    def read(self, params: ModelParams, text: Text) -> Original:
        """The sequences through the model as it is."""

        def own(text: Text) -> Original:
            taps = {self.tap, self.target, *((self._start,) if self._start else ())}
            final_BPM, found = self._predictions(params, text, recompute=False, taps=tuple(taps))
            inputs_BRD = _rows(found[self.tap], text)
            is_sae = self.target == self.tap
            return Original(
                text=text,
                inputs_BRD=inputs_BRD,
                targets_BRD=None if is_sae else _rows(found[self.target], text),
                stream_BSM=found[self._start] if self._start else None,
                final_BPM=final_BPM,
            )

        return self._over_data(own)(text)

    def divergence(
        self, params: ModelParams, original: Original, reconstruction_BRD: Float[Array, "B R D"]
    ) -> Float[Array, ""]:
        """KL(original || with the SAE) in nats, the mean over the counted predictions.

        Args:
            reconstruction_BRD: raw; it replaces the activations at every usable token. Nothing else
                has a gradient.
        """

        def own(original: Original, reconstruction_BRD: Array) -> Array:
            text = original.text
            index_BS1 = text.row_BS[:, :, None]
            placed_BSD = jnp.take_along_axis(reconstruction_BRD, index_BS1, axis=1)
            splice = Splice(self.target, _replaced, (placed_BSD, text.usable_BS))
            kept = {}
            if self._start is not None:
                kept = {"kept": (self._start.layer, original.stream_BSM)}
            final_BPM, _ = self._predictions(params, text, recompute=True, splice=splice, **kept)
            return divergence(
                final_BPM,
                original.final_BPM,
                jnp.asarray(text.counted_BP),
                params["embedding"],
                softcap=self.config.final_softcap,
                precision=self.precision,
            )

        kl_BP = self._over_data(own)(original, reconstruction_BRD)
        return kl_BP.sum() / original.text.counted_BP.sum(dtype=kl_BP.dtype)

    def _predictions(
        self, params: ModelParams, text: Text, *, recompute: bool, **options: Any
    ) -> tuple[Array, dict[Tap, Array]]:
        model = Gemma(self.config, self.mesh, recompute=recompute, precision=self.precision)
        found: Any = model.apply(
            {"params": params}, text.tokens_BS, method=Gemma.predictions, **options
        )
        return found

    def _over_data(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of sequences, of which the devices at each index of axis `data` do their own.

        Inside the function the model names axis `model` alone, as in a replica of its own.
        """
        size = self.mesh.shape["data"]
        if size == 1:
            return function
        mapped = jax.vmap(function, spmd_axis_name="data")

        def whole(*sequences: Any) -> Any:
            cut = jax.tree.map(lambda one: one.reshape(size, -1, *one.shape[1:]), sequences)
            here = sharding(self.mesh, ("B",))
            cut = jax.lax.with_sharding_constraint(cut, here)
            found = jax.tree.map(lambda one: one.reshape(-1, *one.shape[2:]), mapped(*cut))
            return jax.lax.with_sharding_constraint(found, here)

        return whole


def _rows(acts_BSD: Float[Array, "B S D"], text: Text) -> Float[Array, "B R D"]:
    return jnp.take_along_axis(acts_BSD, text.position_BR[:, :, None], axis=1)


def _replaced(acts_BSD: Array, arguments: tuple[Array, Array]) -> Array:
    placed_BSD, usable_BS = arguments
    return jnp.where(usable_BS[:, :, None], placed_BSD.astype(acts_BSD.dtype), acts_BSD)
