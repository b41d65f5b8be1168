"""Text as the layers above a tap read it: losses with other activations there, and gradients.

Losses are over the tokens that occur anywhere in the text, not over the whole vocabulary: of Gemma
3's 262,144 tokens Python's source has 19,000, and the products with the others would take most of
the time. Predictions of tokens that the text hasn't are so not punished.

Legend: B sequences, S position, P = S - 1 predictions, D model width, N rows, V tokens that occur.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.forward import Gemma
from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel
from activation_cache.store.store import Store

_TOGETHER = 4  # sequences of one forward


@dataclass(frozen=True)
class Delta:
    """Nats per prediction above the model's own loss."""

    by_sequence_B: Float[np.ndarray, " B"]
    mean: float

    @property
    def standard_error(self) -> float:
        """Of the mean, from how sequences differ."""
        return float(self.by_sequence_B.std(ddof=1) / np.sqrt(len(self.by_sequence_B)))


class Text:
    """Sequences of a store's text with the model's activations at a `resid_post`.

    Attributes:
        usable_BS: the tokens whose activations an SAE replaces: all but special ones.
        base_BP: the model's own losses.
    """

    def __init__(
        self, model: LanguageModel, store: Store, tap: Tap, *, sequences: Sequence[int]
    ) -> None:
        table = store.tokens
        if tap.site != "resid_post":
            raise ValueError(f"layers above go on from resid_post, and the tap is {tap}")
        self.model, self.tap = model, tap
        self.tokens_BS = table.read(sequences)
        self.usable_BS = table.usable(self.tokens_BS, sequences)
        pad = table.summary.special_ids.pad
        self.counted_BP = self.usable_BS[:, :-1] & (self.tokens_BS[:, 1:] != pad)
        self.vocabulary_V = jnp.asarray(np.unique(table.read(range(table.num_sequences))))
        parts = [self.tokens_BS[part] for part in self._parts()]
        read = [np.asarray(model.activations(tokens, (tap,))[tap]) for tokens in parts]
        self.acts_BSD = np.concatenate(read)
        self.base_BP = self.losses(self.acts_BSD)

    @property
    def rows_ND(self) -> Float[np.ndarray, "N D"]:
        """The activations of all usable tokens."""
        return self.acts_BSD[self.usable_BS]

    @property
    def base(self) -> float:
        """The model's own loss, nats per counted prediction."""
        return float(self.base_BP.sum() / self.counted_BP.sum())

    def losses(self, acts_BSD: Float[np.ndarray, "B S D"]) -> Float[np.ndarray, "B P"]:
        """Losses of the counted predictions with these activations at the tap, 0 elsewhere."""
        return np.concatenate(
            [np.asarray(_losses(*self._of(part, acts_BSD))) for part in self._parts()]
        )

    def gradients_ND(self) -> Float[np.ndarray, "N D"]:
        """The gradient of the summed losses with respect to every usable token's activations.

        It holds the token's own prediction and all later ones, which attend to it.
        """
        found = [np.asarray(_gradients(*self._of(part, self.acts_BSD))) for part in self._parts()]
        return np.concatenate(found)[self.usable_BS]

    def delta(self, rows_ND: Float[np.ndarray, "N D"]) -> Delta:
        """Delta loss with these rows in place of all usable tokens' activations."""
        acts_BSD = self.acts_BSD.copy()
        acts_BSD[self.usable_BS] = rows_ND
        more_BP = (self.losses(acts_BSD) - self.base_BP).astype(np.float64)
        by_sequence_B = more_BP.sum(axis=1) / self.counted_BP.sum(axis=1)
        return Delta(by_sequence_B, float(more_BP.sum() / self.counted_BP.sum()))

    def _parts(self) -> list[slice]:
        return [slice(at, at + _TOGETHER) for at in range(0, len(self.tokens_BS), _TOGETHER)]

    def _of(self, part: slice, acts_BSD: np.ndarray) -> tuple:
        return (
            self.model.config,
            self.tap.layer,
            self.model.params,
            self.vocabulary_V,
            self.tokens_BS[part],
            jnp.asarray(acts_BSD[part]),
            self.counted_BP[part],
        )


def _loss(
    config: GemmaConfig,
    layer: int,
    params: dict,
    vocabulary_V: Int[Array, " V"],
    tokens_BS: Int[Array, "B S"],
    acts_BSD: Float[Array, "B S D"],
    counted_BP: Bool[Array, "B P"],
) -> Float[Array, "B P"]:
    def score(h_BPD, targets_BP, counted_BP, embedding_VD, *, softcap, precision):
        assert softcap is None, "the losses here have no cap, and this model's logits have"
        logits_BPV = jnp.einsum("bpd,vd->bpv", h_BPD, embedding_VD[vocabulary_V])
        places_BP = jnp.searchsorted(vocabulary_V, targets_BP)
        target_BP = jnp.take_along_axis(logits_BPV, places_BP[..., None], axis=-1)[..., 0]
        return jnp.where(counted_BP, jax.nn.logsumexp(logits_BPV, axis=-1) - target_BP, 0.0)

    found: Array = Gemma(config).apply(
        {"params": params},
        tokens_BS,
        score=score,
        counted_BP=counted_BP,
        kept=(layer, acts_BSD),
        method=Gemma.scores,
    )
    return found


_losses = functools.partial(jax.jit, static_argnums=(0, 1))(_loss)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(
    config: GemmaConfig,
    layer: int,
    params: dict,
    vocabulary_V: Array,
    tokens_BS: Array,
    acts_BSD: Array,
    counted_BP: Array,
) -> Float[Array, "B S D"]:
    def total(acts_BSD: Array) -> Array:
        fixed = config, layer, params, vocabulary_V, tokens_BS
        return _loss(*fixed, acts_BSD, counted_BP).sum()

    return jax.grad(total)(acts_BSD)
