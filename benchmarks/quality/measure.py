"""What an SAE does on held-out text: FVU three ways, delta loss by sequence, and who is alive.

Losses are over the tokens that occur anywhere in the text, not over the whole vocabulary: of Gemma
3's 262,144 tokens Python's source has 19,000, and the products with the others would take most of
the time.

Legend: B sequences, S position, P = S - 1 predictions, D width of the tap, N rows, F latents, V
tokens that occur.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from activation_cache.gemma.taps import Splice, Tap
from activation_cache.language_model.model import LanguageModel, conversion_folder, load_model
from activation_cache.outlying import largest_usual_norm
from benchmarks.quality.stores import LAYER, SITES, Rows
from sae_train.inference.sae import Sae

SEQUENCES, LOSS_SEQUENCES = 16, 8
ALIVE_ROWS = 16_384
_TOGETHER = 4  # sequences of one forward


@dataclass(frozen=True)
class Score:
    """What an SAE does on held-out text.

    Attributes:
        fvu: squared error over the squared distance from the mean, both summed over rows.
        median_fvu, typical_fvu: the median token's, and without outlying rows, as `sae evaluate`
            has them (`sae_train.evaluate.result.fvus`).
        delta_loss: nats per counted prediction.
        delta_by_sequence: the same of each sequence.
        alive: the share of latents that fire in rows of the store.
    """

    l0: float
    fvu: float
    median_fvu: float
    typical_fvu: float
    delta_loss: float
    delta_by_sequence: tuple[float, ...]
    alive: float


@jax.jit
def _apply(sae: Sae, x_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
    latents_NF = sae.encode(x_ND)
    return sae.decode(latents_NF), (latents_NF > 0).sum(axis=1)


@jax.jit
def _fired(sae: Sae, x_ND: jax.Array) -> tuple[jax.Array]:
    return ((sae.encode(x_ND) > 0).any(axis=0, keepdims=True),)


def _put(
    acts_BSD: jax.Array, arguments: tuple[Float[jax.Array, "B S D"], Bool[jax.Array, "B S"]]
) -> jax.Array:
    other_BSD, where_BS = arguments
    return jnp.where(where_BS[:, :, None], other_BSD, acts_BSD)


class HeldOut:
    """The held-out sequences of a text, with the model's activations and its losses there."""

    def __init__(self, rows: Rows) -> None:
        table = rows.store.tokens
        sequences = table.held_out[:SEQUENCES]
        tokens_BS = table.read(sequences)
        self.usable_BS: Bool[np.ndarray, "B S"] = table.usable(tokens_BS, sequences)
        follows_BP = tokens_BS[:, 1:] != table.summary.special_ids.pad
        self.counted_BP: Bool[np.ndarray, "B P"] = self.usable_BS[:, :-1] & follows_BP
        vocabulary_V = np.unique(table.read(range(table.num_sequences)))
        self.tokens_BS: Int[np.ndarray, "B S"] = np.searchsorted(vocabulary_V, tokens_BS)
        model = load_model(rows.config.model, converted=conversion_folder(rows.store.path))
        self.model = _with_vocabulary(model, vocabulary_V)
        taps = [Tap(site, LAYER) for site in SITES]
        self._stream = Tap("resid_post", LAYER - 1)
        found = [self.model.activations(part, (*taps, self._stream)) for part in self._parts()]
        self.acts_BSD = {
            tap: np.concatenate([np.asarray(one[tap]) for one in found])
            for tap in (*taps, self._stream)
        }
        self._base_BP = self._losses(None)

    @property
    def base(self) -> float:
        """The model's own loss, nats per counted prediction."""
        return float(self._base_BP.sum() / self.counted_BP[:LOSS_SEQUENCES].sum())

    def score(self, sae: Sae, rows: Rows) -> Score:
        """Measure one SAE of the rows' tap."""
        acts_BSD = self.acts_BSD[rows.tap]
        x_ND = acts_BSD[self.usable_BS]
        found_ND, active_N = _in_parts(_apply, sae, x_ND)
        error_N = np.square(found_ND - x_ND).sum(axis=1, dtype=np.float64)
        norms_N = np.linalg.norm(x_ND, axis=1)
        usual_N = norms_N <= largest_usual_norm(norms_N)
        usual_spread = _spread(x_ND[usual_N])
        other_BSD = acts_BSD.copy()
        other_BSD[self.usable_BS] = found_ND
        more_BP = (self._losses(other_BSD, rows.tap) - self._base_BP).astype(np.float64)
        counts_B = self.counted_BP[:LOSS_SEQUENCES].sum(axis=1)
        (fired_GF,) = _in_parts(_fired, sae, rows.all_ND[:ALIVE_ROWS])
        return Score(
            l0=float(active_N.mean()),
            fvu=float(error_N.sum() / _spread(x_ND)),
            median_fvu=float(np.median(error_N) * usual_N.sum() / usual_spread),
            typical_fvu=float(error_N[usual_N].sum() / usual_spread),
            delta_loss=float(more_BP.sum() / counts_B.sum()),
            delta_by_sequence=tuple((more_BP.sum(axis=1) / counts_B).tolist()),
            alive=float(fired_GF.any(axis=0).mean()),
        )

    def _losses(self, other_BSD: np.ndarray | None, tap: Tap | None = None) -> np.ndarray:
        """Losses of the counted predictions with other activations at a tap, 0 elsewhere."""
        losses = []
        for number, tokens in enumerate(self._parts(LOSS_SEQUENCES)):
            part = slice(number * _TOGETHER, number * _TOGETHER + len(tokens))
            kept = {self._stream: jnp.asarray(self.acts_BSD[self._stream][part])}
            splice = None
            if other_BSD is not None and tap is not None:
                if tap.site == "resid_post":
                    kept[tap] = jnp.asarray(self.acts_BSD[tap][part])
                where = jnp.asarray(self.usable_BS[part])
                splice = Splice(tap, _put, (jnp.asarray(other_BSD[part]), where))
            counted = self.counted_BP[part]
            losses.append(np.asarray(self.model.losses(tokens, splice, kept=kept, counted=counted)))
        return np.concatenate(losses)

    def _parts(self, sequences: int = SEQUENCES) -> list[Int[np.ndarray, "B S"]]:
        return [self.tokens_BS[at : at + _TOGETHER] for at in range(0, sequences, _TOGETHER)]


def _spread(x_ND: Float[np.ndarray, "N D"]) -> float:
    """The summed squared distances of rows from their mean."""
    mean_D = x_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    return float(np.square(x_ND - mean_D).sum(dtype=np.float64))


def _with_vocabulary(model: LanguageModel, vocabulary_V: Int[np.ndarray, " V"]) -> LanguageModel:
    """The model of these tokens alone; a token's id is then its place among them."""
    params = dict(model.params) | {"embedding": model.params["embedding"][vocabulary_V]}
    config = dataclasses.replace(model.config, vocab_size=len(vocabulary_V))
    return dataclasses.replace(model, params=params, config=config)


def _in_parts(
    function: Callable[..., Any], sae: Sae, rows_ND: Float[np.ndarray, "N D"]
) -> list[np.ndarray]:
    """What a function gives for 4096 rows at a time, each result of all parts together."""
    found = [function(sae, rows_ND[at : at + 4096]) for at in range(0, len(rows_ND), 4096)]
    return [np.concatenate([np.asarray(one) for one in part]) for part in zip(*found, strict=True)]
